"""Train improved MeanFlow from scratch.

    python train.py                                       digits, minutes on a laptop
    python train.py --data flowers --out out-flowers      your own images: flowers/rose/*.jpg, ...
    torchrun --nproc-per-node=8 train.py --model XL/2 --data imagenet/train --accum 2 --out out-xl

OUT (--out, default `out`) receives last.pt, log.jsonl and sheets of samples. The same command
continues where it stopped and ends in the same weights. Any number of processes gives the same
weights, up to rounding."""

import argparse, copy, datetime, functools, hashlib, json, math, os, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import fid, imf, model, sample
from sample import COUNT, error_context, number

FRACTION, POSITIVE = number(float, 0, 1), number(float, 1e-12)

# flag: (default of tiny, default of the others, type, help);
# the release trains for 640 epochs, 10 of them warm-up, and an epoch of ImageNet is 1,251 steps
RECIPES = {
    "batch_size": (48, 1024, COUNT, "images per step"),
    "steps": (1700, 640 * 1251, COUNT, "training steps"),
    "lr": (1e-2, 1e-4, POSITIVE, "learning rate of AdamW"),
    "muon_lr": (0.05, 0.0, number(float, 0), "of Muon for the blocks' matrices; 0: AdamW for all"),
    "warmup": (100, 10 * 1251, number(int, 0), "steps in which the learning rate rises"),
    "cooldown": (1.0, 0.0, FRACTION, "last fraction of the steps, in which the rate falls to 0"),
    "ema": (0.995, 0.9999, FRACTION, "decay of the averaged weights"),
    "t_mean": (0.4, -0.4, number(float, -100, 100), "t >= r: two draws of sigmoid(N(mean, std^2))"),
    "t_std": (1.4, 1.0, number(float, 0), "see --t-mean"),
    "norm_eps": (0.01, 0.01, POSITIVE, "a sample's loss is s / (s + eps), s its squared error"),
    "save_every": (500, 5000, COUNT, "steps between checkpoints, each with a sheet of samples"),
}
CHUNK = 1024  # images in a file of a cache
PEAKS = {"A100": 312, "H100": 989, "H200": 989}  # dense bf16, in 10^12 operations a second


# ---- Data: images (N, C, H, W), labels (N,) and a text that identifies them ----


def digits(n, seed=0):
    """The built-in data, a pure function of (n, seed): images uint8 (n, 1, 32, 32), labels (n,),
    in Pillow's own font, varied in position, size, angle and stroke."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=n)
    images = np.empty((n, 1, 32, 32), np.uint8)
    fonts = [ImageFont.load_default(size) for size in range(34, 54)]
    for image, label in zip(images, labels):
        canvas = Image.new("L", (64, 64))
        font = fonts[rng.integers(len(fonts))]
        ImageDraw.Draw(canvas).text((32, 32), str(label), 255, font, anchor="mm",
                                    stroke_width=rng.uniform(0.75, 2.5))
        angle, shift = rng.uniform(-12, 12), tuple(rng.uniform(-4, 4, 2))
        image[0] = canvas.rotate(angle, Image.BICUBIC, translate=shift).reduce(2)
    return images, labels


def centre_crop(image, size):
    """The centre of a PIL image, size x size, as in ADM: halved, then bicubic, then cropped."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


def scan(folder):
    """(names, labels) of the images in a folder with a sub-folder per class. Raises ValueError."""
    names = [os.path.relpath(path, folder) for path in sample.images_in(folder)]
    names = [name for name in names if os.sep in name]
    if not names:
        raise ValueError(f"--data {folder}: no images in sub-folders, one for each class")
    return names, np.unique([name.split(os.sep)[0] for name in names], return_inverse=True)[1]


def encode(paths, size, flip, vae, bar):
    """The images in these files, uint8 (n, 3, size, size), with `flip` also their mirror images;
    with a VAE float16 (n, 8, h, w), mean and standard deviation of the posterior."""
    def decode(path):
        return np.array(centre_crop(sample.open_image(path), size)).transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        x = torch.from_numpy(np.stack(list(pool.map(decode, paths))))
    if flip:
        x = torch.cat((x, x.flip(3)))
    parts = []
    for part in x.split(8):
        if vae:
            posterior = vae.encode(part.to(vae.device) / 127.5 - 1).latent_dist
            part = torch.cat((posterior.mean, posterior.std), 1).half().cpu()
        parts.append(part)
        bar.update(len(part))
    return torch.cat(parts)


def folder_data(args, vae=None, rank=0, world=1):
    """The data of --data FOLDER, by way of a cache: files of CHUNK images, of which process k of n
    makes every n-th. Raises ValueError."""
    # the first process scans the folder and tells the others
    names, labels = sample.everyone(scan(args.data) if rank == 0 else None)[0]
    made_of = repr((names, args.image_size, args.flip, args.vae))
    cache = args.cache or f"{os.path.abspath(args.data)}-{args.image_size}px"
    cache = Path(cache, hashlib.sha256(made_of.encode()).hexdigest()[:12])
    cache.mkdir(parents=True, exist_ok=True)

    # a chunk appears whole, so one that exists is complete
    copies = 2 if args.flip else 1
    starts = [start for start in range(0, len(names), CHUNK)[rank::world]
              if not Path(cache, f"{start:09d}.pt").exists()]
    own = copies * sum(len(names[start:start + CHUNK]) for start in starts)
    with tqdm(total=own, desc="decoding", unit=" images", disable=rank or not own) as bar:
        for start in starts:
            part = slice(start, start + CHUNK)
            paths = [os.path.join(args.data, name) for name in names[part]]
            chunk = {"images": encode(paths, args.image_size, args.flip, vae, bar),
                     "labels": torch.tensor(labels[part]).repeat(copies),
                     "total": copies * len(names)}
            with sample.atomic(Path(cache, f"{start:09d}.pt")) as file:
                torch.save(chunk, file)
    if dist.is_initialized():  # others may still encode, for hours
        dist.barrier(dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1)))
    return cached_data(cache)


def cached_data(cache):
    """The data in the chunks of a cache, mapped into memory. Raises ValueError."""
    chunks = [sample.load_file(path) for path in sorted(Path(cache).glob("[0-9]*.pt"))]
    with error_context(f"{cache} is damaged or incomplete"):
        labels = torch.cat([chunk["labels"] for chunk in chunks]).numpy()
        images = ConcatDataset([chunk["images"] for chunk in chunks])
        if not len(images) == len(labels) == chunks[0]["total"]:
            raise ValueError(f"{len(labels)} images and labels of {chunks[0]['total']}")
        return images, labels, Path(cache).resolve().name


def npz_data(path):
    """The data in an .npz: square images uint8 (N, H, W) or (N, H, W, C) as arr_0, labels (N,) as
    arr_1. Raises ValueError."""
    images = fid.read_images(path)
    n, height, width, _ = images.shape
    with error_context(f"{path}: expected square images arr_0 and labels arr_1, from 0 on"):
        with np.load(path, allow_pickle=False) as npz:
            labels = npz["arr_1"].astype(np.int64, casting="safe")
        if height != width or labels.shape != (n,) or not 0 <= labels.min() <= labels.max() < n:
            raise ValueError(f"they are {images.shape}, and {labels.shape} from {labels.min()} to "
                             f"{labels.max()}")
    images = torch.from_numpy(images.transpose(0, 3, 1, 2))
    content = hashlib.sha256(images.numpy().tobytes() + labels.tobytes())
    return images, labels, content.hexdigest()[:12]


def load_data(args, device, rank, world):
    """(images, labels, a text that identifies them, VAE or None) of --data. Raises ValueError."""
    vae = None if args.vae == "none" else sample.load_vae(args.vae, device)
    if not args.data:
        images, labels = digits(20_000)
        return torch.from_numpy(images), labels, "digits", None
    if args.data.endswith(".npz"):
        return *npz_data(args.data), None
    if any(Path(args.data).glob("[0-9]*.pt")):
        images, labels, source = cached_data(args.data)
        if args.flip:
            raise ValueError("--flip: a cache holds its mirror images already, or none")
    else:
        images, labels, source = folder_data(args, vae, rank, world)
    if (images[0].dtype == torch.uint8) != (vae is None):
        raise ValueError(f"--data {args.data} holds {'latents' if vae is None else 'pixels'}, "
                         f"which does not fit --vae {args.vae}")
    return images, labels, source, vae


@functools.lru_cache(2)
def order(n, seed, epoch):
    """The order of the n images in an epoch, drawn from (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch(images, labels, args, step, share=0, shares=1):
    """(x, y, draws): samples share, share + shares, ... of batch `step`, from (seed, step) alone.
    x are pixels in [-1, 1], or normalised latents, drawn afresh from their posteriors."""
    n, B, mine = len(labels), args.batch_size, slice(share, None, shares)
    positions = range(step * B, (step + 1) * B)[mine]
    index = [order(n, args.seed, position // n)[position % n] for position in positions]
    seed = np.random.SeedSequence((args.seed, step)).generate_state(1)
    generator = torch.Generator().manual_seed(int(seed[0]))
    x = torch.stack([images[i] for i in index])
    if x.dtype == torch.uint8:
        x = x / 127.5 - 1
    else:
        mean, std = x.float().chunk(2, 1)
        noise = torch.randn((B, *mean.shape[1:]), generator=generator)[mine]
        x = (mean + std * noise - sample.LATENT_MEAN) / sample.LATENT_STD
    draws = imf.draw(x.new_empty(B, *x.shape[1:]), generator, t_mean=args.t_mean, t_std=args.t_std)
    return x, torch.from_numpy(labels[index]), imf.Draws(*(values[mine] for values in draws))


def own_parts(images, labels, args, rank, world, step):
    """Batch `step` of this process, in --accum parts: part k of process `rank` is every
    (world * accum)-th sample from rank + world * k on."""
    shares = world * args.accum
    return [batch(images, labels, args, step, share, shares)
            for share in range(rank, shares, world)]


# ---- Training ----


def arguments():
    """The command line, with the defaults of the model. Raises ValueError."""
    parser = sample.command_line(__doc__)
    flag = parser.add_argument
    flag("--model", choices=model.MODELS, default="tiny", help="default: tiny")
    flag("--data", help="FOLDER with a sub-folder per class, .npz or cache; default: the digits")
    flag("--image-size", type=COUNT, metavar="N", help="of a FOLDER; default: 32, with a VAE 256")
    flag("--vae", metavar="NAME|none", help="of a FOLDER; default: none for tiny, else the paper's")
    flag("--flip", action="store_true", help="train on the mirrored images of a FOLDER too")
    flag("--cache", metavar="DIR", help="where these images go, decoded; default: FOLDER-Npx")
    flag("--out", default="out", metavar="DIR", help="default: out; what is there is continued")
    for name, (tiny, paper, kind, text) in RECIPES.items():
        flag("--" + name.replace("_", "-"), type=kind, help=f"{text}; tiny {tiny}, else {paper}")
    flag("--accum", type=COUNT, default=1, metavar="N", help="parts of a batch, one after another")
    flag("--grad-checkpoint", action="store_true", help="less memory: compute activations twice")
    flag("--grad-clip", type=POSITIVE, default=math.inf, metavar="NORM", help="default: none")
    flag("--predict", choices=["u", "x"], help="default: x for pixels, u for latents")
    flag("--tangent", choices=imf.TANGENTS, default="v-head", help="direction of du/dt")
    flag("--precision", choices=["bf16", "float32"], help="default: bf16 on CUDA")
    flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on CUDA")
    flag("--deterministic", action="store_true", help="on CUDA: the same run twice, bit for bit")
    flag("--device", help="cpu, cuda, cuda:1, mps; default: the best one here")
    flag("--seed", type=number(int, 0), default=0, metavar="N", help="default: 0")
    flag("--log-every", type=COUNT, default=50, metavar="N", help="default: 50 steps")
    flag("--keep-every", type=COUNT, metavar="N", help="keep the EMA of every N-th step")
    args = parser.parse_args()

    # what depends on the model, on the data and on the machine
    for name, (tiny, paper, *_) in RECIPES.items():
        if getattr(args, name) is None:
            setattr(args, name, tiny if args.model == "tiny" else paper)
    folder = args.data and not args.data.endswith(".npz")
    if not folder and (args.image_size or args.vae or args.flip):
        raise ValueError("--image-size, --vae and --flip need --data FOLDER")
    args.vae = args.vae or (sample.VAE if folder and args.model != "tiny" else "none")
    args.image_size = args.image_size or (32 if args.vae == "none" else 256)
    unit = model.MODELS[args.model]["patch_size"] * (1 if args.vae == "none" else 8)
    if folder and args.image_size % unit:
        raise ValueError(f"--image-size {args.image_size} is no multiple of {unit}")
    args.predict = args.predict or ("x" if args.vae == "none" else "u")
    cuda = torch.cuda.is_available() and (args.device or "cuda").startswith("cuda")
    args.precision = args.precision or ("bf16" if cuda else "float32")
    args.compile = cuda if args.compile is None else args.compile
    parts = args.accum * int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % parts:
        raise ValueError(f"--batch-size {args.batch_size} is no multiple of {parts}, "
                         "--accum times the number of processes")
    return args


def start(args, images, labels, source, vae, device):
    """({"net": ..., "ema": ..., ...}, settings, step), new or continued. Raises ValueError."""
    # network, EMA and optimizers
    channels, image_size, _ = images[0].shape
    torch.manual_seed(args.seed)
    net = model.DiT(image_size, channels // 2 if vae else channels, int(labels.max()) + 1,
                    **model.MODELS[args.model], predict=args.predict)
    net.to(device).grad_checkpoint = args.grad_checkpoint
    ema = copy.deepcopy(net).requires_grad_(False)
    if args.compile:
        net.compile()
    states = {"net": net, "ema": ema, **make_optimizers(net, args)}

    # the checkpoint, if it was made with the same settings
    names = ["model", "vae", "predict", "tangent", "precision", "seed", "grad_clip", *RECIPES]
    names.remove("save_every")
    if not args.cooldown:
        names.remove("steps")  # which then do not shape the learning rate
    settings = {"data": source, "image_size": image_size}
    settings |= {name: getattr(args, name) for name in names}
    path = Path(args.out, "last.pt")
    step = resume(path, states, settings) if path.exists() else 0
    if len(set(sample.everyone(step))) > 1:
        raise ValueError(f"--out {args.out}: the processes found checkpoints of different steps")
    return states, settings, step


def resume(path, states, settings):
    """The step of a checkpoint, whose states are loaded. Raises ValueError."""
    saved = sample.load_file(path)
    with error_context(f"{path} cannot be continued, choose another --out"):
        for name, value in settings.items():
            if saved["settings"][name] != value:
                raise ValueError(f"it was made with --{name.replace('_', '-')} "
                                 f"{saved['settings'][name]}, not {value}")
        for name, state in states.items():
            state.load_state_dict(saved[name])
        return int(saved["step"])


def save(path, states, step, settings):
    saved = {name: state.state_dict() for name, state in states.items()}
    with sample.atomic(path) as file:
        torch.save(saved | {"step": step, "settings": settings}, file)


class Muon(torch.optim.Optimizer):
    """Momentum, the update of a matrix being made nearly orthogonal (Jordan et al., 2024), so that
    all its directions learn equally fast. torch's own works in bfloat16, slow on many CPUs."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                update = orthogonalise(p.grad.lerp(momentum, 0.95))
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonalise(matrix):
    """Brings all singular values near 1, by five Newton-Schulz iterations."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalise(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x


def make_optimizers(net, args):
    """{"optimizer": AdamW}, and "muon" for the matrices of the blocks if --muon-lr is not 0."""
    def for_muon(name, p):
        return args.muon_lr and p.ndim == 2 and name.startswith(("shared", "u_heads", "v_heads"))

    matrices = [p for name, p in net.named_parameters() if for_muon(name, p)]
    others = [p for name, p in net.named_parameters() if not for_muon(name, p)]
    adamw = torch.optim.AdamW(others, args.lr, betas=(0.9, 0.95), weight_decay=0, fused=True)
    if not matrices:
        return {"optimizer": adamw}
    return {"optimizer": adamw, "muon": Muon(matrices, {"lr": args.muon_lr})}


def schedule(step, args):
    """The factor of all learning rates: it rises over the warm-up, and falls to 0 over the last
    fraction --cooldown of the steps."""
    factor = min(1, (step + 1) / max(1, args.warmup))
    if args.cooldown:
        factor *= min(1, (1 - step / args.steps) / args.cooldown)
    return factor


def gradients(net, parts, args, device):
    """loss_u, loss_v and the norm of the gradient of one batch, given in parts."""
    total = 0
    for k, (x, y, draws) in enumerate(parts, 1):
        if device.type == "cuda":  # the GPU copies from pinned memory by itself
            x, draws = x.pin_memory(), draws._replace(noise=draws.noise.pin_memory())
        x, y = imf.to_device(x, device), imf.to_device(y, device)
        net.require_backward_grad_sync = k == len(parts)  # as DDP.no_sync() does
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss, log = imf.imf_loss(net, x, y, draws, args.tangent, args.norm_eps)
        (loss / len(parts)).backward()
        total += torch.stack((log["loss_u"], log["loss_v"])) / len(parts)
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip, foreach=True)
    return torch.stack((*total, norm)).tolist()


@torch.no_grad()
def update(net, ema, optimizers, rates, decay):
    """One step of the optimizers, and of the EMA: ema = decay * ema + (1 - decay) * net."""
    for optimizer, rate in zip(optimizers, rates):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def write_samples(path, ema, vae, seed):
    """A sheet of ten classes: two rows in one step, two rows in two."""
    classes = [k * ema.num_classes // 10 for k in range(10)]
    images = [part for steps in (1, 2)
              for part in sample.generate(ema, range(20), classes, seed, vae, steps=steps)]
    sample.write_sheet(path, np.concatenate(images), 10)


def count_operations(net, x, y, draws):
    """Floating-point operations of the iMF loss and its gradient, counted on shapes alone."""
    state = {name: value.to("meta") for name, value in net.state_dict().items()}
    net = model.from_state(state, net.image_size, net.predict)
    with FlopCounterMode(display=False) as counter:
        imf.imf_loss(net, x.to("meta"), y.to("meta"), draws)[0].backward()
    return counter.get_total_flops()


def write_log(path, record, device):
    if device.type == "cuda":
        record["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        for name, peak in PEAKS.items():
            if "tera_ops_per_s" in record and name in torch.cuda.get_device_name():
                record["mfu"] = record["tera_ops_per_s"] / peak  # model FLOPs utilisation
    finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
    with error_context(f"cannot write {path}"), open(path, "a") as file:
        print(json.dumps(finite), file=file)


def trim_log(path, step):
    """Drops the records made after the checkpoint of this step, which are made again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_bytes().splitlines(True) if path.exists() else []
    with sample.atomic(path) as file:
        file.writelines(line for line in lines
                        if line.endswith(b"}\n") and json.loads(line)["step"] <= step)


def catch_signals():
    """A list of 0 and of the signals that arrive from now on, which no longer end the process."""
    signals = [0]
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda signum, frame: signals.append(signum))
    return signals


def main():
    # the data, and the run's state, new or continued
    args = arguments()
    device, rank, world = sample.join(args.device, args.deterministic)
    images, labels, source, vae = load_data(args, device, rank, world)
    states, settings, step = start(args, images, labels, source, vae, device)
    net, ema, *optimizers = states.values()
    parallel = net
    if dist.is_initialized():
        parallel = DistributedDataParallel(net, gradient_as_bucket_view=True)
    pool = ThreadPoolExecutor(1)  # it makes each batch while the one before is used
    data = images, labels, args, rank, world
    next_parts = pool.submit(own_parts, *data, step)
    tera_ops = args.accum * count_operations(ema, *next_parts.result()[0]) / 1e12
    out = Path(args.out)
    if rank == 0:
        trim_log(out / "log.jsonl", step)

    signals, stop, history = catch_signals(), 0, []
    with tqdm(initial=step, total=args.steps, unit=" steps", disable=rank > 0) as bar:
        while step < args.steps and not stop:
            # the gradient of one batch, and the update if it is finite
            began = time.time()
            parts = next_parts.result()
            next_parts = pool.submit(own_parts, *data, step + 1)
            factor = schedule(step, args)
            loss_u, loss_v, norm = gradients(parallel, parts, args, device)
            if math.isfinite(norm):
                update(net, ema, optimizers, (args.lr * factor, args.muon_lr * factor), args.ema)
            net.zero_grad()
            history.append((loss_u, loss_v, norm, time.time() - began))
            step += 1
            bar.update()
            end = step == args.steps
            stop = max(sample.everyone(signals[-1]))  # all end when one was told to

            # the log: means of all steps since the last record
            if step % args.log_every == 0 or end:
                every = np.array(sample.everyone(history))
                loss_u, loss_v, norm, _ = every.mean((0, 1)).tolist()
                seconds = every[0, :, 3].mean()  # the others also wait for what process 0 writes
                record = {"step": step, "loss_u": loss_u, "loss_v": loss_v, "grad_norm": norm,
                          "lr": args.lr * factor, "images_per_s": args.batch_size / seconds,
                          "tera_ops_per_s": tera_ops / seconds}
                history = []
                bar.set_postfix(record)
                if rank == 0:
                    write_log(out / "log.jsonl", record, device)

            # samples and checkpoints; last.pt comes last: what a kill prevents is made again
            due = step % args.save_every == 0
            if rank == 0 and (end or due and not stop):
                write_samples(out / f"step-{step:06d}.png", ema, vae, args.seed)
            if rank == 0 and args.keep_every and step % args.keep_every == 0:
                save(out / f"ema-{step:06d}.pt", {"ema": ema}, step, settings)
            if rank == 0 and (end or due or stop):
                save(out / "last.pt", states, step, settings)
    sample.everyone()  # nobody leaves before the checkpoint is written
    if stop:
        sys.exit(128 + stop)


if __name__ == "__main__":
    sample.run(main)
