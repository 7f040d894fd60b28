"""The scores that papers report: FID, Inception Score, improved precision and recall.

    python fid.py iMF-XL-2.pth stats.npz                 of 50,000 samples
    python fid.py images/ photos/                        precision and recall as well
    python fid.py photos/ --save stats.npz               statistics to compare with later

A and B: folders of images, .npz of images (arr_0) or of statistics (mu, sigma), or checkpoints."""

import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import sample

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")
AVERAGE = nn.AvgPool2d(3, 1, 1, count_include_pad=False)


def convolution(channels, out_channels, kernel_size, stride=1, padding="same"):
    conv = nn.Conv2d(channels, out_channels, kernel_size, stride, padding, bias=False)
    norm = nn.BatchNorm2d(out_channels, eps=0.001)
    return nn.Sequential(OrderedDict(conv=conv, bn=norm, relu=nn.ReLU(inplace=True)))


class Mixed(nn.Module):
    """Branches side by side: each a list of steps, {name: arguments of its convolution}. Two
    convolutions in one step read the same input. An empty branch is the pool itself, and one that
    begins with "branch_pool" reads the pool."""

    def __init__(self, channels, pool, *branches):
        super().__init__()
        self.pool, self.branches = pool, branches
        for branch in branches:
            width = channels
            for step in branch:
                for name, sizes in step.items():
                    self.add_module(name, convolution(width, *sizes))
                width = sizes[0]

    def forward(self, x):
        outputs = []
        for branch in self.branches:
            y = self.pool(x) if not branch or "branch_pool" in branch[0] else x
            for step in branch:
                y = torch.cat([self.get_submodule(name)(y) for name in step], 1)
            outputs.append(y)
        return torch.cat(outputs, 1)


def chain(name, *sizes):
    return [{f"{name}_{i}": size} for i, size in enumerate(sizes, 1)]


def mixed_5(channels, pool_channels):
    return Mixed(
        channels, AVERAGE, [{"branch1x1": (64, 1)}], chain("branch5x5", (48, 1), (64, 5)),
        chain("branch3x3dbl", (64, 1), (96, 3), (96, 3)), [{"branch_pool": (pool_channels, 1)}])


def mixed_6(n):
    row, column = (1, 7), (7, 1)
    return Mixed(
        768, AVERAGE, [{"branch1x1": (192, 1)}],
        chain("branch7x7", (n, 1), (n, row), (192, column)),
        chain("branch7x7dbl", (n, 1), (n, column), (n, row), (n, column), (192, row)),
        [{"branch_pool": (192, 1)}])


def mixed_7(channels, pool):
    row, column = (384, (1, 3)), (384, (3, 1))
    return Mixed(
        channels, pool, [{"branch1x1": (320, 1)}],
        [{"branch3x3_1": (384, 1)}, {"branch3x3_2a": row, "branch3x3_2b": column}],
        [{"branch3x3dbl_1": (448, 1)}, {"branch3x3dbl_2": (384, 3)},
         {"branch3x3dbl_3a": row, "branch3x3dbl_3b": column}],
        [{"branch_pool": (192, 1)}])


class Inception(nn.Module):
    """The Inception of 2015-12-05; its modules have the names of the published state dict.
    Images (B, 1 or 3, H, W), 0 to 255 -> features (B, 2048), logits (B, 1008) without the bias."""

    def __init__(self, weights=None):
        """weights: the path of the state dict; None downloads it. Raises ValueError."""
        super().__init__()
        self.Conv2d_1a_3x3 = convolution(3, 32, 3, 2, 0)
        self.Conv2d_2a_3x3 = convolution(32, 32, 3, 1, 0)
        self.Conv2d_2b_3x3 = convolution(32, 64, 3)
        self.pool_1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = convolution(80, 192, 3, 1, 0)
        self.pool_2 = nn.MaxPool2d(3, 2)
        self.Mixed_5b, self.Mixed_5c = mixed_5(192, 32), mixed_5(256, 64)
        self.Mixed_5d = mixed_5(288, 64)
        self.Mixed_6a = Mixed(
            288, nn.MaxPool2d(3, 2), [{"branch3x3": (384, 3, 2, 0)}],
            chain("branch3x3dbl", (64, 1), (96, 3), (96, 3, 2, 0)), [])
        self.Mixed_6b, self.Mixed_6c = mixed_6(128), mixed_6(160)
        self.Mixed_6d, self.Mixed_6e = mixed_6(160), mixed_6(192)
        self.Mixed_7a = Mixed(
            768, nn.MaxPool2d(3, 2), chain("branch3x3", (192, 1), (320, 3, 2, 0)),
            chain("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, 0)), [])
        self.Mixed_7b = mixed_7(1280, AVERAGE)
        self.Mixed_7c = mixed_7(2048, nn.MaxPool2d(3, 1, 1))
        self.fc = nn.Linear(2048, 1008)

        with sample.error_context(f"no Inception in {weights or URL} (--inception FILE)"):
            state = sample.load_file(weights) if weights else torch.hub.load_state_dict_from_url(
                URL, map_location="cpu", check_hash=True, weights_only=True)
            self.load_state_dict(state)
        self.eval().to(memory_format=torch.channels_last)  # the faster layout

    @torch.no_grad()
    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    def forward(self, images):
        x = (resize(torch.as_tensor(images, device=self.fc.weight.device)) - 128) / 128
        *layers, fc = self.children()
        for layer in layers:
            x = layer(x)
        features = x.mean((2, 3))
        logits = F.linear(features.cpu(), fc.weight.cpu())  # not in TF32
        return features, logits.to(features.device)


def resize(images):
    """(B, 1 or 3, H, W) to (B, 3, 299, 299) as TensorFlow 1 did: pixel i from i * size / 299."""
    x = F.pad(images.expand(-1, 3, -1, -1).float(), (0, 1, 0, 1), "replicate")
    return F.interpolate(x, (300, 300), mode="bilinear", align_corners=True)[..., :299, :299]


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)): mu (D,), sigma (D, D)."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(s, np.float64) for s in (mu1, sigma1, mu2, sigma2))

    # sigma1 = L L^T, pivoted as it may be singular: L^T sigma2 L has the eigenvalues of
    # sigma1 sigma2 and is symmetric; the trace of a root is the sum of their roots
    L, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma1, lower=True)
    L = np.tril(L)[pivots.argsort(), :rank]
    roots = np.linalg.eigvalsh(L.T @ sigma2 @ L).clip(0) ** 0.5
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2) - 2 * roots.sum()
    return float(np.maximum(distance, 0))  # rounding may lead below zero; NaN stays NaN


def inception_score(logits, splits=10):
    """(mean, std) over the splits of exp E KL(p(y|x) | p(y)), in the given order: logits (N, K)."""
    p, splits = logits.double().softmax(1).numpy(), min(splits, len(logits))
    parts = np.split(p, [i * len(p) // splits for i in range(1, splits)])
    scores = [np.exp(scipy.special.rel_entr(part, part.mean(0)).sum(1).mean()) for part in parts]
    return np.mean(scores), np.std(scores)


def precision_recall(generated, real, k=3):
    """(precision, recall), the fractions of one set within the manifold of the other: the union of
    the balls from each of its points to the k-th neighbour. Features (N, D), N > k."""
    def fraction(x, y):
        x, y = x.double(), y.double()
        radius = torch.cat([torch.cdist(part, y).topk(k + 1, largest=False).values[:, k]
                            for part in y.split(1000)])
        inside = [(torch.cdist(part, y) <= radius).any(1) for part in x.split(1000)]
        return torch.cat(inside).double().mean().item()

    return fraction(generated, real), fraction(real, generated)


def moments(features):
    """(mu, sigma) of features (N, D), in float64."""
    mu = features.mean(0, dtype=torch.float64)
    centred = (part.double() - mu for part in features.split(1000))
    return mu, sum(part.T @ part for part in centred) / (len(features) - 1)


def read_statistics(path):
    """(mu, sigma) or (ref_mu, ref_sigma) of an .npz; None if it has neither. Raises ValueError."""
    with sample.error_context(f"{path}: expected images arr_0, or mu and sigma of 2048 features"):
        with np.load(path, allow_pickle=False) as npz:
            prefix = "" if "mu" in npz else "ref_"
            if f"{prefix}mu" not in npz:
                return None
            mu, sigma = npz[f"{prefix}mu"], npz[f"{prefix}sigma"]
        if (mu.shape, sigma.shape) != ((2048,), (2048, 2048)):
            raise ValueError(f"they are {mu.shape} and {sigma.shape}")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError("they are not finite")
        return mu, sigma


def read_images(path):
    """The arr_0 of an .npz as uint8 (N, H, W, 1 or 3); N = 0 without one. Raises ValueError."""
    with sample.error_context(f"{path}: expected arr_0, uint8 (N, H, W) or (N, H, W, 3)"):
        with np.load(path, allow_pickle=False) as npz:
            images = npz["arr_0"] if "arr_0" in npz else np.empty((0, 1, 1, 3), np.uint8)
        images = images[..., None] if images.ndim == 3 else images
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise ValueError(f"it is {images.dtype} {images.shape}")
        return images


def read_batches(images, device):
    """Yields tensors (b, 3, 299, 299) of files or of arrays (H, W, C), 32 at a time."""
    def tensor(image):
        if isinstance(image, str):
            image = np.array(sample.open_image(image))
        return resize(torch.tensor(image, device=device).permute(2, 0, 1)[None])

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(images), 32):
            yield torch.cat(list(pool.map(tensor, images[start:start + 32])))


def open_side(path, args, device):
    """((mu, sigma) or None, number of images, batches of them) of A or B. Raises ValueError."""
    statistics = read_statistics(path) if path.endswith(".npz") else None
    if statistics:
        return statistics, 0, ()
    if os.path.isdir(path):
        images = sample.images_in(path)
    elif path.endswith(".npz"):
        images = read_images(path)
    else:
        net, vae, guidance = sample.prepare(path, args, device)
        if args.omega:
            guidance["omega"] = args.omega
        classes = range(net.num_classes)
        return None, args.num, sample.generate(net, range(args.num), classes, args.seed, vae,
                                               **guidance)
    if len(images) < 2:
        raise ValueError(f"{path}: {len(images)} images, expected two at least")
    return None, len(images), read_batches(images, device)


def measure(inception, statistics, num, batches):
    """((mu, sigma), features (N, 2048), logits (N, 1008)) of an opened side; given statistics have
    neither features nor logits. Raises ValueError."""
    if statistics:
        return statistics, (), ()
    rows = []
    with tqdm(total=num, unit=" images") as bar:
        for images in batches:
            rows.append(torch.cat(inception(images), 1).cpu())
            bar.update(len(images))
    features, logits = torch.cat(rows).split((2048, 1008), 1)
    if not (features.isfinite().all() and logits.isfinite().all()):
        raise ValueError("features are not finite: these are not the Inception weights expected")
    # torch-fidelity shuffles before it splits for the Inception Score
    return moments(features), features, logits[np.random.RandomState(2020).permutation(num)]


def main():
    # the command line; both sides are opened before hours of work begin
    parser = sample.command_line(__doc__)
    flag = parser.add_argument
    flag("A", help="what is judged")
    flag("B", nargs="?", help="what it is compared with; without B: the Inception Score alone")
    flag("--omega", type=sample.number(float, 1e-6), metavar="W", help="guidance scale")
    flag("--num", type=sample.number(int, 2), default=50_000, help="images to sample; 50000")
    flag("--save", metavar="FILE.npz", help="keep A's statistics")
    flag("--inception", metavar="FILE", help="its state dict; default: downloaded once")
    sample.sampling_options(flag)
    args = parser.parse_args()
    if args.save:
        Path(args.save).parent.mkdir(parents=True, exist_ok=True)
    device, _, world = sample.join(args.device)
    if world > 1:
        raise ValueError("fid.py runs in one process: let sample.py write an .npz in several")
    sides = [open_side(path, args, device) for path in (args.A, args.B) if path]
    inception = Inception(args.inception).to(device) if any(num for _, num, _ in sides) else None

    # A's statistics, and the scores
    scores = {}
    (mu, sigma), features, logits = measure(inception, *sides[0])
    if args.save:
        with sample.atomic(args.save) as file:
            np.savez(file, mu=mu, sigma=sigma)
    if args.B:
        reference, real, _ = measure(inception, *sides[1])
        scores["fid"] = frechet_distance(mu, sigma, *reference)
        if min(len(features), len(real)) > 3:
            found = precision_recall(features.to(device), real.to(device))
            scores["precision"], scores["recall"] = found
    if len(logits):
        scores["is"], scores["is_std"] = inception_score(logits)
    print("  ".join(f"{name} {value:.7g}" for name, value in scores.items()))


if __name__ == "__main__":
    sample.run(main)
