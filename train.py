"""Train improved MeanFlow from scratch.

    python train.py                                       digits, minutes on a laptop
    python train.py --data flowers --out out-flowers      your own images: flowers/rose/*.jpg, ...
    torchrun --nproc-per-node=8 train.py --model XL/2 --data imagenet/train --accum 2 --out out-xl

OUT receives last.pt, log.jsonl, samples. The same command, on any number of processes, goes on
where it stopped, with the same result. Three defaults each: tiny; others on pixels; latents."""

import argparse, copy, functools, json, math, os, shutil, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import imf, model, sample
from sample import count, positive

# flag: (for tiny, for other networks on pixels, for latents as in the release, type, help)
RECIPES = {
    "batch_size": (48, 256, 1024, count, "images per step"),
    "steps": (2400, 20_000, 640 * 1251, count, "training steps"),  # an epoch has 1251
    "lr": (2e-2, 3e-3, 1e-4, positive, "learning rate of AdamW"),
    "warmup": (100, 100, 10 * 1251, count, "steps in which the learning rate rises"),
    "cooldown": (1.0, 1.0, 0.0, float, "last fraction of the steps, in which the rate falls"),
    "ema": (0.995, 0.995, 0.9999, positive, "decay of the averaged weights"),
    "t_mean": (0.4, 0.4, -0.4, float, "t >= r are two of sigmoid(N(mean, std^2)): mean"),
    "t_std": (1.2, 1.2, 1.0, positive, "its standard deviation"),
    "one_step": (0.125, 0.0, 0.0, float, "share of a batch with r = 0, as in one-step sampling"),
    "norm_eps": (30, 30, 0.01, positive, "a sample's loss is s / (s + eps), s its summed error"),
    "save_every": (500, 1000, 5000, count, "steps between checkpoints, with a sheet of samples"),
}


def digits(n, seed=0):
    """The built-in data, a function of (n, seed): images uint8 (n, 1, 32, 32) and labels (n,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=n)
    images = np.empty((n, 1, 32, 32), np.uint8)
    fonts = [ImageFont.load_default(size) for size in range(34, 54)]
    for image, label in zip(images, labels):
        canvas = Image.new("L", (64, 64))
        font, stroke = fonts[rng.integers(len(fonts))], rng.uniform(0.75, 2.5)
        ImageDraw.Draw(canvas).text((32, 32), f"{label}", 255, font, "mm", stroke_width=stroke)
        angle, shift = rng.uniform(-12, 12), tuple(rng.uniform(-4, 4, 2))
        image[0] = canvas.rotate(angle, Image.BICUBIC, translate=shift).reduce(2)
    return images, labels


def npz_data(path):
    """(images, labels, names of the classes) of an .npz: images uint8 (n, 1 or 3, size, size)."""
    with sample.reading(path, "expected square images arr_0, and their classes 0 to K - 1, arr_1"):
        arrays = sample.read_npz(path)
        images, labels = arrays["arr_0"], arrays["arr_1"].astype(np.int64, casting="safe")
        found = np.unique(labels).tolist()
        names = [str(name) for name in arrays.get("names", found)]
        n, _, height, width = images.shape
        if height != width or labels.shape != (n,) or found != list(range(len(names))):
            raise ValueError(f"{images.shape}, {labels.shape}, classes {found}, names {names}")
        return images, labels, names


def centre_crop(image, size):
    """The centre of a PIL image, size x size, as in ADM: halved, then bicubic, then cropped."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


def encode(paths, size, vae, damaged):
    """The pictures, uint8 (n, 3, size, size), or mean and deviation of latents, (n, 8, h, w)."""
    def decode(path):
        try:
            return np.asarray(centre_crop(sample.open_image(path), size))
        except ValueError:
            damaged.append(path)  # the caller names them all at once
            return np.zeros((size, size, 3), np.uint8)

    with ThreadPoolExecutor() as pool:
        x = torch.from_numpy(np.stack(list(pool.map(decode, paths)))).permute(0, 3, 1, 2)
    if vae:
        posteriors = [vae.encode(few.to(vae.device) / 127.5 - 1).latent_dist for few in x.split(8)]
        x = torch.cat([torch.cat((p.mean, p.std), 1).half().cpu() for p in posteriors])
    return x


def prepare(args, vae, rank, world):
    """Decodes --data FOLDER once, into a folder whose path it returns. Raises ValueError."""
    # the pictures, and what tells whether they have changed (k: or were swapped)
    classes = sorted(path.name for path in Path(args.data).glob("[!.]*/"))
    if not classes:
        raise ValueError(f"--data {args.data}: expected a folder with a sub-folder for each class")
    found = [sample.images_in(Path(args.data, name)) for name in classes]
    paths, labels = sum(found, []), np.repeat(range(len(found)), [len(part) for part in found])
    beside = sum(path.is_file() for path in Path(args.data).glob("[!.]*"))
    print(f"skipped {beside} files beside the class folders")
    times = sum(k * os.stat(path).st_mtime_ns for k, path in enumerate(paths, 1))
    about = {"classes": classes, "images": [*map(len, found)], "times": times, "vae": args.vae}
    n, size = len(paths), args.image_size
    folder = os.path.abspath(args.data) + f"-{size}px" + ("-latents" if vae else "")
    if Path(folder, "about.json").exists():
        if decoded_data(folder)[2] != about:
            raise ValueError(f"{args.data} or the VAE changed: delete {folder}, give a new --out")
        return folder

    # each process decodes every world-th picture, the last one repeated to fill the last batch
    damaged = []
    for start in tqdm(range(0, n, 64 * world), "decoding", unit=" batches", disable=rank > 0):
        mine = [paths[min(i, n - 1)] for i in range(start + rank, start + 64 * world, world)]
        x = sample.interleave(encode(mine, size, vae, damaged))[:n - start].numpy()
        if rank == 0 and start == 0:
            os.makedirs(folder, exist_ok=True)
            if shutil.disk_usage(folder).free < n * x[0].nbytes:
                raise ValueError(f"{folder}: there is not enough space on the disk")
            tmp = tempfile.TemporaryDirectory(dir=folder)  # it goes, unless this process is killed
            images = np.lib.format.open_memmap(tmp.name + "/x.npy", "w+", x.dtype, (n, *x[0].shape))
        if rank == 0:
            images[start:start + len(x)] = x
    if damaged:
        raise ValueError(f"damaged, or not of 8 bits a channel: {', '.join(sorted(set(damaged)))}")
    sample.interleave([rank])  # process 0 waits here: if another one met damage, nothing is kept
    if rank == 0:
        images.flush()
        os.replace(images.filename, f"{folder}/images.npy")
        np.save(f"{folder}/labels.npy", labels)
        Path(folder, "about.json").write_text(json.dumps(about))  # where it exists, all is there
    if world > 1:
        torch.distributed.barrier()
    return folder


def decoded_data(folder):
    """(images, mapped into memory, labels, about.json) of `prepare`. Raises ValueError."""
    with sample.reading(folder, "expected what train.py decoded; if it did, delete it"):
        about = json.loads(Path(folder, "about.json").read_text())
        about = {name: about[name] for name in ("classes", "images", "times", "vae")}
        images = np.load(Path(folder, "images.npy"), mmap_mode="r")
        return images, np.load(Path(folder, "labels.npy")), about


def load_data(args, vae, rank, world):
    """(images, labels, names of the classes, where they come from). Raises ValueError."""
    if not args.data:
        return *digits(20_000), list("0123456789"), "the digits"
    folder = os.path.abspath(args.data)
    if folder.endswith(".npz"):
        return *npz_data(folder), folder
    if not Path(folder, "about.json").exists():
        folder = prepare(args, vae, rank, world)
    images, labels, about = decoded_data(folder)
    return images, labels, about["classes"], folder


@functools.lru_cache(2)
def order(n, seed, epoch):
    """The order of the n images in an epoch, drawn from (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch(images, labels, args, step, rank=0, world=1):
    """(x, y, draws) of samples rank, rank + world, ... of batch `step`, from (seed, step) alone."""
    n, B, mine = len(labels), args.batch_size, slice(rank, None, world)
    index = [order(n, args.seed, k // n)[k % n] for k in range(step * B, (step + 1) * B)[mine]]
    x = torch.from_numpy(images[index])

    # random numbers are drawn for the whole batch, whoever takes which part of it
    seed = np.random.SeedSequence((args.seed, step)).generate_state(1)
    generator = torch.Generator().manual_seed(int(seed[0]))
    if x.dtype == torch.uint8:
        x = x / 127.5 - 1
    else:  # latents are drawn afresh from their posteriors
        mean, std = x.float().chunk(2, 1)
        noise = torch.randn((B, *mean.shape[1:]), generator=generator)[mine]
        x = (mean + std * noise - sample.LATENT_MEAN) / sample.LATENT_STD
    draws = imf.draw(x.new_empty(B, *x[0].shape), generator, args.t_mean, args.t_std, args.one_step)
    return x, torch.from_numpy(labels[index]), imf.Draws(*(values[mine] for values in draws))


def arguments():
    """The command line, with the defaults of the recipe. Raises ValueError."""
    parser = sample.command_line(__doc__)
    flag = parser.add_argument
    flag("--model", default="tiny", help="tiny (default) or SIZE/PATCH: S, B, M, L, XL; XL/2, S/4")
    flag("--data", help="FOLDER with a sub-folder per class, FOLDER-32px, .npz; default: digits")
    flag("--image-size", type=count, metavar="N", help="of a FOLDER; default: 32, with a VAE 256")
    flag("--vae", metavar="NAME|none", help="of a FOLDER; default: the paper's for /2, else none")
    flag("--out", default="out", metavar="DIR", help="default: out; what is there is continued")
    for name, (tiny, pixels, latents, kind, text) in RECIPES.items():
        flag("--" + name.replace("_", "-"), type=kind, help=f"{text}: {tiny}, {pixels}, {latents}")
    flag("--seed", type=int, default=0, metavar="N", help="default: 0")
    flag("--accum", type=count, default=1, metavar="N", help="parts of a batch, one after another")
    flag("--grad-clip", type=positive, default=math.inf, metavar="NORM", help="default: none")
    flag("--predict", choices=["u", "x"], help="default: x for pixels, u for latents")
    flag("--tangent", choices=imf.TANGENTS, default="v-head", help="direction of du/dt")
    flag("--precision", choices=["bf16", "float32"], help="default: bf16 on CUDA")
    flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on CUDA")
    flag("--log-every", type=count, default=50, metavar="N", help="default: 50 steps")
    flag("--keep-every", type=count, metavar="N", help="keep the EMA of every N-th step")
    args = parser.parse_args()

    # what depends on the data and on the model
    decoded = args.data and Path(args.data, "about.json").exists()
    to_decode = args.data and not args.data.endswith(".npz") and not decoded
    if not to_decode and (args.image_size or args.vae):
        raise ValueError("--image-size and --vae are for a FOLDER of pictures alone")
    if decoded:
        args.vae = decoded_data(args.data)[2]["vae"]
    args.vae = args.vae or (sample.VAE if to_decode and args.model.endswith("/2") else "none")
    latents = args.vae != "none"
    args.image_size = args.image_size or (256 if latents else 32)
    patch = model.sizes(args.model)["patch_size"] * (8 if latents else 1)  # in pixels
    if to_decode and args.image_size % patch:
        raise ValueError(f"--image-size {args.image_size}: not a multiple of {patch}, one patch")
    recipe = 0 if args.model == "tiny" else 2 if latents else 1
    for name, values in RECIPES.items():
        if getattr(args, name) is None:
            setattr(args, name, values[recipe])
    if not (0 <= args.cooldown <= 1 and 0 <= args.one_step <= 0.5 and args.ema < 1
            and abs(args.t_mean) < 99 and args.seed >= 0):
        raise ValueError("not in range: --cooldown, --one-step (to 0.5), --ema, --t-mean or --seed")
    args.predict = args.predict or ("u" if latents else "x")
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "float32")
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    if args.batch_size % (args.accum * int(os.environ.get("WORLD_SIZE", 1))):
        raise ValueError("--batch-size: not a multiple of --accum times the number of processes")
    return args


def build(args, images, names, device):
    """(net, its average, optimizer), new."""
    sizes = model.sizes(args.model) | {"predict": args.predict}
    channels = images.shape[1] // (1 if args.vae == "none" else 2)
    torch.manual_seed(args.seed)
    net = model.DiT(images.shape[2], channels, len(names), **sizes).to(device)
    ema = copy.deepcopy(net).requires_grad_(False)
    if args.compile:
        net.compile_blocks()
    return net, ema, torch.optim.AdamW(
        net.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0, fused=True)


def resume(path, settings, net, ema, optimizer):
    """The step of a checkpoint, whose weights are loaded. Raises ValueError."""
    with sample.reading(path, "it is of another run or damaged, choose another --out"):
        saved = sample.load_file(path)
        for name, value in settings.items():
            if saved["settings"][name] != value:
                raise ValueError(f"{name} was {saved['settings'][name]}, now {value}")
        for name, state in {"net": net, "ema": ema, "optimizer": optimizer}.items():
            state.load_state_dict(saved[name])
        return int(saved["step"])


def save(path, **saved):
    """Writes a checkpoint: whole or not at all. Raises OSError."""
    unfinished = path.with_suffix(".tmp")
    try:
        torch.save(saved, unfinished)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        unfinished.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}, is the disk full? {error}") from error
    unfinished.replace(path)


def learning_rate(step, args):
    """It rises over the warm-up, and falls to 0 over the last fraction --cooldown of the steps."""
    rate = args.lr * min(1, (step + 1) / args.warmup)
    return rate * min(1, (1 - step / args.steps) / max(args.cooldown, 1e-9))


def gradients(net, x, y, draws, args, device):
    """loss_u, loss_v and the norm of the gradient of one batch, taken in --accum parts."""
    total = 0
    for k in range(args.accum):
        part = slice(k, None, args.accum)
        net.require_backward_grad_sync = k == args.accum - 1  # as DDP.no_sync() does
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss, log = imf.imf_loss(
                net, x[part].to(device), y[part].to(device),
                imf.Draws(*(values[part] for values in draws)), args.tangent, args.norm_eps)
        (loss / args.accum).backward()
        total += torch.stack((log["loss_u"], log["loss_v"])) / args.accum
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip)
    return torch.stack((*total, norm)).tolist()


@torch.no_grad()
def update_ema(ema, net, decay):
    """ema = decay * ema + (1 - decay) * net."""
    for average, p in zip(ema.parameters(), net.parameters()):
        average.lerp_(p, 1 - decay)


def write_samples(path, ema, vae, seed):
    """A sheet of ten classes: two rows in one step, two rows in two."""
    classes = [k * ema.num_classes // 10 for k in range(10)]
    images = [next(sample.generate(ema, range(20), classes, seed, vae, steps=k)) for k in (1, 2)]
    sample.write(path, np.concatenate(images), None, 10)


def write_log(path, step, history, args):
    """Adds a record of process 0: means over the steps since the last one, skipped ones apart."""
    rows = torch.tensor(history)
    finite = rows[rows[:, 2].isfinite()]  # column 2 is the norm of the gradient
    record = {"step": step, "skipped": len(rows) - len(finite), "lr": learning_rate(step - 1, args)}
    for name, value in zip(("loss_u", "loss_v", "grad_norm", "seconds"), finite.mean(0).tolist()):
        record[name] = value if math.isfinite(value) else None
    with open(path, "a") as file:
        print(json.dumps(record), file=file)
    return record


def main():
    # the data, and the run's state, new or continued
    args = arguments()
    device, rank, world = sample.join(args.device)
    vae = None if args.vae == "none" else sample.load_vae(args.vae, device)
    images, labels, names, where = load_data(args, vae, rank, world)
    net, ema, optimizer = build(args, images, names, device)
    fixed = "seed", "model", "vae", "predict", "tangent", "batch_size"  # may not change later
    settings = {name: vars(args)[name] for name in fixed}
    settings.update(data=where, images=len(images), classes=names, image_size=net.image_size)
    out, last = Path(args.out), Path(args.out, "last.pt")
    step = resume(last, settings, net, ema, optimizer) if last.exists() else 0
    out.mkdir(parents=True, exist_ok=True)
    print(f"{len(images)} images of {sample.listed(dict(enumerate(names)))}")
    print(", ".join(f"{name} {vars(args)[name]}" for name in ("model", "vae", "accum", *RECIPES)))
    print(f"{out}: step {step} of {args.steps}; to start anew, give another --out")
    parallel = DDP(net, gradient_as_bucket_view=True) if torch.distributed.is_initialized() else net

    history, good_step = [], step - 1  # the last step whose gradient was finite
    with tqdm(initial=step, total=args.steps, unit=" steps", disable=rank > 0) as bar:
        while step < args.steps:
            # the gradient of one batch
            began = time.time()
            x, y, draws = batch(images, labels, args, step, rank, world)
            loss_u, loss_v, norm = gradients(parallel, x, y, draws, args, device)

            # the update, if the gradient is finite: its norm is the same on all processes
            optimizer.param_groups[0]["lr"] = learning_rate(step, args)
            if math.isfinite(norm):
                optimizer.step()
                update_ema(ema, net, args.ema)
                good_step = step
            elif step - good_step == 100:
                raise ValueError("no finite gradient in 100 steps: lower --lr? last.pt stays")
            optimizer.zero_grad(set_to_none=False)  # DDP keeps them in its buckets
            step += 1
            if rank > 0:
                continue

            # log, samples, checkpoints, all by the first process
            history.append((loss_u, loss_v, norm, time.time() - began))
            bar.update()
            if step == args.steps or step % args.log_every == 0:
                bar.set_postfix(write_log(out / "log.jsonl", step, history, args))
                history = []
            if args.keep_every and step % args.keep_every == 0:
                save(out / f"ema-{step:06d}.pt", ema=ema.state_dict(), step=step, settings=settings)
            if step == args.steps or step % args.save_every == 0:
                save(last, net=net.state_dict(), ema=ema.state_dict(),  # before samples take memory
                     optimizer=optimizer.state_dict(), step=step, settings=settings)
                write_samples(out / f"step-{step:06d}.png", ema, vae, args.seed)


if __name__ == "__main__":
    sample.run(main)
