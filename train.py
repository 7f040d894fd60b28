"""Train improved MeanFlow from scratch.

    python train.py                                   digits on a laptop, a few minutes
    python train.py --data flowers --image-size 64    your own images: flowers/rose/*.jpg, ...
    torchrun --nproc-per-node=8 train.py --model XL/2 --data imagenet/train     on latents
    python train.py --tangent conditional             the original MeanFlow, for comparison

OUT (--out, default `out`) receives last.pt, log.jsonl and a sheet of samples now and then. The
same command goes on where it stopped, and ends in the same weights as if it never had. Any
number of processes, and any --accum, trains the same model.
"""

import argparse
import contextlib
import copy
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm

import imf
import model
import sample
from sample import Fault, number

COUNT, SHARE, POSITIVE = number(int, 1), number(float, 0, 1), number(float, 1e-12)

# Where nothing is said: for tiny, minutes on two CPU cores; for the others the release's recipe.
RECIPES = {
    "batch_size": (64, 1024, COUNT, "images a step"),
    "steps": (3200, "640 epochs", COUNT, "of training"),
    "lr": (1e-2, 1e-4, POSITIVE, "learning rate"),
    "warmup": (100, "10 epochs", number(int, 0), "steps in which it rises"),
    "cooldown": (1.0, 0.0, SHARE, "the last share of the steps, in which it falls to 0"),
    "ema": (0.99, 0.9999, SHARE, "decay of the averaged weights"),
    "t_mean": (0.0, -0.4, number(float, -100, 100), "t and r are sigmoid(N(mean, std^2))"),
    "t_std": (1.6, 1.0, number(float, 0), "see --t-mean"),
    "norm_eps": (1000.0, 0.01, POSITIVE, "a sample's loss is s / (s + eps), s its square error"),
}

# What a checkpoint must agree with to be continued; the rest may change from start to start.
SETTINGS = ("model", "vae", "batch_size", "lr", "warmup", "cooldown", "ema", "t_mean", "t_std",
            "norm_eps", "tangent", "precision", "seed")

class Data(NamedTuple):
    """The images that one trains on."""
    images: Sequence  # of uint8 (C, H, W), or a VAE's posteriors: float16 (8, h, w), mean and std
    labels: np.ndarray  # (N,)
    num_classes: int
    source: str  # tells one data set from another

def digits(n, seed=0):
    """The built-in data, a pure function of (n, seed): images uint8 (n, 1, 12, 12), labels (n,),
    in Pillow's own font, varied in place, size, angle and stroke."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=n)
    images = np.empty((n, 1, 12, 12), np.uint8)
    fonts = [ImageFont.load_default(size) for size in range(33, 41)]
    for image, label in zip(images, labels):
        canvas = Image.new("L", (48, 48))
        ImageDraw.Draw(canvas).text((24, 24), str(label), 255, fonts[rng.integers(len(fonts))],
                                    anchor="mm", stroke_width=rng.uniform(0.6, 1.8))
        canvas = canvas.rotate(rng.uniform(-12, 12), Image.BICUBIC,
                               translate=tuple(rng.uniform(-3, 3, 2)))
        image[0] = canvas.reduce(4)
    return images, labels

def centre_crop(image, size):
    """The centre of a PIL image, size x size, as in ADM: halved, then bicubic, then cropped."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.BICUBIC)
    return image.crop((left, top, left + size, top + size))

def decode(paths, size):
    """(the pictures in these files, uint8 (n, 3, size, size); which are pictures, bool (n,))."""
    images, good = np.zeros((len(paths), 3, size, size), np.uint8), np.zeros(len(paths), bool)
    for i, path in enumerate(paths):
        with contextlib.suppress(Exception):  # damage may raise anything
            images[i] = np.array(centre_crop(sample.open_image(path), size)).transpose(2, 0, 1)
            good[i] = True
    return images, good

SHARD = 2048  # images to a file of the cache, each of which stays open

def open_shard(stem, labels, dtype, shape):
    """(images, memory-mapped, labels) of a shard; None unless it is there and undamaged."""
    with contextlib.suppress(Exception):
        x = np.load(f"{stem}.x.npy", "r", allow_pickle=False)
        y = np.load(f"{stem}.y.npy", allow_pickle=False)
        if (x.dtype, *x.shape[1:], y.dtype, y.shape) == (dtype, *shape, labels.dtype, x.shape[:1]):
            return (x, y) if len(y) <= len(labels) and set(y) <= set(labels) else None

def folder_data(folder, size, cache, vae=None, rank=0, world=1):
    """The images of a folder of classes, or with a VAE their posteriors, as Data. Raises Fault.

    They are mapped from files in `cache`, which all processes make, each every world-th; what was
    interrupted is completed. Another size, VAE or file in the folder leads to another sub-folder.
    """
    classes = sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != ".")
    if not classes:
        raise Fault(f"--data {folder}: it has no sub-folders; expected one for each class")
    found = [sample.files(os.path.join(folder, name)) for name in classes]
    paths = list(itertools.chain.from_iterable(found))
    labels = np.repeat(np.arange(len(found)), [len(some) for some in found])
    source = hashlib.sha256(repr((size, vae and vae.digest)).encode())
    for path in paths:
        facts = os.path.relpath(path, folder), os.path.getsize(path), os.stat(path).st_mtime_ns
        source.update(repr(facts).encode())

    cache = Path(cache, source.hexdigest()[:12])
    cache.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        lock = open(cache / ".lock", "w")  # until it is closed, at the end of this function
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for another run that makes the same
    sample.total(torch.zeros(1))  # all wait for rank 0
    kind = (np.float16, (8, size // 8, size // 8)) if vae else (np.uint8, (3, size, size))
    shards = [(cache / f"{i // SHARD:05d}", labels[i:i + SHARD], *kind)
              for i in range(0, len(paths), SHARD)]
    todo = [k for k in range(rank, len(shards), world) if not open_shard(*shards[k])]
    count = sum(len(shards[k][1]) for k in todo)
    needed, free = count * size**2 * (0.25 if vae else 3), shutil.disk_usage(cache).free
    if needed * min(world, len(shards)) > free:
        raise Fault(f"--cache {cache}: {needed / 1e6:.1f} MB a process, {free / 1e6:.1f} are free")
    workers = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    load = functools.partial(DataLoader, batch_size=sample.GROUP, num_workers=workers,
                             collate_fn=functools.partial(decode, size=size))
    with tqdm(total=count, desc="decoding", unit=" images", disable=rank > 0 or not todo) as bar:
        for k in todo:
            stem, y, files = *shards[k][:2], paths[k * SHARD:(k + 1) * SHARD]
            x, good = [], []
            for images, some in load(files):
                x.append((vae.encode(images) if vae else images)[some])
                good.append(some)
                bar.update(len(some))
            good = np.concatenate(good)
            if not good.all():
                bad = np.array(files)[~good]
                bar.write(f"left out {len(bad)}, no images: {', '.join(bad[:5])}", sys.stderr)
            for what, values in (("x", np.concatenate(x)), ("y", y[good])):
                with sample.atomic(f"{stem}.{what}.npy") as file:
                    np.save(file, values)
    sample.total(torch.zeros(1))
    with sample.blame(f"--cache {cache}: not all of it can be opened"):
        images, found = zip(*(open_shard(*shard) for shard in shards))
    found = np.concatenate(found)
    bad = len(paths) - len(found)
    if set(found) != set(labels) or bad > max(10, len(paths) // 100):
        raise Fault(f"--data {folder}: {bad} of {len(paths)} files are no images, or a whole class "
                    f"(to try them again, remove {cache})")
    return Data(ConcatDataset(images), found, len(classes), source.hexdigest())

@functools.lru_cache(2)
def order(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)

def batch(data, args, rank, world, step):
    """Every world-th sample of batch number `step`: x, y and their draws, from (seed, step) alone.

    x are pixels in [-1, 1], or a fresh draw of each latent, normalised.
    """
    n, B, mine = len(data.labels), args.batch_size, slice(rank, None, world)
    i = [order(n, args.seed, k // n)[k % n] for k in range(step * B, (step + 1) * B)[mine]]
    x = torch.from_numpy(np.stack([data.images[k] for k in i]))
    seed = np.random.SeedSequence((args.seed, step)).generate_state(1)
    generator = torch.Generator().manual_seed(int(seed[0]))
    if x.dtype == torch.uint8:
        x = x / 127.5 - 1
    else:
        mean, std = x.float().chunk(2, 1)
        noise = torch.randn((B, *mean.shape[1:]), generator=generator)
        x = (mean + std * noise[mine] - sample.LATENT_MEAN) / sample.LATENT_STD
    draws = imf.draw(x.new_empty(B, *x.shape[1:]), generator, t_mean=args.t_mean, t_std=args.t_std)
    return x, torch.from_numpy(data.labels[i]), imf.Draws(*(d[mine] for d in draws))

def arguments():
    p = sample.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = p.add_argument
    flag("--model", choices=model.MODELS, default="tiny", help="default: tiny")
    flag("--data", metavar="FOLDER", help="one sub-folder per class; default: digits")
    flag("--image-size", type=number(int, 1, 4095), metavar="N", help="32, of latents 256")
    flag("--vae", metavar="NAME|none", help="for --data; default: none for tiny, else the paper's")
    flag("--init", metavar="FILE", help="begin with the weights of this checkpoint")
    flag("--cache", metavar="DIR", help="for the decoded images; default: FOLDER-Npx")
    flag("--out", default="out", metavar="DIR", help="default: out; what is there is continued")
    for name, (tiny, paper, kind, text) in RECIPES.items():
        flag("--" + name.replace("_", "-"), type=kind, metavar="N",
             help=f"{text} (tiny: {tiny}, else: {paper})")
    flag("--accum", type=COUNT, default=1, metavar="N", help="parts of a batch, in turn")
    flag("--checkpoint", action="store_true", help="compute activations twice, to save memory")
    flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on CUDA")
    flag("--tangent", choices=imf.TANGENTS, default="v-head", help="direction of du/dt")
    flag("--precision", choices=["bf16", "float32"], help="default: bf16 on CUDA")
    flag("--device", help="cpu, cuda, cuda:1, mps; default: the best one here")
    flag("--seed", type=number(int, 0), default=0, metavar="N", help="default: 0")
    flag("--log-every", type=COUNT, default=50, metavar="N", help="default: 50")
    flag("--save-every", type=COUNT, default=500, metavar="N", help="checkpoint; default: 500")
    flag("--sample-every", type=COUNT, default=500, metavar="N", help="pictures; default: 500")
    args = p.parse_args()
    args.vae = args.vae or (sample.VAE_NAME if args.data and args.model != "tiny" else "none")
    if not args.data and (args.image_size or args.vae != "none"):
        raise Fault("--image-size and --vae need --data: the digits are 12 x 12 pixels")
    os.stat(args.init or os.curdir)  # before hours of encoding
    args.image_size = args.image_size or (32 if args.vae == "none" else 256)
    patch = model.MODELS[args.model]["patch_size"] * (1 if args.vae == "none" else 8)
    if args.data and args.image_size % patch:
        raise Fault(f"--image-size {args.image_size} is no multiple of {patch}, the patch's size")
    return args

def initialise(net, path):
    """Begins with the weights of a checkpoint, our own or the authors'. Raises Fault.

    Released weights have no v-head: where r = t it should equal u, so it is a copy of the u-head.
    """
    start, _ = sample.load(path)
    if start.v_heads is None:
        start.v_heads, start.v_final_layer = copy.deepcopy((start.u_heads, start.u_final_layer))
    with sample.blame(f"--init {path} does not fit"):
        net.load_state_dict(start.state_dict())

def resume(path, settings, net, ema, optimizer):
    """Loads a checkpoint into the three; returns (step, skipped, logged). Raises Fault."""
    saved = sample.load_file(path)
    with sample.blame(f"{path} is no checkpoint of this program, choose another --out"):
        for key, value in settings.items():
            if key != "vae" and saved["settings"][key] != value:  # source tells VAEs apart
                what = "other data" if key == "source" else (
                    f"--{key.replace('_', '-')} {saved['settings'][key]}, not {value}")
                raise Fault(f"{path} was made with {what}: keep to that, or choose another --out")
        for part, name in ((net, "net"), (ema, "ema"), (optimizer, "optimizer")):
            part.load_state_dict(saved.pop(name))
        return [int.__index__(saved[name]) for name in ("step", "skipped", "logged")]

def peak_memory(device):
    """In GB: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e9 / 1024)

def main():
    args = arguments()
    device, rank, world = sample.join(args.device)
    if device.type == "cuda":  # the same run twice is the same, bit for bit
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_float32_matmul_precision("high")
    args.batch_size = args.batch_size or RECIPES["batch_size"][args.model != "tiny"]
    if args.batch_size % (args.accum * world):
        raise Fault(f"--batch-size {args.batch_size} is no multiple of --accum {args.accum} times "
                    f"{world}, the number of processes")
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "float32")
    vae = None if args.vae == "none" else sample.VAE(args.vae, device)
    if args.data:
        cache = f"{os.path.abspath(args.data)}-{args.image_size}px" + "-latents" * bool(vae)
        data = folder_data(args.data, args.image_size, args.cache or cache, vae, rank, world)
    else:
        images, labels = digits(20_000)
        data = Data(images, labels, 10, "digits")
    for name, recipe in RECIPES.items():
        value = recipe[args.model != "tiny"]
        if isinstance(value, str):  # so many epochs
            value = math.ceil(int(value.split()[0]) * len(data.labels) / args.batch_size)
        if getattr(args, name) is None:
            setattr(args, name, value)

    torch.manual_seed(args.seed)
    channels, image_size, _ = data.images[0].shape
    net = model.DiT(image_size, channels // 2 if vae else channels, data.num_classes,
                    **model.MODELS[args.model])
    if args.init:
        initialise(net, args.init)
    net.checkpoint = args.checkpoint
    net.to(device)
    ema = copy.deepcopy(net).requires_grad_(False)
    if device.type == "cuda" if args.compile is None else args.compile:
        net.compile()
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(args.ema)
    optimizer = torch.optim.AdamW(
        net.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0, fused=True)

    out, journal = Path(args.out), Path(args.out, "log.jsonl")
    settings = {key: getattr(args, key) for key in SETTINGS} | {"source": data.source}
    settings |= {"image_size": image_size, "steps": args.cooldown and args.steps}
    step = skipped = streak = logged = 0
    if (out / "last.pt").exists():
        step, skipped, logged = resume(out / "last.pt", settings, net, ema, optimizer)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")  # held until it is closed, at the end
        with sample.blame(f"--out {out}: another run is writing there"):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        records = journal.read_bytes().splitlines(True) if journal.exists() else []
        with sample.atomic(journal) as file:
            file.writelines(records[:logged])  # what came after the checkpoint runs again
    ddp = DistributedDataParallel(net, gradient_as_bucket_view=True) if world > 1 else net

    def save():
        with sample.atomic(out / "last.pt") as file:
            torch.save({"step": step, "skipped": skipped, "logged": logged, "settings": settings,
                        "net": net.state_dict(), "ema": ema.state_dict(),
                        "optimizer": optimizer.state_dict()}, file)

    def draw_sheet():  # from the same noise each time: in one step above, in two below
        classes = np.linspace(0, data.num_classes - 1, min(10, data.num_classes)).astype(int)
        images = [image for steps in (1, 2) for image in sample.generate(
            ema, range(20), classes.tolist(), args.seed, vae=vae, steps=steps, omega=2.0)]
        images = [sample.picture(image) for image in np.concatenate(images)]
        sample.write_sheet(out / f"step-{step:06d}.png", images, 10)

    signals = []
    for name in (signal.SIGINT, signal.SIGTERM):  # end the run after this step
        signal.signal(name, lambda number, _: signals.append(number))

    prepare = functools.partial(ThreadPoolExecutor(1).submit, batch, data, args, rank, world)
    ahead, stop = prepare(step), False  # the next batch is made while a step runs
    sums, since = torch.zeros(3, device=device), (step, time.time())
    with tqdm(initial=step, total=args.steps, unit=" steps", disable=rank > 0) as bar:
        while step < args.steps and not stop:
            (x, y, draws), ahead = ahead.result(), prepare(step + 1)
            losses = 0
            for k in range(args.accum):
                part = slice(k, None, args.accum)
                ddp.require_backward_grad_sync = k == args.accum - 1
                with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                    loss, log = imf.imf_loss(ddp, x[part].to(device), y[part].to(device),
                                             imf.Draws(*(d[part] for d in draws)), args.tangent,
                                             args.norm_eps)
                (loss / args.accum).backward()
                losses += torch.stack((log["loss_u"], log["loss_v"])) / args.accum

            norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]).item()
            lr = args.lr * min(1, (step + 1) / max(1, args.warmup))
            lr *= min(1, (1 - step / args.steps) / max(1e-9, args.cooldown))
            optimizer.param_groups[0]["lr"] = lr
            if math.isfinite(norm):
                optimizer.step()
                average(list(ema.parameters()), list(net.parameters()), None)
                sums += torch.cat((losses, sums.new_ones(1)))
                streak = 0
            else:
                skipped, streak = skipped + 1, streak + 1
                if streak == 20:
                    raise Fault(f"step {step + 1}: no finite gradient for 20 steps, none of them "
                                f"saved in {out}; try a lower --lr in another --out")
            optimizer.zero_grad()
            step += 1
            bar.update()

            stop = sample.total(torch.tensor(len(signals))).item() > 0
            end = step == args.steps
            if step % args.log_every == 0 or end:
                loss_u, loss_v, n = sample.total(sums).tolist()
                rate = (step - since[0]) * args.batch_size / (time.time() - since[1])
                record = {"step": step, "loss_u": loss_u / n if n else None,
                          "loss_v": loss_v / n if n else None, "lr": lr, "images_per_s": rate,
                          "grad_norm": norm if math.isfinite(norm) else None, "skipped": skipped,
                          "peak_memory_gb": peak_memory(device)}
                bar.set_postfix({key: record[key] for key in ("loss_u", "loss_v", "images_per_s")})
                sums, since = torch.zeros_like(sums), (step, time.time())
                logged += 1
                if rank == 0:
                    with open(journal, "a") as file:
                        print(json.dumps(record), file=file)
            if rank == 0 and (step % args.sample_every == 0 or end):
                draw_sheet()
            if rank == 0 and not streak and (step % args.save_every == 0 or end or stop):
                save()
    if stop:
        sys.exit(128 + (signals or [signal.SIGTERM])[0])

if __name__ == "__main__":
    sample.run(main)
