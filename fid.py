"""The scores that papers report: FID, Inception Score, improved precision and recall.

    python fid.py out/last.pt stats.npz --omega 2 4 --interval 0 1 --interval 0.4 0.6
    python fid.py images/ more.npz             precision and recall as well
    python fid.py photos/ --save stats.npz     statistics to compare with

A, B: folders of images, .npz of images (arr_0) or of statistics (mu, sigma), or checkpoints.
"""

import argparse, functools, itertools, os, sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from tqdm import tqdm

import sample
from sample import Fault, blame, number

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")

# The Inception of 2015-12-05. Branches are chains of convolutions and pools, their outputs side
# by side; / is stride 2 and - stride 1, both without padding; | splits the end of a branch.
STEM = ("1a_3x3/ 2a_3x3- 2b_3x3 max/ 3b_1x1 4a_3x3- max/",)
A = "1x1", "5x5_1 5x5_2", "3x3dbl_1 3x3dbl_2 3x3dbl_3", "avg _pool"
B = "3x3/", "3x3dbl_1 3x3dbl_2 3x3dbl_3/", "max/"
C = "1x1", "7x7_1 7x7_2 7x7_3", "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5", "avg _pool"
D = "3x3_1 3x3_2/", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4/", "max/"
E = "1x1", "3x3_1 3x3_2a|3x3_2b", "3x3dbl_1 3x3dbl_2 3x3dbl_3a|3x3dbl_3b"
BLOCKS = {"5b": A, "5c": A, "5d": A, "6a": B, "6b": C, "6c": C, "6d": C, "6e": C, "7a": D,
          "7b": (*E, "avg _pool"), "7c": (*E, "max _pool")}
STAGES = {"Conv2d_": STEM} | {f"Mixed_{name}_branch": block for name, block in BLOCKS.items()}

def resize(images):
    """(B, 1 or 3, H, W) to (B, 3, 299, 299) as TensorFlow 1 did: pixel i from i * size / 299."""
    x = F.pad(images.expand(-1, 3, -1, -1).float(), (0, 1, 0, 1), "replicate")
    return F.interpolate(x, (300, 300), mode="bilinear", align_corners=True)[..., :299, :299]

class Inception(torch.nn.Module):
    """Images uint8 (B, 3, H, W) -> features (B, 2048) and logits (B, 1008) without the bias."""

    def __init__(self, weights=None):
        """weights: the path of the state dict; None downloads it. Raises Fault if it is none."""
        super().__init__()
        with blame(f"no Inception in {weights or URL} (--inception FILE names a copy)"):
            state = sample.load_file(weights) if weights else torch.hub.load_state_dict_from_url(
                URL, map_location="cpu", check_hash=True, weights_only=True)
            for name, value in state.items():
                self.register_buffer(name.replace(".", "_"), value)
            self.eval().to(memory_format=torch.channels_last)  # which is faster
            if [x.isfinite().sum() for x in self(torch.zeros(1, 3, 8, 8))] != [2048, 1008]:
                raise ValueError("other sizes, or not finite")

    def layer(self, stage, x, name):
        if "|" in name:
            return torch.cat([self.layer(stage, x, part) for part in name.split("|")], 1)
        stride, padded = (2, False) if name[-1] == "/" else (1, name[-1] != "-")
        name = name.rstrip("/-")
        if name == "max":
            return F.max_pool2d(x, 3, stride, int(padded))
        if name == "avg":
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        weight, *norm = (getattr(self, f"{stage}{name}_{end}") for end in (
            "conv_weight", "bn_running_mean", "bn_running_var", "bn_weight", "bn_bias"))
        x = F.conv2d(x, weight, None, stride, "same" if padded else "valid")
        return F.relu_(F.batch_norm(x, *norm, eps=1e-3))

    @torch.no_grad()
    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    def forward(self, images):
        x = (resize(torch.as_tensor(images, device=self.fc_weight.device)) - 128) / 128
        for stage, branches in STAGES.items():
            layer = functools.partial(self.layer, stage)
            x = torch.cat([functools.reduce(layer, branch.split(), x) for branch in branches], 1)
        x = x.mean((2, 3), keepdim=True)
        return x.flatten(1), F.conv2d(x, self.fc_weight[:, :, None, None]).flatten(1)

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)): mu (D,), sigma (D, D)."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(s, np.float64) for s in (mu1, sigma1, mu2, sigma2))
    # sigma1 = L L^T, pivoted as it may be singular; L^T sigma2 L has sigma1 sigma2's eigenvalues
    L, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma1, lower=True)
    L = np.tril(L)[pivots.argsort(), :rank]
    roots = np.linalg.eigvalsh(L.T @ sigma2 @ L).clip(0) ** 0.5
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2) - 2 * roots.sum()
    return float(np.maximum(distance, 0))  # rounding may lead below; NaN stays

def inception_score(logits, splits=10):
    """(mean, std) over the splits of exp E KL(p(y|x) | p(y)), in the given order: logits (N, K)."""
    p, n = logits.double().softmax(1).numpy(), min(splits, len(logits))
    parts = [p[i * len(p) // n:(i + 1) * len(p) // n] for i in range(n)]
    scores = [np.exp(scipy.special.rel_entr(q, q.mean(0)).sum(1).mean()) for q in parts]
    return np.mean(scores), np.std(scores)

def precision_recall(generated, real, k=3):
    """(precision, recall), shares near the other set: features (N, D), more than k of each."""
    def share(x, y):  # of x within the reach, to its k-th neighbour, of some y; in blocks
        x, y = x.double(), y.double()
        reach = torch.cat([torch.cdist(p, y).topk(k + 1, largest=False)[0][:, k]
                           for p in y.split(1000)])
        return sum((torch.cdist(p, y) <= reach).any(1).sum().item() for p in x.split(1000)) / len(x)
    return share(generated, real), share(real, generated)

def moments(features):
    """(mu, sigma) of features (N, D), float64."""
    mu = features.mean(0, dtype=torch.float64)
    centred = (part.double() - mu for part in features.split(1000))
    return mu, sum(part.T @ part for part in centred) / (len(features) - 1)

def extract(inception, batches, num, name="", rank=0, world=1):
    """Features (num, 2048) and, shuffled, logits (num, 1008), on the CPU of every process, from
    batches (b, 1 or 3, H, W) of its own share range(num)[rank::world]. Raises Fault."""
    rows, n = torch.from_numpy(np.zeros((num, 2048 + 1008), np.float32)), 0  # or a MemoryError
    with tqdm(total=-(-num // world), desc=name, unit=" images", disable=rank or not num) as bar:
        for images in batches:
            rows[rank::world][n:n + len(images)] = torch.cat(inception(images), 1)
            n += len(images)
            bar.update(len(images))
    features, logits = sample.total(rows).split((2048, 1008), 1)
    if not rows.isfinite().all():
        raise Fault("features are not finite: the weights of the Inception are others")
    return features, logits[np.random.RandomState(2020).permutation(num)]  # as in torch-fidelity

def warn(what, num):
    """Says on stderr why scores from few images compare with nothing."""
    if 0 < num < 10_000 and os.environ.get("RANK", "0") == "0":
        print(f"warning: {what}: {num} images. FID falls as the number grows, papers take 50,000; "
              "up to 2,048, as many as features, the covariance is singular", file=sys.stderr)

def stored(path):
    """Yields ((mu, sigma) or None, number of images) of an .npz, then each image uint8 (H, W, 3).
    mu and sigma may be called ref_mu, ref_sigma. Raises Fault."""
    with blame(f"{path}: expected arr_0 or mu, sigma"), np.load(path, allow_pickle=False) as npz:
        names = [name for name in ("mu", "sigma", "ref_mu", "ref_sigma") if name in npz][:2]
        known = [npz[name] for name in names]
        shapes = [x.shape for x in known if np.isfinite(x).all()]
        if known and (shapes != [(2048,), (2048, 2048)] or known[1].diagonal().min() < 0):
            raise ValueError(f"{names} are not of 2048 features, or not finite")
        if "num" in npz:
            warn(path, int(npz["num"]))
        if known and "arr_0" not in npz:
            return (yield known, 0)
        file = npz.zip.open("arr_0.npy")
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
            raise ValueError(f"arr_0 is {dtype} {shape}, expected uint8 (N, H, W, 3) in C order")
        yield known or None, shape[0]
        for _ in range(shape[0]):
            yield np.frombuffer(file.read(np.prod(shape[1:])), np.uint8).reshape(shape[1:])

def batches(images, device):
    """Yields tensors (b, 3, 299, 299) of images, arrays (H, W, 3) or files, 32 at a time."""
    def tensor(image):
        if isinstance(image, str):
            with blame(f"{image} is damaged or no image"):
                image = np.array(sample.open_image(image))
        return torch.tensor(image, device=device).permute(2, 0, 1)[None]

    images = iter(images)
    with ThreadPoolExecutor() as pool:
        while part := list(itertools.islice(images, 32)):
            yield torch.cat([resize(x) for x in pool.map(tensor, part)])

def side(path, args, device, rank, world):
    """((mu, sigma) or None, number of images, [(setting, batches), ...]) of A or B, or a Fault."""
    if os.path.isdir(path):
        paths = sample.files(path)
        return None, len(paths), [({}, batches(paths[rank::world], device))]
    if path.endswith(".npz"):
        known, num = next(images := stored(path))
        return known, num, [({}, batches(itertools.islice(images, rank, None, world), device))]
    net, vae, settings = sample.prepare(path, args, device)
    given = net, range(args.num)[rank::world], range(net.num_classes), args.seed, vae
    return None, args.num, [(row, sample.generate(*given, **row)) for row in settings]

def main():
    p = sample.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("A", help="what is judged")
    p.add_argument("B", nargs="?", help="what it is compared with; without, IS alone")
    p.add_argument("--num", type=number(int, 2), default=50_000, help="images to draw; 50000")
    p.add_argument("--save", metavar="FILE.npz", help="keep A's statistics, of several the last")
    p.add_argument("--inception", metavar="FILE", help="its state dict; default: downloaded once")
    sample.options(p.add_argument)
    args = p.parse_args()
    if args.save and (not args.save.endswith(".npz") or os.path.isdir(args.save)):
        raise Fault(f"--save {args.save}: expected the name of a file that ends in .npz")
    os.makedirs(os.path.dirname(os.path.abspath(args.save or "x")), exist_ok=True)
    device, rank, world = sample.join(args.device)
    sides = [side(path, args, device, rank, world) for path in (args.A, args.B) if path]
    for path, (known, num, _) in zip((args.A, args.B), sides):
        if num < 2 and not (known and args.B):
            raise Fault(f"{path}: {num} images, expected more, or mu and sigma to compare with B")
        warn(path, num)
    if args.B and len(sides[1][2]) > 1:
        raise Fault(f"{args.B}: B is one set; several --omega, --interval or --steps are for A")
    inception = Inception(args.inception).to(device) if any(s[1] for s in sides) else None

    reference, real, lines = None, (), []
    for reference, num, [(_, images), *_] in sides[1:]:  # B, if there is one
        real, _ = extract(inception, images, num, args.B, rank, world)
        reference = reference or moments(real)
    known, num, tasks = sides[0]
    for result, images in tasks:  # the setting, to which the scores are added
        features, logits = extract(inception, images, num, args.A, rank, world)
        if rank:
            continue
        found = known or moments(features)
        if reference:
            result["fid"] = frechet_distance(*found, *reference)
        if num:
            result["is"], result["is_std"] = inception_score(logits)
        if min(num, len(real)) > 3:
            where = device if device.type == "cuda" else "cpu"  # mps has no float64
            near = precision_recall(features.to(where), real.to(where))
            result |= zip(("precision", "recall"), near)
        lines.append((result.get("fid"), "  ".join(f"{k} {v:.7g}" for k, v in result.items())))
        print(lines[-1][1], flush=True)
        if args.save:
            with sample.atomic(args.save) as file:
                np.savez(file, mu=found[0], sigma=found[1], num=num)
    if len(lines) > 1 and args.B:
        print("best: " + min(lines)[1])

if __name__ == "__main__":
    sample.run(main)
