"""Draw images with a trained network, in one evaluation each.

    python sample.py                                           10 x 10 digits from out/last.pt
    python sample.py --omega 1 2 4 8 --out omegas.png          a row for each scale; so with --steps
    python sample.py --classes 3 --num 1000 --out threes/      a folder of PNGs
    python sample.py iMF-XL-2.pth --classes 207 88             the authors' weights, with their VAE
    torchrun --nproc-per-node=8 -- sample.py iMF-XL-2.pth --num 50000 --out images.npz

Image i depends on (seed, i) alone, not on the number of images or of processes.
"""

import argparse, contextlib, datetime, glob, os, shutil, signal, sys, time, warnings
import zipfile, zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import imf, model

# (omega, t_min, t_max) that the authors advise for latents, by depth; XL/2 differs in more steps.
ADVISED = {12: (8.0, 0.4, 0.65), 24: (10.5, 0.4, 0.6), 32: (10.5, 0.4, 0.6), 48: (8.0, 0.42, 0.62)}
ADVISED_IN_STEPS = {**ADVISED, 48: (4.0, 0.36, 0.64)}

# The paper's VAE; the mean and the deviation of each channel of its latents of ImageNet.
VAE = "stabilityai/sd-vae-ft-mse"
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
        known = isinstance(error, (Fault, OSError, MemoryError, torch.OutOfMemoryError))
        if os.environ.get("RANK", "0") != "0" or dist.is_initialized() and not known:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which torchrun ends us meanwhile,
            time.sleep(5)  # if another process says why
        if known:
            print(f"{Path(sys.argv[0]).name}: {str(error) or 'out of memory'}", file=sys.stderr)
            sys.exit(2)
        raise

def number(kind, low, high=10**12):
    """An argparse type: an int or float from low to high."""
    def number(text):  # argparse says this name: "invalid number value"
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
    return number

def join(name=None):
    """(device, rank, world) of this process, which joins those of a torchrun. Raises Fault."""
    rank, world, local = (int(os.environ.get(k, 0)) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    name = name or str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    with blame(f"--device {name}"):
        device = torch.empty(0, device=f"cuda:{local}" if name == "cuda" else name).device
    if device.type == "cuda":  # the same run twice is the same, bit for bit; TF32 where fast
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.set_float32_matmul_precision("high")
    if world > 1 and not dist.is_initialized():
        with blame("cannot join the other processes"):
            dist.init_process_group(timeout=datetime.timedelta(days=1))  # for those that encode
    return device, rank, max(1, world)

def total(tensor):
    """The sum over all processes, each of which waits for the others."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor

@contextlib.contextmanager
def atomic(path):
    """Opens a temporary file that becomes `path` if the block succeeds and is removed otherwise."""
    temporary = f"{path}.tmp"
    try:
        with blame(f"cannot write {path}"), open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)

def files(folder):
    """All files below a folder, sorted, but for hidden ones. Raises Fault if there are none."""
    pattern = os.path.join(glob.escape(str(folder)), "**")
    if found := sorted(filter(os.path.isfile, glob.iglob(pattern, recursive=True))):
        return found
    raise Fault(f"{folder}: no such folder, or an empty one")

def open_image(path):
    """A picture of 8 bits as PIL RGB, converted as in ADM. It may raise anything."""
    with Image.open(path) as image:
        if image.mode[0] in "IF":
            raise ValueError("more than 8 bits")
        return image.convert("RGB")

def load_file(path):
    """What torch.save wrote: tensors and plain values, never pickled code. Raises Fault."""
    os.stat(path)  # raises what is wrong with the path
    with contextlib.suppress(Exception):
        zipped = zipfile.is_zipfile(path)  # all but very old files
        if not zipped or zipfile.ZipFile(path).testzip() is None:  # torch ignores the check sums
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    raise Fault(f"cannot read {path}: it is damaged or no checkpoint")

def load(path, device="cpu"):
    """(net, info) of our own checkpoint (its EMA weights) or of the authors' released weights.
    info: the settings of the training; its `vae` is "none" for pixels. Raises Fault."""
    saved = load_file(path)
    with blame(f"cannot use {path} as weights of iMF"):
        if "ema" in saved:
            info = {"vae": "none", **saved["settings"], "step": saved["step"]}
            net = model.from_state(saved["ema"], int.__index__(info["image_size"]))
        else:
            net, info = model.from_official(saved), {"vae": VAE}
        if not all(p.isfinite().all() for p in net.parameters()):
            raise ValueError("some of its weights are not finite")
        return net.to(device).eval(), info

def load_vae(name, device="cpu"):
    """An AutoencoderKL of diffusers, a folder or on the hub, in safetensors. Raises Fault."""
    os.environ.update(HF_HUB_VERBOSITY="error", DIFFUSERS_VERBOSITY="critical")  # we say it
    warnings.filterwarnings("ignore", module="huggingface_hub")
    from diffusers import AutoencoderKL  # takes seconds, and who draws pixels does not need it
    with blame(f"--vae {name} cannot be had, neither as a folder nor from the hub"):
        vae = AutoencoderKL.from_pretrained(name, use_safetensors=True, low_cpu_mem_usage=False)
    channels, factor = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    if (vae.config.in_channels, channels, factor) != (3, 4, 8):
        raise Fault(f"--vae {name}: {channels} channels at 1/{factor}, not 4 at 1/8 of RGB")
    return vae.to(device).eval().requires_grad_(False)

def options(flag):
    """The flags of whatever draws images, by an ArgumentParser's add_argument."""
    flag("--steps", type=number(int, 1, 1000), nargs="+", default=[1], help="default: 1")
    flag("--omega", type=number(float, 1e-6), nargs="+", metavar="W", help="guidance scales")
    flag("--interval", type=number(float, 0, 1), nargs=2, metavar=("LO", "HI"), action="append",
         help="when guidance acts, within 0 1; may come again")
    flag("--seed", type=number(int, 0), default=0, help="of the noise; default: 0")
    flag("--vae", help="folder or name of the VAE that decodes latents; or none")
    flag("--device", help="cpu, cuda, cuda:1, mps; default: the best one here")

def advised(net, latents, steps):
    """(omega, t_min, t_max) for whoever names neither scale nor interval."""
    table = {} if not latents else ADVISED if steps == 1 else ADVISED_IN_STEPS
    return table.get(len(net.shared_blocks) + len(net.u_heads), (2.0, 0.0, 1.0))

def prepare(path, args, device):
    """(net, vae or None, settings of imf.sample) of a checkpoint and what `options` read. The
    settings: each number of steps with each omega and interval, or the advised. Raises Fault."""
    net, info = load(path, device)
    name = args.vae or info["vae"]
    if (name == "none") == (net.channels == 4):
        raise Fault(f"{path} draws {net.channels} channels: 4 need a --vae, others none")
    settings = []
    for steps in args.steps:
        omega, *interval = advised(net, name != "none", steps)
        settings += [dict(steps=steps, omega=w, t_min=low, t_max=high)
                     for w in args.omega or [omega] for low, high in args.interval or [interval]]
    if any(row["t_min"] > row["t_max"] for row in settings):
        raise Fault("--interval LO HI: the lower end comes first")
    return net, None if name == "none" else load_vae(name, device), settings

def generate(net, numbers, classes, seed=0, vae=None, **guidance):
    """Yields batches of images, uint8 (b, 3, H, W): number i is of class classes[i % len(classes)].
    vae: of a net that draws latents. guidance: steps, omega, t_min, t_max of imf.sample."""
    device = next(net.parameters()).device
    group = 8 if device.type == "cpu" else 64  # always: other sizes would be rounded differently
    shape = net.channels, net.image_size, net.image_size
    for start in range(0, len(numbers), group):
        part = numbers[start:start + group]
        full = [*part, *[part[0]] * (group - len(part))]
        noise = [np.random.default_rng((seed, i)).standard_normal(shape, np.float32) for i in full]
        y = torch.tensor([classes[i % len(classes)] for i in full], device=device)
        x = imf.sample(net, torch.from_numpy(np.stack(noise)).to(device), y, **guidance)
        if vae:  # 8 at a time, which bounds the memory
            x = x * LATENT_STD.to(device) + LATENT_MEAN.to(device)
            x = torch.cat([vae.decode(some).sample for some in x.split(8)])
        x = (x[:len(part)].expand(-1, 3, -1, -1) * 127.5 + 127.5).round().clamp(0, 255)
        yield x.byte().cpu().numpy()

def write_sheet(path, images, columns):
    """One PNG of images uint8 (N, H, W, 3), row by row; small ones are enlarged."""
    zoom = max(1, 64 // images.shape[2])
    images = np.pad(images, ((0, -len(images) % columns), (1, 1), (1, 1), (0, 0)))
    rows = images.reshape(-1, columns, *images.shape[1:]).swapaxes(1, 2)
    sheet = rows.reshape(-1, columns * rows.shape[3], 3).repeat(zoom, 0).repeat(zoom, 1)
    with atomic(path) as file:
        Image.fromarray(sheet).save(file, "PNG")

def main():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", nargs="?", default="out/last.pt", help="default: out/last.pt")
    options(p.add_argument)
    p.add_argument("--classes", type=number(int, 0), nargs="+", metavar="C", help="default: all")
    p.add_argument("--num", type=number(int, 1), help="images a row; default: 100, of many rows 10")
    p.add_argument("--out", help="FILE.png, FOLDER, FILE.npz; default: samples.png with CHECKPOINT")
    args = p.parse_args()
    device, rank, world = join(args.device)
    net, vae, rows = prepare(args.checkpoint, args, device)
    classes = args.classes or range(net.num_classes)
    num = args.num or (100 if len(rows) == 1 else 10)
    out = Path(args.out or Path(args.checkpoint).with_name("samples.png"))
    if out.suffix not in (".png", ".npz", "") or out.is_dir() or not out.suffix and out.exists():
        raise Fault(f"--out {out}: expected a name in .png or .npz, or that of a new folder")
    if out.suffix == ".png" and num * len(rows) > 10_000:
        raise Fault("a sheet holds at most 10,000 images: let --out be a folder or end in .npz")
    if max(classes) >= net.num_classes:
        raise Fault(f"--classes {max(classes)}: this network knows 0 to {net.num_classes - 1}")

    stat = os.stat(args.checkpoint)  # a start with the same arguments completes the same part
    key = repr((stat.st_size, stat.st_mtime_ns, args.vae, rows, classes, args.seed, num))
    part = Path(f"{out}.{zlib.crc32(key.encode()):08x}.part")
    part.mkdir(parents=True, exist_ok=True)
    paths = [part / f"{i:06d}.png" for i in range(num * len(rows))]
    todo = [i for i in range(len(paths))[rank::world] if not paths[i].exists()]
    images = (image for k, row in enumerate(rows) for batch in generate(
        net, [i % num for i in todo if i // num == k], classes, args.seed, vae, **row)
        for image in batch)
    bar = tqdm(images, total=len(todo), unit=" images", disable=rank > 0)
    for image, i in zip(bar, todo):  # in this order the bar ends at 100 %
        with atomic(paths[i]) as file:
            Image.fromarray(image.transpose(1, 2, 0)).save(file, "PNG")
    total(torch.zeros(1))
    if rank == 0 and not out.suffix:
        part.replace(out)
    elif rank == 0:
        x = np.empty((len(paths), *np.array(Image.open(paths[0])).shape), np.uint8)
        for i, path in enumerate(tqdm(paths, "packing", unit=" images")):
            x[i] = np.array(Image.open(path))
        if out.suffix == ".png":
            write_sheet(out, x, 10 if len(rows) == 1 else num)
        else:  # as ADM has it: images (N, H, W, 3), labels (N,)
            y = [classes[i % num % len(classes)] for i in range(len(paths))]
            with atomic(out) as file:
                np.savez(file, arr_0=x, arr_1=y)
        shutil.rmtree(part, ignore_errors=True)
    if rank == 0:
        print(f"wrote {out}")

if __name__ == "__main__":
    run(main)
