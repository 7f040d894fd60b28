"""Draw images with a trained network, in one evaluation each.

    python sample.py                                           10 x 10 digits from out/last.pt
    python sample.py --omega 1 2 4 8 --out omegas.png          one row for each guidance scale
    python sample.py --classes 3 7 --num 1000 --out threes/    a folder of PNGs
    python sample.py --num 50000 --out images.npz              what evaluation suites read

Image i is made from noise that depends on (seed, i) alone: neither the batch size, nor the
number of images, nor their order changes it.
"""

import argparse
import contextlib
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import imf
import model

# How a network is asked to draw where nothing is said.
GUIDANCE = dict(omega=2.0, t_min=0.0, t_max=1.0)


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
        raise Fault(f"{what}: {(str(error).strip() or repr(error)).splitlines()[0]}") from None


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
            error = "out of memory: a smaller --batch-size needs less, and so does a larger --accum"
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(2)


def number(kind, low, high=10**12):
    """An argparse type: an int or float from low to high."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    return number


def pick_device(name=None):
    """The torch device called `name`, or the best one here for None. Raises Fault without it."""
    name = name or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with blame(f"--device {name}"):
        return torch.empty(0, device=name).device


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
            raise ValueError  # torch.load does not compare the check sums
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise Fault(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:
        raise Fault(f"{path} is damaged or no checkpoint ({type(error).__name__})") from None


def load(path, device="cpu"):
    """(net, info) from our own checkpoint (its EMA weights) or from the authors' released weights.

    info holds the settings of the training, and omega, t_min, t_max: its usual guidance.
    Raises Fault if the file is missing, damaged or something else.
    """
    saved = load_file(path, mmap=True)
    with blame(f"cannot use {path}"):
        if "ema" in saved:
            info = dict(saved["settings"], step=saved["step"])
            if type(info["image_size"]) is not int or not 1 <= info["image_size"] <= 1024:
                raise ValueError(f"image size {info['image_size']}")
            net = model.from_state(saved["ema"], info["image_size"])
        else:
            net, info = model.from_official(saved), {}
        if not all(p.isfinite().all() for p in net.parameters()):
            raise ValueError("some of its weights are not finite")
        return net.to(device).eval(), {**GUIDANCE, **info}


def generate(net, indices, classes, seed=0, batch_size=64, **guidance):
    """Yields batches of images, uint8 (b, C, H, W): number i is of class classes[i % len(classes)].

    guidance: steps, omega, t_min, t_max of imf.sample.
    """
    device = next(net.parameters()).device
    shape = net.channels, net.image_size, net.image_size
    for start in range(0, len(indices), batch_size):
        part = indices[start:start + batch_size]
        noise = [np.random.default_rng((seed, i)).standard_normal(shape, np.float32) for i in part]
        y = torch.tensor([classes[i % len(classes)] for i in part], device=device)
        x = imf.sample(net, torch.from_numpy(np.stack(noise)).to(device), y, **guidance)
        yield (x * 127.5 + 127.5).round().clamp(0, 255).byte().cpu().numpy()


def picture(image):
    """A PIL image of uint8 (C, H, W); grey for C = 1."""
    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))


def write_sheet(path, images, columns):
    """One PNG of all the images, uint8 (N, C, H, W), row by row; small ones are enlarged."""
    size = images.shape[2] * max(1, 64 // images.shape[2])
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (size + 2) - 2, rows * (size + 2) - 2))
    for i, image in enumerate(images):
        tile = picture(image).resize((size, size), Image.NEAREST)
        sheet.paste(tile, (i % columns * (size + 2), i // columns * (size + 2)))
    with atomic(path) as file:
        sheet.save(file, "PNG")


def write_folder(path, batches):
    """000000.png, 000001.png, ... in the folder `path`, which must be new or empty."""
    os.makedirs(path, exist_ok=True)
    if os.listdir(path):
        raise Fault(f"--out {path}: the folder is not empty, and other images would mix with these")
    for i, image in enumerate(image for batch in batches for image in batch):
        with atomic(os.path.join(path, f"{i:06d}.png")) as file:
            picture(image).save(file, "PNG")


def write_npz(path, batches, labels, image_size):
    """arr_0 uint8 (N, H, W, 3), written as it comes, and arr_1 the labels: the format of ADM."""
    header = {"descr": "|u1", "fortran_order": False,
              "shape": (len(labels), image_size, image_size, 3)}
    with atomic(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for images in batches:
                images = images.transpose(0, 2, 3, 1)
                member.write(np.broadcast_to(images, (*images.shape[:3], 3)).tobytes())
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, labels)


def main():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", nargs="?", default="out/last.pt", help="default: out/last.pt")
    p.add_argument("--steps", type=number(int, 1), default=1, help="network evaluations per image")
    p.add_argument("--omega", type=number(float, 1e-6), nargs="+", metavar="W",
                   help="guidance scale; several make a row of the sheet each")
    p.add_argument("--interval", type=number(float, 0, 1), nargs=2, metavar=("LO", "HI"),
                   help="the times at which guidance acts, within 0 1")
    p.add_argument("--classes", type=number(int, 0), nargs="+", metavar="C",
                   help="taken in turn; default: all")
    p.add_argument("--num", type=number(int, 1), help="images (for each omega); default 100, or 10")
    p.add_argument("--seed", type=number(int, 0), default=0)
    p.add_argument("--batch-size", type=number(int, 1), default=64)
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: the best one here")
    p.add_argument("--out", metavar="FILE.png|FOLDER|FILE.npz",
                   help="default: samples.png beside the checkpoint")
    args = p.parse_args()

    net, info = load(args.checkpoint, pick_device(args.device))
    out = args.out or os.path.join(os.path.dirname(args.checkpoint), "samples.png")
    kind = "" if os.path.isdir(out) or out.endswith("/") else os.path.splitext(out)[1].lower()
    omegas = args.omega or [info["omega"]]
    t_min, t_max = args.interval or (info["t_min"], info["t_max"])
    classes = args.classes or range(net.num_classes)
    num = args.num or (100 if len(omegas) == 1 else 10)
    if kind not in (".png", ".npz", ""):
        raise Fault(f"--out {out}: end it in .png or .npz, or a folder's name in /")
    if kind != ".png" and len(omegas) > 1:
        raise Fault("several --omega make a sheet: let --out end in .png")
    if kind == ".png" and num * len(omegas) > 10_000:
        raise Fault("a sheet holds at most 10,000 images: let --out be a folder or end in .npz")
    if t_min > t_max:
        raise Fault(f"--interval {t_min} {t_max}: the lower end comes first")
    if max(classes) >= net.num_classes:
        raise Fault(f"--classes {max(classes)}: this network knows 0 to {net.num_classes - 1}")
    if net.channels not in (1, 3):
        raise Fault(f"{args.checkpoint} draws {net.channels} channels, which are no image")

    def batches(bar):
        for omega in omegas:
            for images in generate(net, range(num), classes, args.seed, args.batch_size,
                                   steps=args.steps, omega=omega, t_min=t_min, t_max=t_max):
                yield images
                bar.update(len(images))

    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    with tqdm(total=len(omegas) * num, unit=" images") as bar:
        if kind == ".png":
            write_sheet(out, np.concatenate(list(batches(bar))), 10 if len(omegas) == 1 else num)
        elif kind == ".npz":
            labels = np.array([classes[i % len(classes)] for i in range(num)])
            write_npz(out, batches(bar), labels, net.image_size)
        else:
            write_folder(out, batches(bar))
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main)
