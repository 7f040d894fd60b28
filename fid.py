"""The scores that papers report: FID, Inception Score, improved precision and recall.

    python fid.py images.npz photos-32px        images that sample.py wrote, and decoded photos
    python fid.py photos/ --save stats.npz      statistics to compare with later

A and B: folders of pictures, decoded folders, .npz of images (arr_0) or statistics (mu, sigma)."""

import os, re
from collections import OrderedDict
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


def conv(channels, out_channels, kernel_size, stride=1, padding="same"):
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(channels, out_channels, kernel_size, stride, padding, bias=False),
        bn=nn.BatchNorm2d(out_channels, eps=0.001), relu=nn.ReLU(inplace=True)))


class Parallel(nn.ModuleDict):
    def forward(self, x):
        return torch.cat([branch(x) for branch in self.values()], 1)


def mixed_5(n, pool_channels):
    return Parallel({
        "branch1x1": conv(n, 64, 1),
        "branch5x5": nn.Sequential(conv(n, 48, 1), conv(48, 64, 5)),
        "branch3x3dbl": nn.Sequential(conv(n, 64, 1), conv(64, 96, 3), conv(96, 96, 3)),
        "branch_pool": nn.Sequential(AVERAGE, conv(n, pool_channels, 1))})


def mixed_6a():
    return Parallel({
        "branch3x3": conv(288, 384, 3, 2, 0),
        "branch3x3dbl": nn.Sequential(conv(288, 64, 1), conv(64, 96, 3), conv(96, 96, 3, 2, 0)),
        "branch_pool": nn.MaxPool2d(3, 2)})


def mixed_6(n):
    row, column = (1, 7), (7, 1)
    return Parallel({
        "branch1x1": conv(768, 192, 1),
        "branch7x7": nn.Sequential(conv(768, n, 1), conv(n, n, row), conv(n, 192, column)),
        "branch7x7dbl": nn.Sequential(conv(768, n, 1), conv(n, n, column), conv(n, n, row),
                                      conv(n, n, column), conv(n, 192, row)),
        "branch_pool": nn.Sequential(AVERAGE, conv(768, 192, 1))})


def mixed_7a():
    return Parallel({
        "branch3x3": nn.Sequential(conv(768, 192, 1), conv(192, 320, 3, 2, 0)),
        "branch7x7x3": nn.Sequential(conv(768, 192, 1), conv(192, 192, (1, 7)),
                                     conv(192, 192, (7, 1)), conv(192, 192, 3, 2, 0)),
        "branch_pool": nn.MaxPool2d(3, 2)})


def mixed_7(n, pool):
    def fork(channels):
        return Parallel({"a": conv(channels, 384, (1, 3)), "b": conv(channels, 384, (3, 1))})

    return Parallel({
        "branch1x1": conv(n, 320, 1),
        "branch3x3": nn.Sequential(conv(n, 384, 1), fork(384)),
        "branch3x3dbl": nn.Sequential(conv(n, 448, 1), conv(448, 384, 3), fork(384)),
        "branch_pool": nn.Sequential(pool, conv(n, 192, 1))})


def published(name):
    """The published name of one of our parameters: branch3x3.1.a becomes branch3x3_2a."""
    name = name.replace("layers.", "").replace("branch_pool.1", "branch_pool")
    return re.sub(r"(branch\w+)\.(\d)\.?([ab]?)\.",
                  lambda found: f"{found[1]}_{int(found[2]) + 1}{found[3]}.", name)


class Inception(nn.Module):
    """The Inception of 2015-12-05: images (B, 1 or 3, H, W), 0 to 255 -> features (B, 2048), logits
    (B, 1008) without the bias. weights: path of the state dict, or None. Raises ValueError."""

    def __init__(self, weights=None):
        super().__init__()
        self.layers = nn.Sequential(OrderedDict(
            Conv2d_1a_3x3=conv(3, 32, 3, 2, 0), Conv2d_2a_3x3=conv(32, 32, 3, 1, 0),
            Conv2d_2b_3x3=conv(32, 64, 3), pool_1=nn.MaxPool2d(3, 2),
            Conv2d_3b_1x1=conv(64, 80, 1), Conv2d_4a_3x3=conv(80, 192, 3, 1, 0),
            pool_2=nn.MaxPool2d(3, 2), Mixed_5b=mixed_5(192, 32), Mixed_5c=mixed_5(256, 64),
            Mixed_5d=mixed_5(288, 64), Mixed_6a=mixed_6a(), Mixed_6b=mixed_6(128),
            Mixed_6c=mixed_6(160), Mixed_6d=mixed_6(160), Mixed_6e=mixed_6(192),
            Mixed_7a=mixed_7a(), Mixed_7b=mixed_7(1280, AVERAGE),
            Mixed_7c=mixed_7(2048, nn.MaxPool2d(3, 1, 1))))
        self.fc = nn.Linear(2048, 1008)
        with sample.reading(weights or URL, "expected the Inception; or give --inception FILE"):
            state = sample.load_file(weights) if weights else torch.hub.load_state_dict_from_url(
                URL, map_location="cpu", check_hash=True, weights_only=True)
            self.load_state_dict({name: state[published(name)] for name in self.state_dict()
                                  if "num_batches" not in name}, strict=False)  # state[] is strict
        self.eval().to(memory_format=torch.channels_last)  # the faster layout

    @torch.no_grad()
    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    def forward(self, images):
        images = torch.as_tensor(images, device=self.fc.weight.device)
        features = self.layers((resize(images) - 128) / 128).mean((2, 3)).cpu()
        return features, F.linear(features, self.fc.weight.cpu())  # on the CPU: not in TF32


def resize(images):
    """(B, 1 or 3, H, W) to (B, 3, 299, 299): pixel i is read at i H / 299, as in TensorFlow 1."""
    x = F.pad(images.expand(-1, 3, -1, -1).float(), (0, 1, 0, 1), "replicate")
    return F.interpolate(x, (300, 300), mode="bilinear", align_corners=True)[..., :299, :299]


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)): mu (D,), sigma (D, D)."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(s, np.float64) for s in (mu1, sigma1, mu2, sigma2))

    # sigma1 = root root: then root sigma2 root is symmetric and has the eigenvalues of the product
    eigenvalues, vectors = np.linalg.eigh(sigma1)
    root = vectors * eigenvalues.clip(0) ** 0.5 @ vectors.T
    of_product = np.linalg.eigvalsh(root @ sigma2 @ root).clip(0)
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2) - 2 * (of_product**0.5).sum()
    return float(np.maximum(distance, 0))  # rounding may lead below zero


def inception_score(logits, splits=10):
    """(mean, std) over the splits of exp E KL(p(y|x) | p(y)), in the given order: logits (N, K)."""
    parts = np.array_split(logits.double().softmax(1).numpy(), min(splits, len(logits)))
    scores = [np.exp(scipy.special.rel_entr(part, part.mean(0)).sum(1).mean()) for part in parts]
    return np.mean(scores), np.std(scores)


def precision_recall(generated, real, k=3):
    """(precision, recall): the fraction of one set within the other's manifold, which is the union
    of the balls from each point to its k-th neighbour (itself apart). Features (N, D), N > k."""
    def fraction(x, y):
        x, y = x.double(), y.double()
        radius = torch.cat([torch.cdist(part, y).topk(k + 1, largest=False).values[:, k]
                            for part in y.split(1000)])
        inside = [(torch.cdist(part, y) <= radius).any(1) for part in x.split(1000)]
        return torch.cat(inside).double().mean().item()

    return fraction(generated, real), fraction(real, generated)


def moments(features):
    """(mu, sigma) of features (N, D), in float64."""
    return features.double().mean(0), features.double().T.cov()


def read(path):
    """(statistics, pictures) of A or B: (mu, sigma) or None; paths, an array (N, C, H, W) or []."""
    with sample.reading(path, "expected images, or mu and sigma of 2048 features"):
        if Path(path, "about.json").exists():
            images = np.load(Path(path, "images.npy"), mmap_mode="r")
            if images.dtype != np.uint8:
                raise ValueError("these are latents")
            return None, images
        if not path.endswith(".npz"):
            return None, sample.images_in(path)
        arrays = sample.read_npz(path)
        if "mu" not in arrays:
            return None, arrays["arr_0"]
        statistics = arrays["mu"].reshape(2048), arrays["sigma"].reshape(2048, 2048)
        return statistics, arrays.get("arr_0", [])


def batches(pictures):
    """Yields arrays (b, C, H, W): of files one by one, as their sizes differ."""
    if isinstance(pictures, list):
        for path in tqdm(pictures, unit=" images"):
            yield np.array(sample.open_image(path)).transpose(2, 0, 1)[None]
    else:
        for start in tqdm(range(0, len(pictures), 32), unit=" batches"):
            yield np.array(pictures[start:start + 32])


def evaluate(inception, statistics, pictures):
    """((mu, sigma), features (N, 2048), logits (N, 1008), size of the first picture)."""
    rows, size = [torch.empty(0, 2048 + 1008)], None
    for images in batches(pictures):
        size = size or images.shape[2:]
        rows.append(torch.cat(inception(images), 1))
    features, logits = torch.cat(rows).split((2048, 1008), 1)
    if not features.isfinite().all() or len(features) == 1:
        raise ValueError("expected two pictures at least, and finite features of the Inception")
    return statistics or moments(features), features, logits, size


def main():
    parser = sample.command_line(__doc__)
    parser.add_argument("A", help="what is judged")
    parser.add_argument("B", nargs="?", help="what it is compared with; without: the IS alone")
    parser.add_argument("--save", metavar="FILE.npz", help="keep A's statistics in a new file")
    parser.add_argument("--inception", metavar="FILE", help="default: downloaded once")
    args = parser.parse_args()
    device, *_ = sample.join(args.device)
    if args.save and any(map(os.path.exists, (args.save, f"{args.save}.npz"))):
        raise ValueError(f"--save {args.save}: there is such a file, and it is not overwritten")
    sides = [read(path) for path in (args.A, args.B) if path]
    if not args.B and not len(sides[0][1]):
        raise ValueError(f"{args.A} holds statistics alone: give B to compare them with")
    inception = Inception(args.inception).to(device) if any(len(p) for _, p in sides) else None

    # A's statistics, and the scores, the quickest first
    (mu, sigma), features, logits, size = evaluate(inception, *sides[0])
    if args.B:
        reference, real, _, real_size = evaluate(inception, *sides[1])
        if size and real_size and size != real_size:
            print(f"A is {size}, B {real_size}, which FID notices: give B in the size of A")
        print(f"fid {frechet_distance(mu, sigma, *reference):.7g}", flush=True)
    if len(logits):  # torch-fidelity shuffles before it splits
        shuffled = logits[np.random.RandomState(2020).permutation(len(logits))]
        print("is {:.7g}  is_std {:.7g}".format(*inception_score(shuffled)), flush=True)
    if args.save:
        np.savez(args.save, mu=mu, sigma=sigma)
    if args.B and min(len(features), len(real)) > 3:
        print("precision {:.7g}  recall {:.7g}".format(*precision_recall(features, real)))


if __name__ == "__main__":
    sample.run(main)
