"""The pictures of README.md and results/README.md, and the studies behind them.

    python -m results.figures densities               samples in the plane in 1, 2 and 4 steps
    python -m results.figures tangents OUT ...        loss_u of runs with different tangents, seeds
    python -m results.figures variance [CHECKPOINT]   how much V varies at one and the same z_t
    python -m results.figures rows [CHECKPOINT]       the same noise by flow matching and by iMF
    python -m results.figures grid [CHECKPOINT]       u(z_t, 0, t) and z_t - t u of one picture
    python -m results.figures flow [CHECKPOINT]       20 steps of flow matching above one of iMF
    python -m results.figures plane (or tokens)       diagrams

They need matplotlib, run on the CPU, and write results/NAME.png, flow.gif (--out FILE: elsewhere);
the first three print figures. A CHECKPOINT is one of pixels, out/last.pt unless given."""

import argparse, json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from matplotlib import pyplot
from torch import nn

import imf, sample, train


# ---- densities: three Gaussians in the plane, whose velocity has a formula ----


MEANS, STD = torch.tensor([[-1.5, 0.5], [1.0, 1.2], [0.8, -1.0]]), 0.5


def gaussians(n, means=MEANS, std=STD):
    return means[torch.randint(len(means), (n,))] + std * torch.randn(n, means.shape[1])


def exact_v(z, t, means=MEANS, std=STD):
    """E[e - x | z_t = z] of points z (B, D), where data x are Gaussians around the means (K, D)."""
    variance = ((1 - t) * std) ** 2 + t**2
    from_means = z[:, None] - (1 - t) * means
    weights = (-from_means.square().sum(2) / (2 * variance)).softmax(1)[..., None]
    velocities = (t - (1 - t) * std**2) / variance * from_means - means
    return (weights * velocities).sum(1)


def exact_path(z, steps, means=MEANS, std=STD):
    """The points (steps + 1, B, D) at t = 1, ..., 0 of the flow from z, by the midpoint rule."""
    path = [z]
    for k in range(steps, 0, -1):
        middle = path[-1] - exact_v(path[-1], k / steps, means, std) / (2 * steps)
        path.append(path[-1] - exact_v(middle, (k - 0.5) / steps, means, std) / steps)
    return torch.stack(path)


def image(points, third):
    """Points (B, 2) as images (B, 3, 1, 1): the third channel is t, which a point does not show."""
    return nn.functional.pad(points, (0, 1), value=third)[..., None, None]


class PlaneNet(nn.Sequential):
    """What imf_loss asks of a network, and no more."""

    num_classes, predict = 0, "u"

    def forward(self, z, t, h, omega, t_min, t_max, y):
        u, v = super().forward(torch.cat((z.flatten(1), h[:, None]), 1)).chunk(2, 1)
        return image(u, 1.0), image(v, 1.0)

    def u(self, *args):
        return self(*args)[0]

    def v(self, *args):
        return self(*args)[1]


def train_in_the_plane(tangent, steps):
    """(net, loss_u of every step in the second half)."""
    net = PlaneNet(nn.Linear(4, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(),
                   nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 4))
    losses, optimizer = [], torch.optim.Adam(net.parameters())
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - k / steps)
        x = image(gaussians(512), 0.0)
        draws = imf.draw(x, t_mean=0, t_std=2, class_dropout=0)._replace(omega=torch.ones(512))
        draws.noise[:, 2] = 1
        loss, logs = imf.imf_loss(net, x, torch.zeros(512).long(), draws, tangent, norm_eps=1e3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(logs["loss_u"])
    return net, torch.stack(losses[steps // 2:])


def densities(args):
    """Prints of each tangent the relative error of u(z, 0, 1) on 2,000 points of noise, and loss_u
    over the second half of the steps; draws the densities of 50,000 samples of the last, v-head."""
    noise = torch.randn(50_000, 2, generator=torch.Generator().manual_seed(1))
    few, exact_end = noise[:2000], exact_path(noise[:2000], 500)[-1]

    def samples(z, steps):
        return imf.sample(net, image(z, 1.0), torch.zeros(len(z)), steps)[:, :2, 0, 0]

    def error(end):
        return (end - exact_end).norm() / (few - exact_end).norm()

    for tangent in reversed(imf.TANGENTS):
        torch.manual_seed(args.seed)
        net, losses = train_in_the_plane(tangent, args.steps)
        print(f"{tangent}: error {error(samples(few, 1)):.3f}, "
              f"loss_u {losses.mean():.2f} +- {losses.std():.2f}", flush=True)
    print(f"v at t = 1, taken for u: error {error(few - exact_v(few, 1)):.2f}")
    panels = [*(samples(noise, steps) for steps in (1, 2, 4)), gaussians(50_000)]
    figure, axes = pyplot.subplots(1, 4, figsize=(11, 2.9), layout="compressed")
    for axis, points, title in zip(axes, panels, ("1 step", "2 steps", "4 steps", "exact")):
        axis.hist2d(*points.T.numpy(), 100, range=((-3.4, 3), (-3.1, 3.3)), vmax=60, cmap="magma")
        axis.set(title=title, aspect="equal", xticks=(), yticks=())


# ---- tangents: the logs of runs that differ in --tangent and --seed ----


def tangents(args):
    """Prints for each tangent, run by run, the mean of loss_u over the last sixth of the records,
    and its noise: the standard deviation from record to record in the second half. Draws the first
    run of each (thin), and medians of ten records: mean of all runs (thick), their range (band)."""
    runs = {}
    for folder in args.folders:
        tangent = sample.load_file(Path(folder, "last.pt"))["settings"]["tangent"]
        log = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
        runs.setdefault(tangent, []).append([record["loss_u"] for record in log])
    steps, window = np.array([record["step"] for record in log]), min(10, len(log))
    figure, axis = pyplot.subplots(figsize=(8, 3.4))
    for tangent, losses in runs.items():
        losses, colour = np.array(losses), f"C{imf.TANGENTS.index(tangent)}"
        last = losses[:, len(steps) * 5 // 6:].mean(1)
        noise = np.diff(losses[:, len(steps) // 2:]).std(1) / 2**0.5
        print(f"{tangent}: loss_u {last.round(3)}, noise {noise.round(3)}")
        windows = np.lib.stride_tricks.sliding_window_view(losses, window, 1)
        smooth = np.median(windows, 2)
        axis.plot(steps, losses[0], colour, lw=0.7, alpha=0.6)
        axis.fill_between(steps[window - 1:], smooth.min(0), smooth.max(0), color=colour, alpha=0.2)
        axis.plot(steps[window - 1:], smooth.mean(0), colour, lw=2, label=tangent)
    shown = np.concatenate(list(runs.values()))  # the start, and single peaks, would hide the rest
    axis.set(xlabel="step", ylabel="loss_u", ylim=(0.9 * shown.min(), 1.8 * np.median(shown)))
    axis.legend()


# ---- variance: V for pairs (x, e) that all lie at the same z_t ----


@torch.no_grad()
def variance(args):
    """Prints for three times t the variance per pixel of e - x, of V along e - x (r = 0), and of
    V - (e - x), over 32 pairs (x, e) that all give one noisy digit z; means over 50 digits."""
    net, _ = sample.load(args.checkpoint)
    images, labels = train.digits(20_000)
    if (net.image_size, net.channels, net.num_classes) != (32, 1, 10):
        raise ValueError(f"{args.checkpoint} was not trained on the digits")
    one = torch.ones(32)
    for t in (0.9, 0.8, 0.7):
        found = []
        for label in labels[:50].tolist():
            # the data are known: given z, x has the weight p(z | x), and e follows from z and x
            digits = torch.from_numpy(images[labels == label]) / 127.5 - 1
            z = (1 - t) * digits[torch.randint(len(digits), ())] + t * torch.randn(1, 32, 32)
            log_weights = -(z - (1 - t) * digits).square().sum((1, 2, 3)) / (2 * t**2)
            x = digits[torch.multinomial(log_weights.softmax(0), 32, True)]
            velocity, y = (z - x) / t, torch.full((32,), label)
            where = z.repeat(32, 1, 1, 1), t * one, t * one, one, 0 * one, one, y
            V = net.u(*where) + t * imf.total_derivative(net.u, velocity, *where)
            found.append([values.var(0).mean() for values in (velocity, V, V - velocity)])
        print(f"t {t}: e - x {{:.3f}}, V {{:.3f}}, V - (e - x) {{:.3f}}".format(*np.mean(found, 0)))


# ---- rows, grid: what a trained network does ----


def start(args, n):
    """(net, noise, classes) for pictures of a checkpoint: --classes, or n. Raises ValueError."""
    net, info = sample.load(args.checkpoint)
    if info["vae"] != "none":
        raise ValueError(f"{args.checkpoint}: a network of pixels is needed")
    y = torch.tensor(args.classes or [k * net.num_classes // n for k in range(n)])
    return net, torch.randn(len(y), net.channels, net.image_size, net.image_size), y


@torch.no_grad()
def along_v(net, z, y, steps, omega):
    """z at t = 1, ..., 0 by flow matching: many small steps of the velocity, u at r = t."""
    path, omega = [z], torch.full((len(y),), omega)
    for t in torch.linspace(1, 0, steps + 1)[:-1].repeat(len(y), 1).T:
        path.append(path[-1] - imf.velocity(net.u, path[-1], t, omega, y) / steps)
    return path


def draw(pictures, width, columns=()):
    """A row for each {label: images (B, C, H, W) in [-1, 1]}."""
    figure, axes = pyplot.subplots(len(pictures), 1, figsize=(width, 3.2), layout="compressed")
    for axis, (label, x) in zip(axes, pictures.items()):
        x = nn.functional.pad(x.clamp(-1, 1).expand(-1, 3, -1, -1), (1, 1), value=1)
        axis.imshow(x.permute(2, 0, 3, 1).flatten(1, 2) / 2 + 0.5)
        axis.set(xticks=(), yticks=(), frame_on=False)
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=11)
    axis.set_xticks([x.shape[3] * (k + 0.5) for k in range(len(columns))], columns)


def rows(args):
    """Draws pictures from the same noise by flow matching (1 and 100 steps) and by u (1 step)."""
    net, z, y = start(args, 10)
    draw({"flow matching,\none step": along_v(net, z, y, 1, args.omega)[-1],
          "flow matching,\n100 steps": along_v(net, z, y, 100, args.omega)[-1],
          "average velocity,\none step": imf.sample(net, z, y, 1, args.omega)}, 10)


@torch.no_grad()
def grid(args):
    """Draws z_t, u(z_t, 0, t), z_t - t u at five times of a path."""
    net, noise, y = start(args, 1)
    z = torch.cat(along_v(net, noise, y, 5 * 20, args.omega)[:100:20])
    t = torch.tensor((1, 0.8, 0.6, 0.4, 0.2))
    u = net.u(z, t, t, torch.full((5,), args.omega), 0 * t, 0 * t + 1, y.expand(5))
    draw({"$z_t$": z, "$u(z_t, 0, t)\\,/\\,2$": u / 2, "$z_t - t\\,u$": z - imf.column(t) * u}, 6,
         [f"t = {time:.1f}" for time in t])


def flow(args):
    """Animates 20 steps of flow matching (above), and the one step of the average velocity."""
    net, z, y = start(args, 10)
    one_step, frames, zoom = imf.sample(net, z, y, 1, args.omega), [], max(1, 64 // z.shape[3])
    for k, above in enumerate(along_v(net, z, y, 20, args.omega)):
        both = torch.stack((above, one_step if k else z)).clamp(-1, 1) * 127.5 + 127.5
        sheet = both.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (2 H, n W, C)
        sheet = sheet.expand(-1, -1, 3).byte().numpy().repeat(zoom, 0).repeat(zoom, 1)
        frames.append(Image.fromarray(sheet))
    frames[0].save(args.out, save_all=True, append_images=frames[1:], loop=0,
                   duration=[800, *[140] * 19, 3000])


# ---- plane, tokens: diagrams ----


def plane(args):
    """Draws lines from data around -1.5 and 1.5 to noise, a path along v, and its chord, u."""
    means, std = torch.tensor([[-1.5], [1.5]]), 0.15
    figure, axis = pyplot.subplots(figsize=(7, 3.6))
    axis.plot((1, 0), (torch.randn(24), gaussians(24, means, std)[:, 0]), color="0.85", lw=0.8)
    times = torch.linspace(1, 0, 401)
    path = exact_path(torch.tensor([[0.01]]), 400, means, std)[:, 0, 0]
    ends = [60, 380]  # the points at t and at r
    (t, _), (z_t, z_r) = times[ends], path[ends]
    slope = exact_v(z_t.view(1, 1), t, means, std).item()
    axis.plot(times, path, "tab:blue", lw=2.5)
    axis.plot(times[ends], path[ends], "o-", color="tab:red", lw=2.5)
    axis.plot((t, t - 0.3), (z_t, z_t - 0.3 * slope), "tab:green", lw=2.5)
    for x, y, colour, text in (
            (t, z_t + 0.2, "black", "$z_t$"), (0.05, z_r + 0.2, "black", "$z_r$"),
            (0.57, -0.35, "tab:green", "$v(z_t, t)$: slope at $z_t$"),
            (0.08, -0.2, "tab:blue", "the path along $v$"),
            (0.4, 1.0, "tab:red", "$u(z_t, r, t)$: slope of the chord"),
            (0.02, -2.1, "0.5", "lines $z = (1 - t)\\,x + t\\,e$ of pairs $(x, e)$")):
        axis.text(x, y, text, color=colour, fontsize=12)
    axis.set(xlim=(-0.01, 1.01), ylim=(-2.3, 2.3), yticks=(), xlabel="time t", ylabel="z")
    axis.set_xticks((0, 1), ("t = 0\ndata", "t = 1\nnoise"))


def tokens(args):
    """Draws the sequence of tokens, the trunk, and the two heads."""
    figure, axis = pyplot.subplots(figsize=(9, 3.4))
    axis.set(xlim=(-0.2, 32.2), ylim=(-1.3, 5.7), xticks=(), yticks=(), frame_on=False)

    def box(x, y, width, text="", colour="0.93"):
        axis.add_patch(pyplot.Rectangle((x, y), width, 1, fc=colour, ec="0.3"))
        axis.text(x + width / 2, y + 0.5, text, ha="center", va="center", fontsize=10)

    left = 0
    for k, (label, n) in enumerate({
            "class\n8": 8, "omega\n4": 4, "t_min\n2": 2, "t_max\n2": 2, "h = t - r\n4": 4,
            "patches of z\n(H / p) (W / p)": 12}.items()):
        for token in range(n):
            box(left + token + 0.08, 0, 0.84, "", pyplot.get_cmap("Set3")(k))
        axis.text(left + n / 2, -0.2, label, ha="center", va="top", fontsize=9)
        left += n
    box(0, 1.7, 32, "trunk: depth - head_depth blocks (attention over all tokens, SwiGLU)")
    box(0, 3.4, 15, "u-head: head_depth blocks")
    box(17, 3.4, 15, "v-head: head_depth blocks (only to train)")
    for x, y in (16, 1.02), (7.5, 2.72), (24.5, 2.72), (7.5, 4.42), (24.5, 4.42):
        axis.annotate("", (x, y + 0.65), (x, y), arrowprops={"arrowstyle": "->", "color": "0.3"})
    axis.text(7.5, 5.15, "u (or x_u): average velocity, from the patch tokens", ha="center")
    axis.text(24.5, 5.15, "v (or x_v): velocity, from the patch tokens", ha="center")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function in (densities, tangents, variance, rows, grid, flow, plane, tokens):
        command = commands.add_parser(function.__name__, description=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("--seed", type=int, default=0)
        if function is not variance:
            kind = "gif" if function is flow else "png"
            command.add_argument("--out", default=f"results/{function.__name__}.{kind}")
        if function is tangents:
            command.add_argument("folders", nargs="+", metavar="OUT", help="of runs of train.py")
        if function is densities:
            command.add_argument("--steps", type=sample.count, default=3000)
        if function in (variance, rows, grid, flow):
            command.add_argument("checkpoint", nargs="?", default="out/last.pt")
        if function in (rows, grid, flow):
            command.add_argument("--omega", type=sample.positive, default=1.0)
            command.add_argument("--classes", type=int, nargs="+", metavar="C")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.function(args)
    if pyplot.get_fignums():
        pyplot.savefig(args.out, dpi=110, bbox_inches="tight")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    sample.run(main)
