"""Draw images with a trained network, in one evaluation each.

    python sample.py                                           10 x 10 digits from out/last.pt
    python sample.py --omega 1 2 4 8 --out omegas.png          one row for each guidance scale
    python sample.py --classes 3 7 --num 1000 --out threes/    a folder of PNGs
    python sample.py iMF-XL-2.pth --classes 207 88             the authors' weights, with their VAE
    torchrun --nproc-per-node=8 -- sample.py iMF-XL-2.pth --num 50000 --out images.npz

Image i is made from noise that depends on (seed, i) alone: neither the batch size, nor the
number of images or processes, nor their order changes it (the rounding of latents excepted).
"""

import argparse
import contextlib
import datetime
import hashlib
import itertools
import os
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import imf
import model

# How a network is asked to draw where nothing is said: (omega, t_min, t_max). For latents it is
# what the authors advise, by the network's depth, in one step and in more.
GUIDANCE = (2.0, 0.0, 1.0)
ADVISED = {12: (8.0, 0.4, 0.65), 24: (10.5, 0.4, 0.6), 32: (10.5, 0.4, 0.6), 48: (8.0, 0.42, 0.62)}
ADVISED_IN_STEPS = {**ADVISED, 48: (4.0, 0.36, 0.64)}

# The paper's VAE; the mean and the deviation of each channel of its latents of ImageNet.
VAE_NAME = "stabilityai/sd-vae-ft-mse"
LATENT_MEAN = torch.tensor([0.86488, -0.27787343, 0.21616915, 0.3738409]).view(-1, 1, 1)
LATENT_STD = torch.tensor([4.85503674, 5.31922414, 3.93725398, 3.9870003]).view(-1, 1, 1)

class Fault(Exception):
    """Something that the user can mend: one line that names it, what was expected and the cure."""

@contextlib.contextmanager
def blame(what):
    """Whatever goes wrong inside becomes a Fault that names `what`."""
    try:
        yield
    except Fault:
        raise
    except Exception as error:
        raise Fault(f"{what}: {' '.join(str(error).split())[:200] or repr(error)}") from None

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Fault(message)

def run(main):
    """Runs a command line: a Fault is one line on stderr and exit status 2, Ctrl-C is silent."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (Fault, OSError, MemoryError, torch.OutOfMemoryError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            error = "out of memory: a smaller --batch-size needs less, or in training more --accum"
        if int(os.environ.get("RANK", 0)):  # if rank 0 says the same, torchrun ends us meanwhile
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)

def number(kind, low, high=10**12):
    """An argparse type: an int or float from low to high."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    number.__name__ = kind.__name__  # in argparse's messages
    return number

def join(name=None):
    """(device, rank, world): the device called `name`, or the best one here; under torchrun the
    number of this process, which joins the others, and how many they are. Raises Fault."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = name or str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with blame(f"--device {name}"):
        device = torch.empty(0, device=name).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():  # some wait long while others encode
        dist.init_process_group(timeout=datetime.timedelta(days=1))
    return device, rank, world

def total(tensor):
    """The sum over all processes, each of which waits for the others."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor

@contextlib.contextmanager
def atomic(path):
    """Opens a temporary file that becomes `path` if the block succeeds and is removed otherwise."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        cause = error.__context__ or error  # torch.save hides a full disk behind its own error
        if isinstance(cause, OSError):
            raise Fault(f"cannot write {path}: {cause.strerror}") from None
        raise

def load_file(path, mmap=False):
    """What torch.save wrote: tensors and plain values, never pickled code. Raises Fault."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError  # of the check sums, which torch.load does not compare
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        reason = getattr(error, "strerror", None) or "it is damaged or no checkpoint"
        raise Fault(f"cannot read {path}: {reason}") from None

def load(path, device="cpu", steps=1):
    """(net, info) from our own checkpoint (its EMA weights) or from the authors' released weights.

    info holds the settings of the training, `vae` ("none" for pixels), and omega, t_min, t_max:
    the guidance that suits it in so many steps. Raises Fault if the file is no such thing.
    """
    saved = load_file(path, mmap=True)
    with blame(f"cannot use {path} as weights of iMF"):
        if "ema" in saved:
            info = {"vae": "none", **saved["settings"], "step": saved["step"]}
            if type(info["image_size"]) is not int or not 1 <= info["image_size"] <= 1024:
                raise ValueError(f"image size {info['image_size']}")
            net = model.from_state(saved["ema"], info["image_size"])
        else:
            net, info = model.from_official(saved), {"vae": VAE_NAME}
        if not all(p.isfinite().all() for p in net.parameters()):
            raise ValueError("some of its weights are not finite")
        depth = len(net.shared_blocks) + len(net.u_heads)
        advised = {} if info["vae"] == "none" else ADVISED if steps == 1 else ADVISED_IN_STEPS
        guidance = dict(zip(("omega", "t_min", "t_max"), advised.get(depth, GUIDANCE)))
        return net.to(device).eval(), {**guidance, **info}

class VAE:
    """Images (B, 3, 8 h, 8 w) to latents (B, 4, h, w) and back: an AutoencoderKL. Raises Fault.

    name: a folder or a model on the Hugging Face hub, with safetensors; digest: of its weights.
    """

    def __init__(self, name, device="cpu"):
        import diffusers  # takes seconds, and who draws pixels does not need it
        with blame(f"--vae {name}"):
            net = diffusers.AutoencoderKL.from_pretrained(
                name, use_safetensors=True, low_cpu_mem_usage=False)
        weights = b"".join(p.detach().numpy().tobytes() for p in net.parameters())
        self.digest = hashlib.sha256(weights).hexdigest()
        channels, factor = net.config.latent_channels, 2 ** (len(net.config.block_out_channels) - 1)
        if (channels, factor) != (4, 8):
            raise Fault(f"--vae {name} has {channels} channels of 1/{factor} size, not 4 of 1/8")
        self.net = net.to(device).eval().requires_grad_(False)
        self.mean, self.std = LATENT_MEAN.to(device), LATENT_STD.to(device)

    def encode(self, images):
        """The posteriors of uint8 (B, 3, 8 h, 8 w): mean and deviation, float16 (B, 8, h, w)."""
        parts = torch.from_numpy(images).to(self.mean.device).split(16)
        posteriors = [self.net.encode(part / 127.5 - 1).latent_dist for part in parts]
        return torch.cat([torch.cat((p.mean, p.std), 1) for p in posteriors]).half().cpu().numpy()

    def decode(self, x):
        """The images of normalised latents x, in [-1, 1]."""
        parts = (x * self.std + self.mean).split(16)
        return torch.cat([self.net.decode(part).sample for part in parts])

def generate(net, numbers, classes, seed=0, batch_size=64, vae=None, **guidance):
    """Yields batches of images, uint8 (b, C, H, W): number i is of class classes[i % len(classes)].

    vae: the VAE of one that draws latents. guidance: steps, omega, t_min, t_max of imf.sample.
    """
    device = next(net.parameters()).device
    shape = net.channels, net.image_size, net.image_size
    for start in range(0, len(numbers), batch_size):
        part = numbers[start:start + batch_size]
        noise = [np.random.default_rng((seed, i)).standard_normal(shape, np.float32) for i in part]
        y = torch.tensor([classes[i % len(classes)] for i in part], device=device)
        x = imf.sample(net, torch.from_numpy(np.stack(noise)).to(device), y, **guidance)
        x = vae.decode(x) if vae else x
        yield (x * 127.5 + 127.5).round().clamp(0, 255).byte().cpu().numpy()

def picture(image):
    """A PIL image of uint8 (C, H, W); grey for C = 1."""
    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))

def write_sheet(path, pictures, columns):
    """One PNG of many PIL images, row by row; small ones are enlarged."""
    pictures = list(pictures)
    size = pictures[0].width * max(1, 64 // pictures[0].width)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (size + 2) - 2, rows * (size + 2) - 2))
    for i, tile in enumerate(pictures):
        place = i % columns * (size + 2), i // columns * (size + 2)
        sheet.paste(tile.resize((size, size), Image.NEAREST), place)
    with atomic(path) as file:
        sheet.save(file, "PNG")

def write_npz(path, pictures, labels):
    """arr_0 uint8 (N, H, W, 3), written as it comes, and arr_1 the labels: the format of ADM."""
    first = next(pictures)
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *first.size[::-1], 3)}
    with atomic(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for image in tqdm(itertools.chain([first], pictures), "packing", len(labels)):
                member.write(image.tobytes())
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, labels)

def write_folder(folder, made_of, num, draw, rank=0, world=1):
    """000000.png, ... in `folder`, every world-th by this process; draw(numbers) yields batches.

    Those that are there from an earlier start stay. Raises Fault if that was made of other things.
    """
    note = folder / ".made-of"
    if rank == 0:
        same = note.exists() and note.read_text() == made_of
        if note.exists() and not same and folder.suffix == ".part":
            shutil.rmtree(folder)  # left over from another start
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not same:
            raise Fault(f"{folder} holds something else already: remove it or choose another --out")
        with atomic(note) as file:
            file.write(made_of.encode())
    total(torch.zeros(1))
    todo = [i for i in range(rank, num, world) if not (folder / f"{i:06d}.png").exists()]
    images = tqdm(itertools.chain.from_iterable(draw(todo)), total=len(todo), unit=" images",
                  disable=rank > 0)
    for image, i in zip(images, todo):  # in this order the bar ends at 100 %
        with atomic(folder / f"{i:06d}.png") as file:
            picture(image).save(file, "PNG")
    total(torch.zeros(1))

def main():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = p.add_argument
    flag("checkpoint", nargs="?", default="out/last.pt", help="default: out/last.pt")
    flag("--steps", type=number(int, 1, 1000), default=1, help="network evaluations per image")
    flag("--omega", type=number(float, 1e-6), nargs="+", metavar="W", help="scales, a row each")
    flag("--interval", type=number(float, 0, 1), nargs=2, metavar=("LO", "HI"),
         help="the times at which guidance acts, within 0 1")
    flag("--classes", type=number(int, 0), nargs="+", metavar="C", help="in turn; default: all")
    flag("--num", type=number(int, 1), help="images (for each omega); default 100, or 10")
    flag("--seed", type=number(int, 0), default=0, help="of the noise; default: 0")
    flag("--batch-size", type=number(int, 1), default=64, help="images at a time; default: 64")
    flag("--vae", help="folder or name of the VAE that decodes latents; or none")
    flag("--device", help="cpu, cuda, cuda:1, mps; default: the best one here")
    flag("--out", metavar="FILE.png|FOLDER|FILE.npz", help="default: samples.png by the checkpoint")
    args = p.parse_args()

    device, rank, world = join(args.device)
    net, info = load(args.checkpoint, device, args.steps)
    out = args.out or os.path.join(os.path.dirname(args.checkpoint), "samples.png")
    kind = "" if os.path.isdir(out) or out.endswith("/") else os.path.splitext(out)[1].lower()
    omegas = args.omega or [info["omega"]]
    t_min, t_max = args.interval or (info["t_min"], info["t_max"])
    classes = args.classes or list(range(net.num_classes))
    num = args.num or (100 if len(omegas) == 1 else 10)
    every = num * len(omegas)
    name = args.vae or info["vae"]
    if kind not in (".png", ".npz", ""):
        raise Fault(f"--out {out}: end it in .png or .npz, or a folder's name in /")
    if kind == ".png" and every > 10_000:
        raise Fault("a sheet holds at most 10,000 images: let --out be a folder or end in .npz")
    if t_min > t_max:
        raise Fault(f"--interval {t_min} {t_max}: the lower end comes first")
    if max(classes) >= net.num_classes:
        raise Fault(f"--classes {max(classes)}: this network knows 0 to {net.num_classes - 1}")
    if (name == "none") == (net.channels == 4):
        raise Fault(f"{args.checkpoint} draws {net.channels} channels: 4 need a --vae, others none")
    vae = None if name == "none" else VAE(name, device)

    def draw(numbers):  # of all omegas, in turn
        for k, omega in enumerate(omegas):
            yield from generate(net, [i - k * num for i in numbers if i // num == k], classes,
                                args.seed, args.batch_size, vae, steps=args.steps, omega=omega,
                                t_min=t_min, t_max=t_max)

    file = os.stat(args.checkpoint)
    made_of = repr((file.st_size, file.st_mtime_ns, name, args.steps, omegas, t_min, t_max, classes,
                    args.seed, every > num and num))
    folder = Path(out + ".part" if kind else out)
    write_folder(folder, made_of, every, draw, rank, world)
    if rank == 0:
        pictures = (Image.open(folder / f"{i:06d}.png").convert("RGB") for i in range(every))
        if kind == ".png":
            write_sheet(out, pictures, 10 if len(omegas) == 1 else num)
        if kind == ".npz":
            labels = [classes[i % num % len(classes)] for i in range(every)]
            write_npz(out, pictures, np.array(labels))
        if kind:
            shutil.rmtree(folder)
        print(f"wrote {out}")

if __name__ == "__main__":
    run(main)
