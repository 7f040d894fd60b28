"""The pictures and studies of results/README.md that train something of their own or read logs.

    python -m results.figures field                   a learned field beside the exact one
    python -m results.figures tangents OUT ...        loss_u of runs with different tangents, seeds
    python -m results.figures variance [CHECKPOINT]   how much V varies at one and the same z_t
    python -m results.figures rows [CHECKPOINT]       the same noise by flow matching and by iMF

    python -m results.figures plane (or tokens)       the diagrams of README.md

All but `variance` draw results/NAME.png (--out FILE: elsewhere) and need matplotlib: pip install
matplotlib. `field`, `tangents` and `variance` print the figures that results/README.md gives."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import imf
import sample
import train

COLOURS = {"conditional": "tab:red", "boundary": "tab:orange", "v-head": "tab:blue"}


def pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("this picture needs matplotlib: pip install matplotlib") from error
    matplotlib.use("agg")
    from matplotlib import pyplot
    return pyplot


def save_picture(figure, path, dpi):
    figure.tight_layout()
    with sample.atomic(path) as file:
        figure.savefig(file, format="png", dpi=dpi, bbox_inches="tight")
    print(f"wrote {path}")


# ---- field: three Gaussians in the plane, whose velocity has a formula ----


MEANS = torch.tensor([[-1.5, 0.5], [1.0, 1.2], [0.8, -1.0]])
STD = 0.5


def exact_v(z, t, means=MEANS, std=STD):
    """E[e - x | z_t = z] of points z (B, D) at a time t > 0: data are Gaussians around the means
    (K, D)."""
    variance = ((1 - t) * std) ** 2 + t**2
    from_means = z[:, None] - (1 - t) * means
    weights = (-from_means.square().sum(2) / (2 * variance)).softmax(1)[..., None]
    velocities = (t - (1 - t) * std**2) / variance * from_means - means
    return (weights * velocities).sum(1)


def exact_u(z, steps=500):
    """u(z, 0, 1), the mean of v on the way from t = 1 to 0, by the midpoint rule."""
    end = z
    for k in range(steps, 0, -1):
        middle = end - exact_v(end, k / steps) / (2 * steps)
        end = end - exact_v(middle, (k - 0.5) / steps) / steps
    return z - end


def image(points, third):
    """Points (B, 2) as images (B, 3, 1, 1) with this third channel: 0 in data, 1 in noise, and so
    t in z_t. In the plane a point does not show its time, as a noisy image does."""
    return nn.functional.pad(points, (0, 1), value=third)[..., None, None]


class PlaneNet(nn.Module):
    """What imf_loss asks of a network, and no more."""

    num_classes = 0
    predict = "u"

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(),
            nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 4))

    def forward(self, z, t, h, omega, t_min, t_max, y):
        u, v = self.layers(torch.cat((z.flatten(1), h[:, None]), 1)).chunk(2, 1)
        return image(u, 1.0), image(v, 1.0)

    def u(self, *args):
        return self(*args)[0]

    def v(self, *args):
        return self(*args)[1]


def train_in_the_plane(tangent, steps, seed):
    """(net, loss_u of every step, the last batch of data)."""
    torch.manual_seed(seed)
    net, losses = PlaneNet(), []
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    y = torch.zeros(512, dtype=torch.long)
    for _ in range(steps):
        points = MEANS[torch.randint(3, (512,))] + STD * torch.randn(512, 2)
        x = image(points, 0.0)
        draws = imf.draw(x, t_mean=0, t_std=2, class_dropout=0)
        draws.noise[:, 2] = 1
        draws.omega[:] = 1  # no guidance
        loss, logs = imf.imf_loss(net, x, y, draws, tangent, norm_eps=1e3)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(logs["loss_u"])
    return net, torch.stack(losses), points


@torch.no_grad()
def learned_u(net, points):
    one = torch.ones(len(points))
    return net.u(image(points, 1.0), one, one, one, 0 * one, one, 0 * one)[:, :2, 0, 0]


def draw_field(pyplot, net, points):
    line = torch.stack((torch.linspace(-2.5, 2.5, 201), torch.full((201,), -0.5)), 1)
    exact, learned, first = exact_u(line), learned_u(net, line), exact_v(line, 1)
    figure, (plane, along) = pyplot.subplots(1, 2, figsize=(9.6, 3.6), width_ratios=(5, 6))
    plane.plot(*points.T, ".", color="0.8", ms=3)
    plane.quiver(*line[::8].T, *-learned[::8].T, angles="xy", scale_units="xy", scale=1,
                 width=0.004)
    plane.plot(*(line - exact).T, "tab:orange", label="where the exact flow ends")
    plane.set(title="one learned step from t = 1", aspect="equal")
    plane.legend(fontsize=8)
    for k, colour in enumerate(("tab:blue", "tab:green")):
        along.plot(line[:, 0], exact[:, k], colour, label=f"exact u, coordinate {k + 1}")
        along.plot(line[:, 0], learned[:, k], "k--", lw=1, label=("learned", None)[k])
        along.plot(line[:, 0], first[:, k], colour, ls=":", lw=1, label=("v at t = 1", None)[k])
    along.set(title="u(z, 0, 1) along the row of arrows", ylim=(-1.9, 1.1))
    along.legend(fontsize=8, loc="lower right")
    return figure


def field(args):
    """Prints of each tangent the relative error of u(z, 0, 1) on 2,000 points of noise, and loss_u
    over the second half of the steps; then draws the field of the last, v-head."""
    plot = pyplot()
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))
    exact = exact_u(noise)

    def error(u):
        return ((u - exact).norm() / exact.norm()).item()

    for tangent in COLOURS:
        net, losses, points = train_in_the_plane(tangent, args.steps, args.seed)
        late = losses[args.steps // 2:]
        print(f"{tangent}: error {error(learned_u(net, noise)):.3f}, "
              f"loss_u {late.mean():.2f} +- {late.std():.2f}", flush=True)
    print(f"v at t = 1, taken for u: error {error(exact_v(noise, 1)):.2f}")
    save_picture(draw_field(plot, net, points), args.out or "results/field.png", 90)


# ---- tangents: the logs of runs that differ in --tangent and --seed ----


def read_runs(folders):
    """(the steps of the logs, {tangent: loss_u (seeds, records)}) of runs. Raises ValueError."""
    found, steps = {}, None
    for folder in folders:
        settings = sample.load_file(Path(folder, "last.pt"))["settings"]
        records = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
        if steps not in (None, [record["step"] for record in records]):
            raise ValueError(f"{folder}: its log has other steps than that of {folders[0]}")
        steps = [record["step"] for record in records]
        losses = [record["loss_u"] for record in records]
        found.setdefault(settings["tangent"], []).append((settings["seed"], losses))
    if len(steps) < 4:
        raise ValueError("at least 4 records are needed in each log, see --log-every of train.py")
    return np.array(steps), {
        tangent: np.array([losses for _, losses in sorted(found[tangent])])
        for tangent in COLOURS if tangent in found}


def tangents(args):
    """Prints for each tangent, seed by seed, the mean of loss_u over the last sixth of the records,
    and its noise: the standard deviation from record to record in the second half. Draws both."""
    plot = pyplot()
    steps, runs = read_runs(args.folders)
    window = min(10, len(steps))
    figure, (one, every) = plot.subplots(1, 2, figsize=(9.6, 3.4))
    for tangent, losses in runs.items():
        last = losses[:, len(steps) * 5 // 6:].mean(1)
        noise = np.diff(losses[:, len(steps) // 2:]).std(1) / 2**0.5
        print(f"{tangent}: loss_u {last.round(3)}, noise {noise.round(3)}")
        one.plot(steps, losses[0], COLOURS[tangent], lw=0.8, label=tangent)
        smooth = np.array([np.convolve(row, np.ones(window) / window, "valid") for row in losses])
        late = steps[window - 1:]
        every.fill_between(late, smooth.min(0), smooth.max(0), color=COLOURS[tangent], alpha=0.25,
                           lw=0)
        every.plot(late, smooth.mean(0), COLOURS[tangent])
    every_steps = steps[1] - steps[0]
    one.set(title=f"loss_u, first seed, means of {every_steps} steps", xlabel="step")
    every.set(title=f"means of {window * every_steps} steps, all seeds and their range",
              xlabel="step")
    one.set_ylim(0.2, 0.55)
    every.set_ylim(0.2, 0.45)
    one.legend()
    save_picture(figure, args.out or "results/tangents.png", 80)


# ---- variance: V for pairs (x, e) that all lie at the same z_t ----


def pairs_at_one_point(digits, t, n):
    """(z, e - x of n pairs): z a noisy digit, the pairs drawn from all that give this z. The data
    are known, so they can be: x has the weight p(z | x), and e follows from z and x."""
    z = (1 - t) * digits[torch.randint(len(digits), ())] + t * torch.randn(digits.shape[1:])
    log_weights = -(z - (1 - t) * digits).square().sum((1, 2, 3)) / (2 * t**2)
    x = digits[torch.multinomial(log_weights.softmax(0), n, True)]
    return z.expand_as(x).contiguous(), (z - x) / t


@torch.no_grad()
def conditional_V(net, z, t, velocity, label):
    """V = u + t du/dt with r = 0 and omega 1, the JVP along each pair's own e - x."""
    one = torch.ones(len(z))
    y = torch.full((len(z),), label)

    def u(z, t, h):
        return net.u(z, t, h, one, 0 * one, one, y)

    with sdpa_kernel(SDPBackend.MATH):
        u, du_dt = torch.func.jvp(u, (z, t * one, t * one), (velocity, one, one))
    return u + t * du_dt


def variance(args):
    """Prints for three times t, of 50 noisy digits and 32 pairs each: the variance per pixel of
    e - x, of V along e - x, and of their difference. (Along v_theta, V is the same for all.)"""
    net, _ = sample.load(args.checkpoint)
    images, labels = train.digits(20_000)
    if (net.image_size, net.channels, net.num_classes) != (images.shape[2], 1, 10):
        raise ValueError(f"{args.checkpoint} was not trained on the digits")
    torch.manual_seed(args.seed)
    for t in (0.9, 0.8, 0.7):
        found = []
        for label in labels[:50].tolist():
            digits = torch.from_numpy(images[labels == label]) / 127.5 - 1
            z, velocity = pairs_at_one_point(digits, t, 32)
            V = conditional_V(net, z, t, velocity, label)
            found.append([values.var(0).mean() for values in (velocity, V, V - velocity)])
        target, of_V, error = np.mean(found, 0)
        print(f"t {t}: e - x {target:.3f}, V {of_V:.3f}, V - (e - x) {error:.3f}")


# ---- plane, tokens: the diagrams of README.md ----


def plane(args):
    """Draws, for data around -1.5 and 1.5 on a line: straight lines from data to noise, the path on
    which their mean velocity v leads, and its chord, whose slope is u."""
    plot = pyplot()
    means, std, steps = torch.tensor([[-1.5], [1.5]]), 0.15, 400
    torch.manual_seed(args.seed)
    figure, axis = plot.subplots(figsize=(7, 3.2))
    x = means[torch.arange(24) % 2] + std * torch.randn(24, 1)
    ends = torch.cat((x, torch.randn(24, 1)), 1)
    axis.plot((0, 1), ends.T, color="0.8", lw=0.8)

    # backwards from z_1 by the midpoint rule
    times = torch.linspace(1, 0, steps + 1)
    path = [torch.tensor([[0.2]])]
    for t in times[:-1]:
        middle = path[-1] - exact_v(path[-1], t, means, std) / (2 * steps)
        path.append(path[-1] - exact_v(middle, t - 1 / (2 * steps), means, std) / steps)
    path = torch.cat(path)[:, 0]
    axis.plot(times, path, "tab:blue", lw=2.5)
    late, early = round(0.08 * steps), round(0.85 * steps)  # of t and of r
    axis.plot(times[[early, late]], path[[early, late]], "o-", color="tab:red", lw=2.5)
    axis.annotate("", (times[late] - 0.3, path[late] - 0.3 * exact_v(
        path[late].view(1, 1), times[late], means, std).item()), (times[late], path[late]),
        arrowprops={"arrowstyle": "-", "lw": 2.5, "color": "tab:green"})

    notes = {"$z_t$": (late, 0.01, 0.2), "$z_r$": (early, 0, 0.25)}
    for text, (k, right, up) in notes.items():
        axis.text(times[k] + right, path[k] + up, text, fontsize=13)
    axis.text(0.6, -0.35, "$v(z_t, t)$: slope at $z_t$", color="tab:green", fontsize=11)
    axis.text(0.2, 0.05, "the path along $v$", color="tab:blue", fontsize=11)
    axis.text(0.42, 1.3, "$u(z_t, r, t)$: slope of the chord", color="tab:red", fontsize=11)
    axis.text(0.02, -2.25, "lines $z = (1 - t)\\,x + t\\,e$ of pairs $(x, e)$", color="0.5",
              fontsize=11)
    axis.set(xlim=(-0.01, 1.01), ylim=(-2.5, 2.5), xticks=(0, 1), yticks=(), xlabel="time t")
    axis.set_xticklabels(("t = 0\ndata", "t = 1\nnoise"))
    save_picture(figure, args.out or "results/plane.png", 110)


def tokens(args):
    """Draws the sequence of tokens, the trunk, and the two heads."""
    plot = pyplot()
    figure, axis = plot.subplots(figsize=(9, 3.4))
    groups = [("class", 8, "tab:purple"), ("omega", 4, "tab:orange"), ("t_min", 2, "tab:olive"),
              ("t_max", 2, "tab:green"), ("h = t - r", 4, "tab:cyan"),
              ("patches of z", 12, "tab:blue")]
    left = 0
    for name, n, colour in groups:
        for k in range(n):
            axis.add_patch(plot.Rectangle((left + k + 0.08, 0), 0.84, 0.9, color=colour, alpha=0.7))
        axis.text(left + n / 2, -0.25, name, ha="center", va="top", fontsize=9)
        label = f"{n}" if name != "patches of z" else "(H / p) (W / p)"
        axis.text(left + n / 2, -0.9, label, ha="center", va="top", fontsize=8, color="0.4")
        left += n

    def box(x, y, width, text):
        axis.add_patch(plot.Rectangle((x, y), width, 1, fc="0.93", ec="0.3"))
        axis.text(x + width / 2, y + 0.5, text, ha="center", va="center", fontsize=10)

    def arrow(start, end):
        axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "0.3"})

    box(0, 1.6, left, "trunk: depth - head_depth blocks (attention over all tokens, SwiGLU)")
    box(0, 3.4, 15, "u-head: head_depth blocks")
    box(left - 15, 3.4, 15, "v-head: head_depth blocks (only to train)")
    arrow((left / 2, 0.95), (left / 2, 1.55))
    for x, name in ((7.5, "u (or x_u): average velocity"), (left - 7.5, "v (or x_v): velocity")):
        arrow((x, 2.65), (x, 3.35))
        arrow((x, 4.45), (x, 5.05))
        axis.text(x, 5.15, f"{name}, from the patch tokens", ha="center", fontsize=10)
    axis.set(xlim=(-0.2, left + 0.2), ylim=(-1.5, 5.7))
    axis.axis("off")
    save_picture(figure, args.out or "results/tokens.png", 110)


# ---- rows: what the average velocity is good for ----


class FlowMatching:
    """The v-head alone as a network of imf.sample: dz/dt = v, with no notion of a long step."""

    def __init__(self, net):
        self.net, self.channels, self.image_size = net, net.channels, net.image_size
        self.parameters, self.shared_blocks, self.u_heads = net.parameters, (), ()

    def u(self, z, t, h, omega, t_min, t_max, y):
        return self.net.v(z, t, 0 * h, omega, 0 * t_min, 0 * t_max + 1, y)


def rows(args):
    """Draws three rows of images from the same noise: flow matching in one step and in 100 steps,
    and the average velocity in one step."""
    plot = pyplot()
    net, info = sample.load(args.checkpoint)
    if net.v_heads is None or info["vae"] != "none":
        raise ValueError(f"{args.checkpoint}: a network of pixels with a v-head is needed")
    kinds = {"flow matching,\none step": (FlowMatching(net), 1),
             "flow matching,\n100 steps": (FlowMatching(net), 100),
             "average velocity,\none step": (net, 1)}
    figure, axes = plot.subplots(3, 1, figsize=(10, 3.3))
    for axis, (name, (kind, steps)) in zip(axes, kinds.items()):
        batches = sample.generate(kind, range(10), range(net.num_classes), args.seed, steps=steps,
                                  omega=args.omega)
        images = np.pad(np.concatenate(list(batches)), ((0, 0), (0, 0), (1, 1), (1, 1)))
        axis.imshow(images.transpose(2, 0, 3, 1).reshape(images.shape[2], -1, 3))
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    save_picture(figure, args.out or "results/rows.png", 100)


def main():
    parser = sample.command_line(__doc__)
    commands = parser.add_subparsers(required=True)
    for function in (field, tangents, variance, plane, tokens, rows):
        command = commands.add_parser(function.__name__, description=function.__doc__)
        command.set_defaults(function=function)
        flag = command.add_argument
        if function is tangents:
            flag("folders", nargs="+", metavar="OUT", help="--out of a run of train.py")
        elif function is not tokens:
            flag("--seed", type=sample.number(int, 0), default=0)
        if function is field:
            flag("--steps", type=sample.number(int, 2), default=3000)
        if function in (variance, rows):
            flag("checkpoint", nargs="?", default="out/last.pt")
        if function is rows:
            flag("--omega", type=sample.number(float, 1e-6), default=1)
        if function is not variance:
            flag("--out", metavar="FILE.png")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    sample.run(main)
