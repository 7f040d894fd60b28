"""Sample images from a trained network, in one evaluation each.

    python sample.py                                           10 x 10 images from out/last.pt
    python sample.py --omega 1 2 4 8 --out omegas.png          one row per guidance scale
    python sample.py --classes 3 --num 1000 --out threes/      a folder of PNGs
    python sample.py iMF-XL-2.pth --classes 207 88             the authors' weights, with their VAE
    torchrun --nproc-per-node=8 -- sample.py iMF-XL-2.pth --num 50000 --out images.npz

Image i depends on (seed, i) alone, not on the number of images or of processes."""

import argparse, contextlib, datetime, glob, json, os, sys, warnings, zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import imf, model

IMAGE_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

# omega, t_min, t_max that the authors recommend for latents, by depth (10.5 is more than any omega
# of the training); for XL/2 in two steps they recommend others
RECOMMENDED = {12: (8, 0.4, 0.65), 24: (10.5, 0.4, 0.6), 32: (10.5, 0.4, 0.6), 48: (8, 0.42, 0.62)}
RECOMMENDED_XL_TWO_STEPS = (4, 0.36, 0.64)
RECOMMENDED_PIXELS = (3, 0, 1)

# the paper's VAE, and the mean and standard deviation of each channel of its latents of ImageNet
VAE = "stabilityai/sd-vae-ft-mse"
LATENT_MEAN = torch.tensor([0.86488, -0.27787343, 0.21616915, 0.3738409]).view(-1, 1, 1)
LATENT_STD = torch.tensor([4.85503674, 5.31922414, 3.93725398, 3.9870003]).view(-1, 1, 1)


@torch.no_grad()
def generate(net, numbers, classes, seed=0, vae=None, **guidance):
    """Yields batches of images, uint8 (b, 3, H, W): number i is of class classes[i % len(classes)].
    vae decodes what a net of latents samples. guidance: steps, omega, t_min, t_max of imf.sample;
    what is left out is as recommended."""
    guidance = recommended(net, vae, guidance.get("steps", 1)) | guidance
    device = next(net.parameters()).device
    shape = net.channels, net.image_size, net.image_size

    # always the same number at a time: in a batch of another size an image is rounded differently
    size = 8 if device.type == "cpu" else 64
    for start in range(0, len(numbers), size):
        wanted = numbers[start:start + size]
        padded = [*wanted, *[wanted[0]] * (size - len(wanted))]
        noise = [np.random.default_rng((seed, i)).standard_normal(shape, np.float32)
                 for i in padded]
        y = torch.tensor([classes[i % len(classes)] for i in padded], device=device)
        x = imf.sample(net, torch.from_numpy(np.stack(noise)).to(device), y, **guidance)
        if vae:
            x = x * LATENT_STD.to(device) + LATENT_MEAN.to(device)
            x = torch.cat([vae.decode(part).sample for part in x.split(8)])
        x = x[:len(wanted)].expand(-1, 3, -1, -1).float() * 127.5 + 127.5
        yield x.round().clamp(0, 255).byte().cpu().numpy()


def write_sheet(path, images, columns):
    """One PNG of images uint8 (N, 3, H, W), row by row; small images are enlarged."""
    zoom = max(1, 64 // images.shape[3])
    images = np.pad(images, ((0, -len(images) % columns), (0, 0), (1, 1), (1, 1)))
    rows = images.reshape(-1, columns, *images.shape[1:])
    sheet = rows.transpose(0, 3, 1, 4, 2).reshape(len(rows) * rows.shape[3], -1, 3)
    with atomic(path) as file:
        Image.fromarray(sheet.repeat(zoom, 0).repeat(zoom, 1)).save(file, "PNG")


def write_folder(folder, images):
    """A PNG for each of the images, uint8 (3, H, W), named by its number."""
    def write(number, image):
        Image.fromarray(image.transpose(1, 2, 0)).save(Path(folder, f"{number:06d}.png"))

    with error_context(f"cannot write {folder}"), ThreadPoolExecutor() as pool:
        list(pool.map(write, range(len(images)), images))


def main():
    # the command line
    parser = command_line(__doc__)
    flag = parser.add_argument
    flag("checkpoint", nargs="?", default="out/last.pt", help="default: out/last.pt")
    flag("--omega", type=number(float, 1e-6), nargs="+", metavar="W", help="guidance scales")
    flag("--classes", type=number(int, 0), nargs="+", metavar="C", help="default: all")
    flag("--num", type=COUNT, metavar="N", help="images per scale; default: 100, or 10 each")
    flag("--out", help="FILE.png, FILE.npz or a new FOLDER; default: samples.png beside CHECKPOINT")
    sampling_options(flag)
    args = parser.parse_args()
    out = Path(args.out or Path(args.checkpoint).with_name("samples.png"))
    kind = out.suffix.lower()
    if kind in IMAGE_EXTENSIONS and kind != ".png":
        raise ValueError(f"--out {out}: expected FILE.png, FILE.npz or a FOLDER")
    if out.is_dir() and (kind in (".png", ".npz") or any(out.iterdir())):
        raise ValueError(f"--out {out}: there is such a folder, and it is no empty FOLDER")
    device, rank, world = join(args.device)
    net, vae, guidance = prepare(args.checkpoint, args, device)
    classes = args.classes or range(net.num_classes)
    if max(classes) >= net.num_classes:
        raise ValueError(f"--classes {max(classes)}: this network knows 0 to {net.num_classes - 1}")
    omegas = args.omega or [recommended(net, vae, args.steps)["omega"]]
    per_omega = args.num or (100 if len(omegas) == 1 else 10)
    folder = out.parent if kind in (".png", ".npz") else out
    folder.mkdir(parents=True, exist_ok=True)

    # a row of images for each omega; process k of n samples every n-th of all images
    positions, mine = range(per_omega * len(omegas)), []
    with tqdm(total=len(positions), unit=" images", disable=rank > 0) as bar:
        for row, omega in enumerate(omegas):
            numbers = [i % per_omega for i in positions[rank::world] if i // per_omega == row]
            for batch in generate(net, numbers, classes, args.seed, vae, omega=omega, **guidance):
                mine += list(batch)
                bar.update(len(batch) * world)

    # the first process puts them in order and writes them
    shares = [mine] * world
    if world > 1:
        dist.gather_object(mine, shares if rank == 0 else None)
    if rank > 0:
        return
    images = [None] * len(positions)
    for k, share in enumerate(shares):
        images[k::world] = share
    if kind == ".png":
        write_sheet(out, np.stack(images), 10 if len(omegas) == 1 else per_omega)
    elif kind == ".npz":  # ADM's format: images (N, H, W, 3), labels (N,)
        labels = [classes[i % per_omega % len(classes)] for i in positions]
        with atomic(out) as file:
            np.savez(file, arr_0=np.stack(images).transpose(0, 2, 3, 1), arr_1=labels)
    else:
        write_folder(out, images)
    print(f"wrote {out}")


# ---- A trained network ----


def load(path, device="cpu"):
    """(net, info) of our own checkpoint (its EMA weights) or of the authors' released weights;
    info: the settings of the training, its "vae" is "none" for pixels. Raises ValueError."""
    saved = load_file(path)
    with error_context(f"{path} holds no weights of iMF"):
        if "ema" in saved:
            info = {"vae": "none", "predict": "u", **saved["settings"], "step": saved["step"]}
            net = model.from_state(saved["ema"], int(info["image_size"]), info["predict"])
        else:
            net, info = model.from_official(saved), {"vae": VAE}
        return net.to(device).eval(), info


def load_file(path):
    """What torch.save wrote: tensors and plain values, never code. Raises ValueError."""
    with error_context(f"cannot read {path}"):
        mapped = os.name == "posix" and zipfile.is_zipfile(path)
        return torch.load(path, "cpu", weights_only=True, mmap=mapped)


def load_vae(name, device="cpu"):
    """An AutoencoderKL of diffusers, a folder or on the hub, in safetensors. Raises ValueError."""
    from diffusers import AutoencoderKL  # takes seconds, and pixels do not need it
    warnings.filterwarnings("ignore", module="huggingface_hub")
    with error_context(f"--vae {name}: no VAE of that name, neither a folder nor on the hub"):
        vae = AutoencoderKL.from_pretrained(name, use_safetensors=True, low_cpu_mem_usage=False)
    if (vae.config.latent_channels, len(vae.config.block_out_channels)) != (4, 4):
        raise ValueError(f"--vae {name}: expected 4 channels of latents at 1/8 of the image's size")
    return vae.to(device).eval().requires_grad_(False)


def recommended(net, latents, steps):
    """The default {"omega", "t_min", "t_max"}."""
    depth = len(net.shared_blocks) + len(net.u_heads) if latents else 0
    values = RECOMMENDED.get(depth, RECOMMENDED_PIXELS)
    if depth == 48 and steps > 1:
        values = RECOMMENDED_XL_TWO_STEPS
    return dict(zip(("omega", "t_min", "t_max"), values))


def sampling_options(flag):
    """The flags of all command lines that sample; `flag` is a parser's add_argument."""
    flag("--steps", type=number(int, 1, 1000), default=1, metavar="N", help="default: 1")
    flag("--interval", type=number(float, 0, 1), nargs=2, metavar=("LO", "HI"),
         help="times at which guidance acts")
    flag("--seed", type=number(int, 0), default=0, metavar="N", help="of the noise; default: 0")
    flag("--vae", metavar="NAME", help="another copy of the VAE that decodes latents")
    flag("--precision", choices=["bf16", "float32"], default="float32", help="default: float32")
    flag("--compile", action="store_true", help="torch.compile, for many images")
    flag("--device", help="cpu, cuda, cuda:1, mps; default: the best one here")


def prepare(path, args, device):
    """(net, vae or None, the given steps, t_min, t_max) of a checkpoint. Raises ValueError."""
    net, info = load(path, device)
    if args.vae and info["vae"] == "none":
        raise ValueError(f"{path} samples pixels: --vae does not fit")
    vae = None if info["vae"] == "none" else load_vae(args.vae or info["vae"], device)
    guidance = {"steps": args.steps}
    if args.interval:
        guidance["t_min"], guidance["t_max"] = sorted(args.interval)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    net.u = autocast(net.u)
    if vae:
        vae.decode = autocast(vae.decode)
    if args.compile:
        net.compile()
    return net, vae, guidance


# ---- What all command lines share ----


def command_line(doc):
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def run(main):
    """Runs a command line: a user error is one line on stderr and exit status 2."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        message = " ".join(str(error).split()) or "out of memory"
        message = f"{Path(sys.argv[0]).name}: {message}"
        print(message, file=sys.stderr)
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun's last words quote it
            Path(report).write_text(json.dumps({"message": message}))
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def error_context(what):
    """Any error inside becomes a ValueError that begins with `what`."""
    try:
        yield
    except Exception as error:
        # torch.save hides the OSError of a full disk
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        raise ValueError(f"{what}: {' '.join(reason.split())[:200]}") from error


def number(kind, low, high=10**12):
    """An argparse type: an int or float from low to high."""
    def number(text):  # argparse shows this name: "invalid number value"
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
    return number


COUNT = number(int, 1)


def join(name=None, deterministic=False):
    """(device, rank, world) of this process, which joins the others if torchrun started it."""
    name = name or str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with error_context(f"--device {name}"):
        device = torch.empty(0, device=name).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if "RANK" not in os.environ:
        return device, 0, 1
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=20))
    return device, dist.get_rank(), dist.get_world_size()


def everyone(value=None):
    """The values of all processes, by rank; each process waits for all others."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def atomic(path):
    """Opens a temporary file that becomes `path` if the block succeeds, else it is removed."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with error_context(f"cannot write {path}"), open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def images_in(folder):
    """The paths of all images below a folder, by their extension, sorted; glob leaves out what is
    hidden. Raises ValueError."""
    paths = glob.iglob(os.path.join(glob.escape(str(folder)), "**", "*"), recursive=True)
    found = sorted(path for path in paths if path.lower().endswith(IMAGE_EXTENSIONS))
    if not found:
        raise ValueError(f"{folder}: no such folder, or no images in it")
    return found


def open_image(path):
    """A picture as PIL RGB, converted as in ADM. Raises ValueError."""
    with error_context(f"{path} is no image of 8 bits per channel"), Image.open(path) as image:
        if image.mode[0] in "IF":  # grey ones, which convert() would clip
            raise ValueError("it has more")
        return image.convert("RGB")


if __name__ == "__main__":
    run(main)
