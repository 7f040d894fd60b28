"""Draw images with a trained network, in one evaluation each.

    python sample.py                                           10 x 10 digits from out/last.pt
    python sample.py --omega 1 2 4 8 --out omegas.png          a row for each scale; so with --steps
    python sample.py --classes 3 --num 1000 --out threes/      a folder of PNGs
    python sample.py iMF-XL-2.pth --classes 207 88             the authors' weights, with their VAE
    torchrun --nproc-per-node=8 -- sample.py iMF-XL-2.pth --num 50000 --out images.npz

Image i is made from noise that depends on (seed, i) alone: neither the number of images or of
processes nor their order changes it.
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
import warnings
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

GROUP = 8  # images at a time, always: results of other sizes would be rounded differently

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
        reason = getattr(error, "strerror", None) or str(error) or repr(error)
        raise Fault(f"{what}: {' '.join(reason.split())[:200]}") from None

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Fault(message)

def run(main):
    """Runs a command line: a Fault is one line on stderr and exit status 2, Ctrl-C is silent."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        rank = os.environ.get("RANK", "0") != "0"
        if rank or dist.is_initialized() and not isinstance(error, (Fault, OSError)):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)  # if another process says why, torchrun ends us meanwhile
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            error = Fault("out of memory: in training --accum needs less, elsewhere a smaller size")
        if not isinstance(error, (Fault, OSError)):
            raise
        line = f"{os.path.basename(sys.argv[0])}: {error}"
        print("\n" * rank + line, file=sys.stderr, flush=True)  # below the bar of rank 0
        sys.exit(2)

def number(kind, low, high=10**12):
    """An argparse type: an int or float from low to high."""
    def number(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
    return number

def join(name=None):
    """(device, rank, world): the device called `name`, or the best one here; under torchrun the
    number of this process, which joins the others, and how many they are. Raises Fault."""
    with blame("RANK and WORLD_SIZE, which torchrun sets"):
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if not 0 <= rank < world:
            raise ValueError(f"{rank} of {world}")
    name = name or str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with blame(f"--device {name}"):
        device = torch.empty(0, device=name).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        with blame("cannot join the other processes"):  # some wait long while others encode
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
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it
        if isinstance(cause, OSError):
            raise Fault(f"cannot write {path}: {cause.strerror or cause}") from None
        raise

def files(folder):
    """All files below a folder, sorted, but for hidden ones. Raises Fault if there are none."""
    found = sorted(os.path.join(where, name) for where, _, names in os.walk(folder)
                   for name in names if "/." not in f"{where}/{name}"[len(str(folder)):]
                   and os.path.isfile(f"{where}/{name}"))
    if not found:
        raise Fault(f"{folder}: no such folder, or an empty one")
    return found

def open_image(path):
    """A picture as PIL RGB: 16 bits become 8, what is transparent white. It may raise anything."""
    with Image.open(path) as image:
        if image.mode in ("I", "F"):
            raise ValueError("black and white are anyone's guess")
        if image.mode.startswith("I;16"):  # Pillow would clip it
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")

def load_file(path):
    """What torch.save wrote: tensors and plain values, never pickled code. Raises Fault."""
    try:
        zipped = zipfile.is_zipfile(path)  # all but very old files
        if zipped and zipfile.ZipFile(path).testzip():
            raise ValueError  # of the check sums, which torch.load does not compare
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        system = getattr(error, "filename", None)  # not torch, reading beyond the end
        reason = error.strerror if system else "it is damaged or no checkpoint"
        raise Fault(f"cannot read {path}: {reason}") from None

def load(path, device="cpu"):
    """(net, info) from our own checkpoint (its EMA weights) or from the authors' released weights.

    info: the settings of the training; its `vae` is "none" for pixels. Raises Fault.
    """
    saved = load_file(path)
    with blame(f"cannot use {path} as weights of iMF"):
        if "ema" in saved:
            info = {"vae": "none", **saved["settings"], "step": saved["step"]}
            net = model.from_state(saved["ema"], int.__index__(info["image_size"]))
        else:
            net, info = model.from_official(saved), {"vae": VAE_NAME}
        if not all(p.isfinite().all() for p in net.parameters()):
            raise ValueError("some of its weights are not finite")
        return net.to(device).eval(), info

class VAE:
    """Images (B, 3, 8 h, 8 w) to latents (B, 4, h, w) and back: an AutoencoderKL. Raises Fault.

    name: a folder or a model on the Hugging Face hub, with safetensors; digest: of its weights.
    """

    def __init__(self, name, device="cpu"):
        os.environ.update(HF_HUB_VERBOSITY="error", DIFFUSERS_VERBOSITY="critical")  # we say it
        warnings.filterwarnings("ignore", module="huggingface_hub")
        import diffusers  # takes seconds, and who draws pixels does not need it
        with blame(f"--vae {name} cannot be had, neither as a folder nor from the hub"):
            net = diffusers.AutoencoderKL.from_pretrained(
                name, use_safetensors=True, low_cpu_mem_usage=False)
        weights = b"".join(p.detach().numpy().tobytes() for p in net.parameters())
        self.digest = hashlib.sha256(weights).hexdigest()
        channels, factor = net.config.latent_channels, 2 ** (len(net.config.block_out_channels) - 1)
        if (net.config.in_channels, channels, factor) != (3, 4, 8):
            raise Fault(f"--vae {name}: {channels} channels at 1/{factor}, not 4 at 1/8 of RGB")
        self.net = net.to(device).eval().requires_grad_(False)
        self.mean, self.std = LATENT_MEAN.to(device), LATENT_STD.to(device)

    def encode(self, images):
        """The posteriors of uint8 (B, 3, 8 h, 8 w): mean and deviation, float16 (B, 8, h, w)."""
        images = torch.from_numpy(images).to(self.mean.device) / 127.5 - 1
        posterior = self.net.encode(images).latent_dist
        return torch.cat((posterior.mean, posterior.std), 1).half().cpu().numpy()

    def decode(self, x):
        """The images of normalised latents x, in [-1, 1]."""
        return self.net.decode(x * self.std + self.mean).sample

def options(parser):
    """The flags of whatever draws images."""
    flag = parser.add_argument
    flag("--steps", type=number(int, 1, 1000), nargs="+", metavar="N", default=[1],
         help="network evaluations per image; default: 1")
    flag("--omega", type=number(float, 1e-6), nargs="+", metavar="W", help="guidance scales")
    flag("--interval", type=number(float, 0, 1), nargs=2, metavar=("LO", "HI"), action="append",
         help="the times at which guidance acts, within 0 1; may come again")
    flag("--seed", type=number(int, 0), default=0, help="of the noise; default: 0")
    flag("--vae", help="folder or name of the VAE that decodes latents; or none")
    flag("--device", help="cpu, cuda, cuda:1, mps; default: the best one here")

def prepare(path, args, device):
    """(net, vae or None, settings of imf.sample) of a checkpoint and what `options` read. The
    settings: each number of steps with each omega and interval, or the advised. Raises Fault."""
    net, info = load(path, device)
    name = args.vae or info["vae"]
    if (name == "none") == (net.channels == 4):
        raise Fault(f"{path} draws {net.channels} channels: 4 need a --vae, others none")
    depth, settings = len(net.shared_blocks) + len(net.u_heads), []
    for steps in args.steps:
        advised = {} if name == "none" else ADVISED if steps == 1 else ADVISED_IN_STEPS
        omega, *interval = advised.get(depth, GUIDANCE)
        settings += [dict(steps=steps, omega=w, t_min=low, t_max=high)
                     for w in args.omega or [omega] for low, high in args.interval or [interval]]
    if any(row["t_min"] > row["t_max"] for row in settings):
        raise Fault("--interval LO HI: the lower end comes first")
    return net, None if name == "none" else VAE(name, device), settings

def generate(net, numbers, classes, seed=0, vae=None, **guidance):
    """Yields batches of images, uint8 (b, C, H, W): number i is of class classes[i % len(classes)].

    vae: the VAE of one that draws latents. guidance: steps, omega, t_min, t_max of imf.sample.
    """
    device = next(net.parameters()).device
    shape = net.channels, net.image_size, net.image_size
    for start in range(0, len(numbers), GROUP):
        part = numbers[start:start + GROUP]
        full = [*part, *[part[0]] * (GROUP - len(part))]
        noise = [np.random.default_rng((seed, i)).standard_normal(shape, np.float32) for i in full]
        y = torch.tensor([classes[i % len(classes)] for i in full], device=device)
        x = imf.sample(net, torch.from_numpy(np.stack(noise)).to(device), y, **guidance)
        x = vae.decode(x) if vae else x
        yield (x * 127.5 + 127.5).round().clamp(0, 255).byte()[:len(part)].cpu().numpy()

def picture(image):
    """A PIL image of uint8 (C, H, W); grey for C = 1."""
    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))

def write_sheet(path, pictures, columns):
    """One PNG of a list of PIL images, row by row; small ones are enlarged."""
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

def main():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", nargs="?", default="out/last.pt", help="default: out/last.pt")
    options(p)
    p.add_argument("--classes", type=number(int, 0), nargs="+", metavar="C", help="default: all")
    p.add_argument("--num", type=number(int, 1), help="images a row; default: 100, of many rows 10")
    p.add_argument("--out", metavar="FILE.png|FOLDER|FILE.npz",
                   help="default: samples.png by the checkpoint")
    args = p.parse_args()

    device, rank, world = join(args.device)
    net, vae, rows = prepare(args.checkpoint, args, device)
    classes = args.classes or list(range(net.num_classes))
    num = args.num or (100 if len(rows) == 1 else 10)
    out = Path(args.out or Path(args.checkpoint).with_name("samples.png"))
    kind = "" if out.is_dir() or (args.out or "").endswith("/") else out.suffix.lower()
    every = range(num * len(rows))
    if kind not in (".png", ".npz", ""):
        raise Fault(f"--out {out}: end it in .png or .npz, or a folder's name in /")
    if kind == ".png" and len(every) > 10_000:
        raise Fault("a sheet holds at most 10,000 images: let --out be a folder or end in .npz")
    if not kind and out.exists() and any(out.iterdir()):
        raise Fault(f"{out} holds something already: remove it or choose another --out")
    if max(classes) >= net.num_classes:
        raise Fault(f"--classes {max(classes)}: this network knows 0 to {net.num_classes - 1}")

    # A start with the same arguments completes what an earlier one drew.
    file = os.stat(args.checkpoint)
    key = repr((file.st_size, file.st_mtime_ns, args.vae, rows, classes, args.seed, num))
    part = Path(f"{out}.{hashlib.sha256(key.encode()).hexdigest()[:8]}.part")
    part.mkdir(parents=True, exist_ok=True)
    todo = [i for i in every[rank::world] if not (part / f"{i:06d}.png").exists()]
    batches = (batch for k, row in enumerate(rows) for batch in generate(
        net, [i % num for i in todo if i // num == k], classes, args.seed, vae, **row))
    images = itertools.chain.from_iterable(batches)
    bar = tqdm(images, total=len(todo), unit=" images", disable=rank > 0)
    for image, i in zip(bar, todo):  # in this order the bar ends at 100 %
        with atomic(part / f"{i:06d}.png") as file:
            picture(image).save(file, "PNG")
    total(torch.zeros(1))
    if rank == 0:
        pictures = (Image.open(part / f"{i:06d}.png").convert("RGB") for i in every)
        if kind == ".png":
            write_sheet(out, list(pictures), 10 if len(rows) == 1 else num)
        elif kind == ".npz":
            write_npz(out, pictures, np.array([classes[i % num % len(classes)] for i in every]))
        else:
            part.replace(out)
        shutil.rmtree(part, ignore_errors=True)
        print(f"wrote {out}")

if __name__ == "__main__":
    run(main)
