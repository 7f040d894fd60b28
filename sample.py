"""Sample images from a trained network, in one evaluation each.

    python sample.py                                           100 images from out/last.pt
    python sample.py --omega 1 2 4 8 --out omegas.png          one row per guidance scale
    python sample.py iMF-XL-2.pth --classes 207 88             the authors' weights, with their VAE
    torchrun --nproc-per-node=8 -- sample.py iMF-XL-2.pth --num 50000 --out images.npz

The noise of image i depends on (seed, i) alone, not on the number of images or of processes."""

import argparse, contextlib, datetime, glob, math, os, sys, textwrap, zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from tqdm import tqdm

import imf, model

# omega, t_min, t_max that the authors recommend for latents, by depth
RECOMMENDED = {12: (8, 0.4, 0.65), 24: (10.5, 0.4, 0.6), 32: (10.5, 0.4, 0.6), 48: (8, 0.42, 0.62)}

# the paper's VAE, and the mean and standard deviation of each channel of its latents of ImageNet
VAE = "stabilityai/sd-vae-ft-mse"
LATENT_MEAN = torch.tensor([0.86488, -0.27787343, 0.21616915, 0.3738409]).view(-1, 1, 1)
LATENT_STD = torch.tensor([4.85503674, 5.31922414, 3.93725398, 3.9870003]).view(-1, 1, 1)


@torch.no_grad()
def generate(net, numbers, classes, seed=0, vae=None, **guidance):
    """Yields batches of up to 32 images, uint8 (b, 3, H, W); number i has class classes[i % len].
    vae decodes latents. guidance: steps, omega, t_min, t_max of imf.sample; else as recommended."""
    guidance = recommended(net, vae) | guidance
    device = next(net.parameters()).device
    shape = net.channels, net.image_size, net.image_size
    for start in range(0, len(numbers), 32):
        part = numbers[start:start + 32]
        noise = [np.random.default_rng((seed, i)).standard_normal(shape, np.float32) for i in part]
        y = torch.tensor([classes[i % len(classes)] for i in part], device=device)
        x = imf.sample(net, torch.from_numpy(np.stack(noise)).to(device), y, **guidance)
        if vae:
            x = x * LATENT_STD.to(device) + LATENT_MEAN.to(device)
            x = torch.cat([vae.decode(few).sample for few in x.split(8)])
        x = x.expand(-1, 3, -1, -1).float() * 127.5 + 127.5
        yield x.round().clamp(0, 255).byte().cpu().numpy()


def recommended(net, latents):
    """The default {"omega", "t_min", "t_max"}: the authors' for their networks, else ours."""
    depth = len(net.shared_blocks) + len(net.u_heads) if latents else 0
    return dict(zip(("omega", "t_min", "t_max"), RECOMMENDED.get(depth, (3, 0.4, 0.75))))


def load(path, device="cpu"):
    """(net, info) of our own checkpoint (its EMA weights) or of the authors' released weights; info
    has the settings of the training, "vae" ("none": pixels), "classes". Raises ValueError."""
    with reading(path, "expected weights of iMF, tensors without code"):
        saved = load_file(path)
        if "ema" in saved:
            info = {**saved["settings"], "step": saved["step"]}
            net = model.from_state(saved["ema"], int(info["image_size"]), info["predict"])
        else:
            net = model.from_official(saved)
            info = {"vae": VAE, "classes": [str(k) for k in range(net.num_classes)]}
        return net.to(device).eval(), info


def load_file(path):
    """What torch.save wrote: tensors and plain values, never code. Use inside reading()."""
    mapped = os.name == "posix" and zipfile.is_zipfile(path)
    return torch.load(path, "cpu", weights_only=True, mmap=mapped)


def load_vae(name, device="cpu"):
    """An AutoencoderKL of diffusers, a folder or on the hub, in safetensors. Raises ValueError."""
    from diffusers import AutoencoderKL  # takes seconds, and pixels do not need it
    with reading(f"--vae {name}", "the hub is out of reach, or has no VAE of it in safetensors"):
        vae = AutoencoderKL.from_pretrained(name, use_safetensors=True, low_cpu_mem_usage=False)
        if (vae.config.latent_channels, len(vae.config.block_out_channels)) != (4, 4):
            raise ValueError("it must have 4 channels of latents at 1/8 of the image's size")
    return vae.to(device).eval().requires_grad_(False)


def write(path, images, labels, columns):
    """Images uint8 (N, 3, H, W) as an .npz in ADM's format, a folder, or a sheet, row by row."""
    if path.suffix == ".npz":
        np.savez(path, arr_0=images.transpose(0, 2, 3, 1), arr_1=labels)
    elif path.suffix == "":
        path.mkdir()
        for number, image in enumerate(tqdm(images, "writing", unit=" images")):
            Image.fromarray(image.transpose(1, 2, 0)).save(path / f"{number:06d}.png")
    else:
        zoom = max(1, 64 // images.shape[3])  # small images are enlarged
        images = np.pad(images, ((0, -len(images) % columns), (0, 0), (1, 1), (1, 1)))
        rows = images.reshape(-1, columns, *images.shape[1:])  # (rows, columns, 3, H + 2, W + 2)
        sheet = rows.transpose(0, 3, 1, 4, 2).reshape(len(rows) * rows.shape[3], -1, 3)
        Image.fromarray(sheet.repeat(zoom, 0).repeat(zoom, 1)).save(path)


def interleave(rows):
    """On process 0 the rows of all: row i of process k of n becomes row i n + k. Equal shapes."""
    rows = torch.as_tensor(rows).contiguous()
    if not dist.is_initialized():
        return rows
    parts = None if dist.get_rank() else [rows.clone() for _ in range(dist.get_world_size())]
    dist.gather(rows, parts)
    return torch.stack(parts, 1).flatten(0, 1) if parts else rows[:0]


def main():
    parser = command_line(__doc__)
    flag = parser.add_argument
    flag("checkpoint", nargs="?", default="out/last.pt", help="default: out/last.pt")
    flag("--steps", type=count, default=1, metavar="N", help="evaluations per image; default: 1")
    flag("--omega", type=positive, nargs="+", metavar="W", help="guidance scales; pixels: 3")
    flag("--interval", type=float, nargs=2, metavar=("LO", "HI"), help="guided t; pixels: 0.4 0.75")
    flag("--classes", type=int, nargs="+", metavar="C", help="default: all")
    flag("--num", type=count, metavar="N", help="images per scale; default: 100, or 10 each")
    flag("--seed", type=int, default=0, metavar="N", help="of the noise; default: 0")
    flag("--out", help="FILE.png, FILE.npz or a new FOLDER; default: samples.png beside CHECKPOINT")
    args = parser.parse_args()
    out = Path(args.out or Path(args.checkpoint).with_name("samples.png"))
    if out.suffix not in ("", ".png", ".npz") or out.is_dir() or (out.exists() and not out.suffix):
        raise ValueError(f"--out {out}: expected FILE.png, FILE.npz or a new FOLDER")
    if args.interval and not 0 <= args.interval[0] <= args.interval[1] <= 1:
        raise ValueError("--interval LO HI: expected 0 <= LO <= HI <= 1")

    # the network, its VAE and the guidance
    device, rank, world = join(args.device)
    net, info = load(args.checkpoint, device)
    vae = None if info["vae"] == "none" else load_vae(info["vae"], device)
    guidance = recommended(net, vae) | {"steps": args.steps}
    omegas = args.omega or [guidance["omega"]]
    if args.interval:
        guidance["t_min"], guidance["t_max"] = args.interval

    # the classes: if there are fewer images, they are spread over all of them
    classes = args.classes or range(net.num_classes)
    if not 0 <= min(classes) <= max(classes) < net.num_classes:
        raise ValueError(f"--classes: this network has {listed(dict(enumerate(info['classes'])))}")
    num = args.num or (100 if len(omegas) == 1 else 10)
    if num < len(classes):
        classes = [classes[k * len(classes) // num] for k in range(num)]
    print(f"{num * len(omegas)} images of {listed({k: info['classes'][k] for k in classes})}")

    # for each omega process k of n samples every n-th image, and all of them equally many
    numbers = range(rank, math.ceil(num / world) * world, world)
    side = net.image_size * (8 if vae else 1)
    images = np.empty((len(omegas), num, 3, side, side), np.uint8)
    with tqdm(total=num * len(omegas), unit=" images", disable=rank > 0) as bar:
        for row, omega in zip(images, omegas):
            guidance["omega"], done = omega, 0
            for batch in generate(net, numbers, classes, args.seed, vae, **guidance):
                batch = interleave(batch)[:num - done].numpy()
                row[done:done + len(batch)] = batch
                done += len(batch)
                bar.update(len(batch))
    if rank == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        labels = [classes[k % len(classes)] for k in range(num)] * len(omegas)
        write(out, images.reshape(-1, 3, side, side), labels, 10 if len(omegas) == 1 else num)
        print(f"wrote {out}")


def command_line(doc):
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    parser.add_argument("--device", choices=sorted({"cpu", best.type}), default=best.type)
    return parser


def count(text):
    positive(text)
    return int(text)


def positive(text):
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, not {text}")
    return float(text)


def run(main):
    """Runs a command line: what a user can mend is one line on stderr and exit status 2."""
    try:
        main()
    except (KeyboardInterrupt, ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        message = " ".join(str(error).split()) or f"stopped ({type(error).__name__})"
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def reading(path, expected):
    """What a damaged or foreign file raises becomes a ValueError, less torch's unsafe advice."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):  # no fault of the file
        raise
    except Exception as error:
        reason = textwrap.shorten(f"{error}".split(" failed. ")[0], 300) or type(error).__name__
        raise ValueError(f"cannot read {path}: {expected} ({reason})") from error


def listed(names):
    numbered = ", ".join(f"{k} {name}" for k, name in names.items())
    return f"{len(names)} classes: {textwrap.shorten(numbered, 300, placeholder=' ...')}"


def join(device):
    """(device, rank, world) of this process, which joins the others if torchrun started it."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_float32_matmul_precision("high")  # TF32
    if "RANK" not in os.environ:
        return device, 0, 1
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))
    if dist.get_rank() > 0:  # the first process speaks for all
        sys.stdout = open(os.devnull, "w")
    return device, dist.get_rank(), dist.get_world_size()


def images_in(folder):
    """The paths of all pictures below a folder, sorted, hidden ones apart. Raises ValueError."""
    readable = [end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN]
    paths = sorted(glob.iglob(os.path.join(glob.escape(str(folder)), "**", "*"), recursive=True))
    found = [path for path in paths if path.lower().endswith(tuple(readable))]
    others = [path for path in set(paths) - set(found) if os.path.isfile(path)]
    if others:
        print(f"skipped {len(others)} files that Pillow cannot read, such as {min(others)}")
    if not found:
        raise ValueError(f"{folder}: no such folder, or no pictures in it")
    return found


def open_image(path):
    """A picture as PIL RGB, upright (EXIF), on white where transparent. Raises ValueError."""
    with reading(path, "expected a picture of 8 bits per channel"), Image.open(path) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"its mode is {image.mode}")
        image = ImageOps.exif_transpose(image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def read_npz(path):
    """{name: array} of an .npz; arr_0 as images uint8 (N, 1 or 3, H, W). Use inside reading()."""
    with np.load(path, allow_pickle=False) as npz:
        arrays = {name.removeprefix("ref_"): npz[name] for name in npz}  # the authors' ref_mu
    if "arr_0" in arrays:
        images = arrays["arr_0"]
        if images.dtype != np.uint8 or images.ndim != 3 and images.shape[3:] not in ((1,), (3,)):
            raise ValueError(f"arr_0 is {images.dtype} {images.shape}, not uint8 (N, H, W, 3)")
        arrays["arr_0"] = images.reshape(*images.shape[:3], -1).transpose(0, 3, 1, 2)
    return arrays


if __name__ == "__main__":
    run(main)
