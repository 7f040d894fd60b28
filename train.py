"""Train improved MeanFlow from scratch.

    python train.py                                   digits on a laptop, a few minutes
    python train.py --data flowers --image-size 64    your own images: flowers/rose/*.jpg, ...
    torchrun --nproc-per-node=8 train.py --model XL/2 --data imagenet/train     on latents
    python train.py --tangent conditional             the original MeanFlow, for comparison

OUT (--out, default `out`) receives last.pt, log.jsonl and sheets of samples. The same command goes
on where it stopped and ends in the same weights; so does any number of processes and any --accum.
"""

import argparse, contextlib, copy, fcntl, functools, hashlib, itertools, json, math, os, resource
import signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import fid, imf, model, sample
from sample import Fault, number

COUNT, SHARE, POSITIVE = number(int, 1), number(float, 0, 1), number(float, 1e-12)

# Flag: (default for tiny, minutes on two CPU cores; for the others, the release's; type; help).
RECIPES = {
    "batch_size": (64, 1024, COUNT, "images a step"),
    "lr": (1e-2, 1e-4, POSITIVE, "learning rate"),
    "warmup": (100, "10 epochs", number(int, 0), "steps in which lr rises"),
    "cooldown": (1.0, 0.0, SHARE, "share of the steps, the last ones, in which lr falls to 0"),
    "steps": (3200, "640 epochs", COUNT, "of training"),
    "ema": (0.99, 0.9999, SHARE, "decay of the averaged weights"),
    "t_mean": (0.0, -0.4, number(float, -100, 100), "t and r are sigmoid(N(mean, std^2))"),
    "t_std": (1.6, 1.0, number(float, 0), "see --t-mean"),
    "norm_eps": (1000.0, 0.01, POSITIVE, "a sample's loss is s / (s + eps), s its square error"),
}

# What a checkpoint must agree with to be continued; the rest may change from start to start.
SETTINGS = ("model", "vae", "tangent", "precision", "seed", *RECIPES)

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
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))

def decode(paths, size):
    """The pictures in these files, uint8 (n, 3, size, size), and which are pictures, bool (n,)."""
    images, good = np.zeros((len(paths), 3, size, size), np.uint8), np.zeros(len(paths), bool)
    for i, path in enumerate(paths):
        with contextlib.suppress(Exception):  # damage may raise anything
            images[i] = np.array(centre_crop(sample.open_image(path), size)).transpose(2, 0, 1)
            good[i] = True
    return images, good

def folder_data(folder, size, cache, vae=None, rank=0, world=1):
    """(images, labels, number of classes, a hash of all) of a folder of classes. Raises Fault.
    Images are uint8 (3, size, size), with a VAE their posteriors: float16 (8, h, w), mean and std,
    mapped from a cache, which the processes of the first node fill or complete; another size, VAE
    or file in the folder needs another cache."""
    found = [sample.files(path) for path in sorted(Path(folder).iterdir())
             if path.is_dir() and path.name[0] != "."]
    if not found:
        raise Fault(f"--data {folder}: it has no sub-folders; expected one for each class")
    paths = list(itertools.chain(*found))
    labels = np.repeat(np.arange(len(found)), [len(some) for some in found])
    source = hashlib.sha256(str(size).encode())
    for weight in vae.parameters() if vae else ():
        source.update(weight.cpu().numpy())
    for path, stat in zip(paths, map(os.stat, paths)):
        facts = os.path.relpath(path, folder), stat.st_size, stat.st_mtime_ns
        source.update(repr(facts).encode())

    cache = Path(cache, source.hexdigest()[:12])
    dtype, *shape = (np.float16, 8, size // 8, size // 8) if vae else (np.uint8, 3, size, size)
    if rank == 0:
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK):  # else it should be complete
            lock = open(cache / ".lock", "w")  # until the end of this function: a second run waits
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / "x.npy").exists():
            with sample.atomic(cache / "x.npy") as file, sample.atomic(cache / "y.npy") as marks:
                np.save(marks, np.zeros(len(paths), int))  # label + 1; of no image -1; to do 0
                x = np.lib.format.open_memmap(file.name, "w+", dtype, (len(paths), *shape))
                with sample.blame(f"{cache}/x.npy, {x.nbytes / 1e6:.1f} MB"):
                    if hasattr(os, "posix_fallocate"):  # later, a full disk would be a bus error
                        os.posix_fallocate(file.fileno(), 0, x.offset + x.nbytes)
    sample.total(torch.zeros(1))  # all wait for rank 0
    with sample.blame(f"{cache} is damaged, remove it"):
        x, y = (np.load(cache / name, "r", allow_pickle=False) for name in ("x.npy", "y.npy"))
        if (x.dtype, x.shape, y.dtype, y.shape) != (dtype, (len(y), *shape), int, labels.shape) or (
                y.min() < -1 or y.max() > len(found)):
            raise ValueError("other sizes or labels")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of this node
    parts = [slice(i, i + 8) for i in range(0, len(paths), 8)]  # always 8, for the VAE's rounding
    if todo := [part for part in parts[rank::local] if rank < local and not y[part].all()]:
        x, y = (np.load(cache / name, "r+", allow_pickle=False) for name in ("x.npy", "y.npy"))
    load = DataLoader([paths[part] for part in todo], batch_size=None,
                      num_workers=os.cpu_count() // local if todo else 0,
                      collate_fn=functools.partial(decode, size=size))
    bar = tqdm(todo, "decoding", unit=" images", unit_scale=8, disable=rank > 0 or not todo)
    for part, (images, good) in zip(bar, load):
        if vae:
            posterior = vae.encode(torch.from_numpy(images).to(vae.device) / 127.5 - 1).latent_dist
            images = torch.cat((posterior.mean, posterior.std), 1).half().cpu()
        x[part] = images
        y[part] = np.where(good, labels[part] + 1, -1)
    sample.total(torch.zeros(1))
    y = np.load(cache / "y.npy", allow_pickle=False)  # what the others wrote, too
    if not y.all():
        raise Fault(f"{cache} is not complete: start again")
    good, bad = np.flatnonzero(y > 0), [paths[i] for i in np.flatnonzero(y < 0)]
    if bad and rank == 0:
        print(f"left out {len(bad)}, no images: {', '.join(bad[:5])}", file=sys.stderr)
    if len(bad) > max(10, len(paths) // 100) or len(set(y[good])) < len(found):
        raise Fault(f"--data {folder}: {len(bad)} of {len(paths)} files are no images, or a whole "
                    f"class (to try them again, remove {cache})")
    return Subset(x, good), y[good] - 1, len(found), source.hexdigest()

@functools.lru_cache(2)
def order(n, seed, epoch):
    """Of the n samples in an epoch, drawn from (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(n)

def batch(images, labels, args, rank, world, step):
    """Every world-th sample of batch number `step`: x, y and their draws, from (seed, step) alone.
    x are pixels in [-1, 1], or a fresh draw of each latent, normalised."""
    n, B, mine = len(labels), args.batch_size, slice(rank, None, world)
    i = [order(n, args.seed, k // n)[k % n] for k in range(step * B, (step + 1) * B)[mine]]
    x = torch.from_numpy(np.stack([images[k] for k in i]))
    seed = np.random.SeedSequence((args.seed, step)).generate_state(1)
    generator = torch.Generator().manual_seed(int(seed[0]))
    if x.dtype == torch.uint8:
        x = x / 127.5 - 1
    else:
        mean, std = x.float().chunk(2, 1)
        noise = torch.randn((B, *mean.shape[1:]), generator=generator)
        x = (mean + std * noise[mine] - sample.LATENT_MEAN) / sample.LATENT_STD
    draws = imf.draw(x.new_empty(B, *x.shape[1:]), generator, t_mean=args.t_mean, t_std=args.t_std)
    return x, torch.from_numpy(labels[i]), imf.Draws(*(d[mine] for d in draws))

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
        flag("--" + name.replace("_", "-"), type=kind, help=f"{text}; {tiny}, not tiny: {paper}")
    flag("--accum", type=COUNT, default=1, metavar="N", help="parts of a batch, in turn")
    flag("--checkpoint", action="store_true", help="compute activations twice, to save memory")
    flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on CUDA")
    flag("--tangent", choices=imf.TANGENTS, default="v-head", help="direction of du/dt")
    flag("--precision", choices=["bf16", "float32"], help="default: bf16 on CUDA")
    flag("--device", help="cpu, cuda, cuda:1, mps; default: the best one here")
    flag("--seed", type=number(int, 0), default=0, metavar="N", help="default: 0")
    for name, steps in ("log", 50), ("save", 500), ("sample", 500), ("fid", 5000):
        flag(f"--{name}-every", type=COUNT, default=steps, metavar="N", help=f"default: {steps}")
    flag("--fid-ref", metavar="FILE.npz", help="log the FID to these statistics, and IS")
    flag("--fid-num", type=number(int, 2), default=10_000, metavar="N", help="default: 10000")
    flag("--inception", metavar="FILE", help="for --fid-ref; default: downloaded once")
    args = p.parse_args()
    args.vae = args.vae or (sample.VAE if args.data and args.model != "tiny" else "none")
    if not args.data and (args.image_size or args.vae != "none"):
        raise Fault("--image-size and --vae need --data: the digits are 12 x 12 pixels")
    os.stat(args.init or os.curdir)  # before hours of encoding
    args.image_size = args.image_size or (32 if args.vae == "none" else 256)
    patch = model.MODELS[args.model]["patch_size"] * (1 if args.vae == "none" else 8)
    if args.data and args.image_size % patch:
        raise Fault(f"--image-size {args.image_size} is no multiple of {patch}, the patch's size")
    for name, recipe in RECIPES.items():
        if getattr(args, name) is None:
            setattr(args, name, recipe[args.model != "tiny"])
    return args

def main():
    args = arguments()
    device, rank, world = sample.join(args.device)
    cuda = device.type == "cuda"
    if args.batch_size % (args.accum * world):
        raise Fault(f"--batch-size {args.batch_size} is no multiple of {args.accum * world}, "
                    "--accum times the number of processes")
    args.precision = args.precision or ("bf16" if cuda else "float32")
    if args.fid_ref:
        reference, _ = next(fid.stored(args.fid_ref))
        if not reference:
            raise Fault(f"--fid-ref {args.fid_ref}: no mu, sigma; fid.py FOLDER --save makes them")
        inception = fid.Inception(args.inception).to(device)
        fid.warn("--fid-num", args.fid_num)
    vae = None if args.vae == "none" else sample.load_vae(args.vae, device)
    if args.data:
        cache = f"{os.path.abspath(args.data)}-{args.image_size}px{'-latents' * bool(vae)}"
        images, labels, num_classes, source = folder_data(
            args.data, args.image_size, args.cache or cache, vae, rank, world)
    else:
        images, labels, num_classes, source = *digits(20_000), 10, "digits"
    for name in ("steps", "warmup"):
        if isinstance(epochs := getattr(args, name), str):
            setattr(args, name, math.ceil(int(epochs.split()[0]) * len(labels) / args.batch_size))

    torch.manual_seed(args.seed)
    channels, image_size, _ = images[0].shape
    net = model.DiT(image_size, channels // 2 if vae else channels, num_classes,
                    **model.MODELS[args.model])
    if args.init:
        start, _ = sample.load(args.init)
        if start.v_heads is None:  # as released: where r = t it should equal u, so it is a copy
            start.v_heads, start.v_final_layer = copy.deepcopy((start.u_heads, start.u_final_layer))
        with sample.blame(f"--init {args.init} does not fit"):
            net.load_state_dict(start.state_dict())
    net.checkpoint = args.checkpoint
    net.to(device)
    ema = copy.deepcopy(net).requires_grad_(False)
    if cuda if args.compile is None else args.compile:
        net.compile()
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(args.ema)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.95), weight_decay=0, fused=True)

    states = {"net": net, "ema": ema, "optimizer": optimizer}
    settings = {key: getattr(args, key) for key in SETTINGS} | {"image_size": image_size}
    settings |= {"steps": args.cooldown and args.steps, "data": source}  # the steps shape lr
    out, journal = Path(args.out), Path(args.out, "log.jsonl")
    step = skipped = streak = logged = 0
    if (out / "last.pt").exists():
        saved = sample.load_file(out / "last.pt")
        with sample.blame(f"{out}/last.pt is no checkpoint of this program, choose another --out"):
            for key, value in settings.items():
                if key != "vae" and saved["settings"][key] != value:  # data's hash tells VAEs apart
                    flag = f"--{key.replace('_', '-')} {saved['settings'][key]}"
                    raise Fault(f"{out} was made with {flag}, not {value}: choose another --out")
            for name, state in states.items():
                state.load_state_dict(saved.pop(name))
            step, skipped, logged = (
                int.__index__(saved[name]) for name in ("step", "skipped", "logged"))
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")  # held until it is closed, at the end
        with sample.blame(f"--out {out}: another run is writing there"):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        records = journal.read_bytes().splitlines(True) if journal.exists() else []
        with sample.atomic(journal) as file:
            file.writelines(records[:logged])  # what came after the checkpoint runs again
    ddp = DistributedDataParallel(net, gradient_as_bucket_view=True) if world > 1 else net

    def draw(numbers, classes, steps=1):
        omega, t_min, t_max = sample.advised(ema, vae, steps)
        return sample.generate(ema, numbers, classes, args.seed, vae,
                               steps=steps, omega=omega, t_min=t_min, t_max=t_max)

    signals = []

    def interrupt(number, _):  # ends the run after this step, and a second one at once
        signals.append(number)
        signal.signal(number, signal.default_int_handler)

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, interrupt)
    load = functools.partial(ThreadPoolExecutor(1).submit, batch, images, labels, args, rank, world)
    ahead, stop = load(step), False  # the next batch is made while a step runs
    sums, since = torch.zeros(3, device=device), (step, time.time())
    with tqdm(initial=step, total=args.steps, unit=" steps", disable=rank > 0) as bar:
        while step < args.steps and not stop:
            (x, y, draws), ahead = ahead.result(), load(step + 1)
            losses = 0
            for k in range(args.accum):
                part = slice(k, None, args.accum)
                ddp.require_backward_grad_sync = k == args.accum - 1  # as DDP.no_sync() does
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
            end, record = step == args.steps, {}
            if step % args.log_every == 0 or end:
                loss_u, loss_v = (sample.total(sums)[:2] / sums[2]).tolist()
                rate = (step - since[0]) * args.batch_size / (time.time() - since[1])
                bar.set_postfix(loss_u=loss_u, loss_v=loss_v, images_per_s=rate)
                peak = (torch.cuda.max_memory_allocated() if cuda else resource.getrusage(
                    resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
                record = dict(loss_u=loss_u, loss_v=loss_v, grad_norm=norm, lr=lr, skipped=skipped,
                              images_per_s=rate, peak_memory_gb=peak / 1e9)
                sums, since = torch.zeros_like(sums), (step, time.time())
            if args.fid_ref and (step % args.fid_every == 0 or end):
                drawn = draw(range(args.fid_num)[rank::world], range(num_classes))
                features, logits = fid.extract(inception, drawn, args.fid_num, "fid", rank, world)
                if rank == 0:
                    record["fid"] = fid.frechet_distance(*fid.moments(features), *reference)
                    record["inception_score"] = fid.inception_score(logits)[0]
                since = step, time.time()
            if record and rank == 0:
                record = {k: v if math.isfinite(v) else None for k, v in record.items()}
                with sample.blame(f"cannot write {journal}"), open(journal, "a") as file:
                    print(json.dumps({"step": step, **record}), file=file)
            logged += bool(record)
            if rank == 0 and (step % args.sample_every == 0 or end):
                some = [k * num_classes // 10 for k in range(10)]  # a column each
                drawn = np.concatenate([x for n in (1, 2) for x in draw(range(20), some, n)])
                sample.write_sheet(out / f"step-{step:06d}.png", drawn.transpose(0, 2, 3, 1), 10)
            if rank == 0 and not streak and (step % args.save_every == 0 or end or stop):
                with sample.atomic(out / "last.pt") as file:
                    saved = {name: state.state_dict() for name, state in states.items()}
                    saved |= dict(step=step, skipped=skipped, logged=logged, settings=settings)
                    torch.save(saved, file)
    if stop:
        sys.exit(128 + (signals or [signal.SIGTERM])[0])

if __name__ == "__main__":
    sample.run(main)
