"""Train improved MeanFlow from scratch.

    python train.py                                   digits on a laptop, a few minutes
    python train.py --data flowers --image-size 64    your own images: flowers/rose/*.jpg, ...
    python train.py --model B/2 --batch-size 64       a network of the paper, on the digits
    python train.py --tangent conditional             the original MeanFlow, for comparison

OUT (--out, default `out`) receives last.pt, log.jsonl and a sheet of samples now and then. The
same command goes on where it stopped, and ends in the same weights as if it never had.
"""

import argparse
import contextlib
import copy
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
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from tqdm import tqdm

import imf
import model
import sample
from sample import Fault, number

# Where nothing is said: for tiny, minutes on two CPU cores; for the others the release's recipe.
COUNT, SHARE, POSITIVE = number(int, 1), number(float, 0, 1), number(float, 1e-12)
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
SETTINGS = ("model", "batch_size", "lr", "warmup", "cooldown", "ema", "t_mean", "t_std",
            "norm_eps", "tangent", "precision", "seed")


class Data(NamedTuple):
    images: np.ndarray  # uint8 (N, C, H, W), perhaps memory-mapped
    labels: np.ndarray  # (N,), -1 for a file that was no image
    num_classes: int
    source: str  # tells one data set from another


def digits(n, seed=0):
    """The built-in data, a pure function of (n, seed): images uint8 (n, 1, 12, 12), labels (n,).

    Pillow's own font, varied in place, size, angle and stroke.
    """
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
    """Image files as uint8 (3, size, size) each; None for what cannot be read as a picture."""
    images = [None] * len(paths)
    for i, path in enumerate(paths):
        with contextlib.suppress(Exception), Image.open(path) as image:  # damage may raise anything
            if image.mode in ("I", "F"):
                continue  # black and white are anyone's guess
            if image.mode.startswith("I;16"):  # Pillow would clip it
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            images[i] = np.array(centre_crop(image.convert("RGB"), size)).transpose(2, 0, 1)
    return images


def scan(folder):
    """(paths, labels, number of classes) of a folder with one sub-folder per class."""
    classes = sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != ".")
    if not classes:
        raise Fault(f"--data {folder}: it has no sub-folders; expected one for each class")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(os.path.join(where, file) for where, _, files in os.walk(f"{folder}/{name}")
                       for file in files if file[0] != ".")
        if not found:
            raise Fault(f"--data {folder}: the class folder {name} is empty")
        paths += found
        labels += [label] * len(found)
    return paths, np.array(labels), len(classes)


def folder_data(folder, size, cache):
    """The images of a folder as Data, decoded once into `cache` and memory-mapped from there."""
    paths, labels, num_classes = scan(folder)
    facts = [(path[len(folder):], os.stat(path)) for path in paths]
    facts = repr((size, [(name, s.st_size, s.st_mtime_ns) for name, s in facts]))
    source = hashlib.sha256(facts.encode()).hexdigest()[:16]
    cache, shape = Path(cache), (len(paths), 3, size, size)
    images_file, labels_file = (cache / f"{name}-{source}.npy" for name in ("images", "labels"))
    with contextlib.suppress(Exception):  # there is none yet, or a damaged one
        images = np.load(images_file, mmap_mode="r", allow_pickle=False)
        known = np.load(labels_file, allow_pickle=False)
        if (images.shape, known.shape) == (shape, shape[:1]) and known.max() < num_classes:
            return Data(images, known, num_classes, source)

    needed, free = math.prod(shape), shutil.disk_usage(cache.absolute().parent).free
    if needed > free:
        raise Fault(f"the cache {cache} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free "
                    "there; --cache puts it elsewhere")
    loader = DataLoader(paths, 16, collate_fn=functools.partial(decode, size=size),
                        num_workers=os.cpu_count())
    try:
        cache.mkdir(exist_ok=True)
        for old in itertools.chain(cache.glob("images-*.npy*"), cache.glob("labels-*.npy*")):
            old.unlink()
        with sample.atomic(images_file) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            images = itertools.chain.from_iterable(loader)
            for i, image in enumerate(tqdm(images, "decoding", len(paths), unit=" images")):
                labels[i] = -1 if image is None else labels[i]
                file.write((np.zeros(shape[1:], np.uint8) if image is None else image).tobytes())
            bad = [paths[i] for i in np.flatnonzero(labels < 0)]
            names = ", ".join(bad[:5]) + ", ..." * (len(bad) > 5)
            if len(np.unique(labels[labels >= 0])) < num_classes:
                raise Fault(f"--data {folder}: a class is left without images; unreadable: {names}")
        with sample.atomic(labels_file) as file:
            np.save(file, labels)
    finally:
        with contextlib.suppress(OSError):
            cache.rmdir()  # if nothing came of it
    if bad:
        print(f"skipped {len(bad)} of {len(paths)} files, no images: {names}", file=sys.stderr)
    return Data(np.load(images_file, mmap_mode="r"), labels, num_classes, source)


@functools.lru_cache(2)
def order(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch(data, index, args, step):
    """Batch number `step`: x in [-1, 1], y and the draws, which follow from (seed, step)."""
    place = np.arange(step * args.batch_size, (step + 1) * args.batch_size)
    i = [index[order(len(index), args.seed, int(epoch))[k]]
         for epoch, k in zip(*np.divmod(place, len(index)))]
    x = torch.from_numpy(data.images[i]).float() / 127.5 - 1
    stream = np.random.SeedSequence((args.seed, step)).generate_state(1)
    generator = torch.Generator().manual_seed(int(stream[0]))
    draws = imf.draw(x, generator, t_mean=args.t_mean, t_std=args.t_std)
    return x, torch.from_numpy(data.labels[i]), draws


def arguments():
    p = sample.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = p.add_argument
    flag("--model", choices=model.MODELS, default="tiny", help="default: tiny")
    flag("--data", metavar="FOLDER", help="one sub-folder per class; default: digits")
    flag("--image-size", type=COUNT, default=32, metavar="N", help="for --data; default: 32")
    flag("--vae", choices=["none"], default="none", help="none: train on pixels")
    flag("--cache", metavar="DIR", help="for the decoded images; default: FOLDER-Npx")
    flag("--out", default="out", metavar="DIR", help="default: out; what is there is continued")
    for name, (tiny, paper, kind, text) in RECIPES.items():
        flag("--" + name.replace("_", "-"), type=kind, metavar="N",
             help=f"{text} (tiny: {tiny}, else: {paper})")
    flag("--accum", type=COUNT, default=1, metavar="N", help="parts of a batch, in turn")
    flag("--tangent", choices=imf.TANGENTS, default="v-head", help="direction of du/dt")
    flag("--precision", choices=["bf16", "float32"], help="default: bf16 on CUDA")
    flag("--device", help="cpu, cuda, cuda:1, mps; default: the best one here")
    flag("--seed", type=number(int, 0), default=0, metavar="N")
    flag("--log-every", type=COUNT, default=50, metavar="N", help="default: 50")
    flag("--save-every", type=COUNT, default=500, metavar="N", help="checkpoint; default: 500")
    flag("--sample-every", type=COUNT, default=500, metavar="N", help="pictures; default: 500")
    args = p.parse_args()
    patch_size = model.MODELS[args.model]["patch_size"]
    if args.data and args.image_size % patch_size:
        raise Fault(f"--image-size {args.image_size} is no multiple of the patch size {patch_size}")
    return args


def settle(args, n):
    """Fills in what the command line left open, for a data set of n images."""
    for name, recipe in RECIPES.items():
        value = recipe[args.model != "tiny"]
        if isinstance(value, str):  # so many epochs
            value = math.ceil(int(value.split()[0]) * n / args.batch_size)
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.batch_size % args.accum:
        raise Fault(f"--accum {args.accum} does not divide --batch-size {args.batch_size}")


def resume(path, settings, net, ema, optimizer):
    """Loads a checkpoint into the three and returns its (step, skipped, streak, logged).

    Raises Fault if it is damaged, or was made with other settings.
    """
    saved = sample.load_file(path)
    with sample.blame(f"{path} is no checkpoint of this program, choose another --out"):
        for key, value in settings.items():
            if saved["settings"][key] != value:
                what = "other data" if key in ("image_size", "source") else (
                    f"--{key.replace('_', '-')} {saved['settings'][key]}, not {value}")
                raise Fault(f"{path} was made with {what}: keep to that, or choose another --out")
        for part, name in ((net, "net"), (ema, "ema"), (optimizer, "optimizer")):
            part.load_state_dict(saved.pop(name))
        counts = [saved[name] for name in ("step", "skipped", "streak", "logged")]
        if any(type(n) is not int or n < 0 for n in counts):
            raise ValueError(f"its counts are {counts}")
        return counts


def peak_memory(device):
    """In GB: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main():
    args = arguments()
    device = sample.pick_device(args.device)
    if device.type == "cuda":  # the same run twice is the same, bit for bit
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_float32_matmul_precision("high")
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "float32")
    if args.data is None:
        data = Data(*digits(20_000), 10, "digits")
    else:
        cache = args.cache or f"{os.path.normpath(args.data)}-{args.image_size}px"
        data = folder_data(args.data, args.image_size, cache)
    index = np.flatnonzero(data.labels >= 0)
    settle(args, len(index))

    torch.manual_seed(args.seed)
    channels, image_size = data.images.shape[1:3]
    net = model.DiT(image_size, channels, data.num_classes, **model.MODELS[args.model]).to(device)
    ema = copy.deepcopy(net).requires_grad_(False)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(args.ema)
    optimizer = torch.optim.AdamW(
        net.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0, fused=True)

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {key: getattr(args, key) for key in SETTINGS}
    settings |= {"image_size": image_size, "source": data.source}
    settings |= {"steps": args.steps} if args.cooldown else {}
    step = skipped = streak = logged = 0
    if (out / "last.pt").exists():
        step, skipped, streak, logged = resume(out / "last.pt", settings, net, ema, optimizer)
    (out / "log.jsonl").touch()
    records = (out / "log.jsonl").read_bytes().splitlines(True)
    with sample.atomic(out / "log.jsonl") as file:
        file.writelines(records[:logged])  # what came after the checkpoint runs again

    def save():
        with sample.atomic(out / "last.pt") as file:
            torch.save({"step": step, "skipped": skipped, "streak": streak, "logged": logged,
                        "settings": settings, "net": net.state_dict(), "ema": ema.state_dict(),
                        "optimizer": optimizer.state_dict()}, file)

    def draw_sheet():  # from the same noise each time: in one step above, in two below
        classes = np.linspace(0, data.num_classes - 1, min(10, data.num_classes)).astype(int)
        images = [image for steps in (1, 2) for image in sample.generate(
            ema, range(20), classes.tolist(), args.seed, steps=steps, **sample.GUIDANCE)]
        sample.write_sheet(out / f"step-{step:06d}.png", np.concatenate(images), 10)

    stop = []
    for name in (signal.SIGINT, signal.SIGTERM):  # end the run after this step
        signal.signal(name, lambda number, _: stop.append(number))

    worker = ThreadPoolExecutor(1)  # prepares the next batch meanwhile
    prepare = functools.partial(worker.submit, batch, data, index, args)
    ahead = prepare(step)
    sums, since = np.zeros(3), (step, time.time())
    with tqdm(initial=step, total=args.steps, unit=" steps", dynamic_ncols=True) as bar:
        while step < args.steps and not stop:
            (x, y, draws), ahead = ahead.result(), prepare(step + 1)
            losses = 0
            for k in range(args.accum):
                part = slice(k, None, args.accum)
                with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                    loss, log = imf.imf_loss(net, x[part].to(device), y[part].to(device),
                                             imf.Draws(*(d[part] for d in draws)), args.tangent,
                                             args.norm_eps)
                (loss / args.accum).backward()
                losses += torch.stack((log["loss_u"], log["loss_v"])) / args.accum

            norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]).item()
            lr = args.lr * min(1, (step + 1) / max(1, args.warmup))
            if args.cooldown:
                lr *= min(1, (1 - step / args.steps) / args.cooldown)
            optimizer.param_groups[0]["lr"] = lr
            if math.isfinite(norm):
                optimizer.step()
                average(list(ema.parameters()), list(net.parameters()), None)
                sums += [*losses.tolist(), 1]
                streak = 0
            else:
                skipped, streak = skipped + 1, streak + 1
                if streak == 20:
                    raise Fault(f"step {step + 1}: no finite gradient for 20 steps. The last "
                                f"checkpoint stays in {out}; a lower --lr may help")
            optimizer.zero_grad()
            step += 1
            bar.update()

            if step % args.log_every == 0 or step == args.steps:
                loss_u, loss_v = (sums[:2] / sums[2]).tolist() if sums[2] else (None, None)
                rate = (step - since[0]) * args.batch_size / (time.time() - since[1])
                bar.set_postfix(loss_u=loss_u, loss_v=loss_v, images_per_s=round(rate, 1))
                record = {"step": step, "loss_u": loss_u, "loss_v": loss_v,
                          "grad_norm": norm if math.isfinite(norm) else None,
                          "lr": lr, "images_per_s": rate, "skipped": skipped,
                          "peak_memory_gb": peak_memory(device)}
                with open(out / "log.jsonl", "a") as file:
                    print(json.dumps(record), file=file)
                logged += 1
                sums, since = np.zeros(3), (step, time.time())
            if step % args.sample_every == 0 or step == args.steps:
                draw_sheet()
            if step % args.save_every == 0 or step == args.steps or stop:
                save()
    worker.shutdown(cancel_futures=True)
    if stop:
        sys.exit(128 + stop[0])


if __name__ == "__main__":
    sample.run(main)
