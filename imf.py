"""Improved MeanFlow: the draws, the guided target, the loss, the sampler (arXiv 2512.02012).

    z_t = (1 - t) x + t e                    t = 1 is noise, t = 0 is data, dz/dt = v = e - x
    u(z_t, r, t) = 1/(t - r) int_r^t v       average velocity: one step is z_r = z_t - (t - r) u
    u = v - (t - r) du/dt                    the MeanFlow identity

MeanFlow regresses u on that right-hand side, with du/dt along e - x. Improved MeanFlow regresses
V = u + (t - r) sg[du/dt] on v (sg: no gradient): the same loss, but with du/dt along the network's
own velocity, so V depends on (z_t, r, t) alone, and this is an ordinary regression."""

from typing import NamedTuple

import torch
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel

MAX_OMEGA = 8  # the largest guidance scale in training
TANGENTS = ("v-head", "boundary", "conditional")


class Draws(NamedTuple):
    """The random numbers of one training step. The flow-matching samples, r = t, come first."""

    noise: torch.Tensor  # e, (B, C, H, W)
    t: torch.Tensor  # (B,), like all below
    r: torch.Tensor
    omega: torch.Tensor  # guidance scale, and the interval [t_min, t_max] in which it acts
    t_min: torch.Tensor
    t_max: torch.Tensor
    drop: torch.Tensor  # bool: this sample loses its class


def draw(x, generator=None, flow_matching=0.5, t_mean=-0.4, t_std=1, beta=1, class_dropout=0.1):
    """Draws for a batch of the shape of x (B, C, H, W), on the generator's device, else on x's.

    t is the larger, r the smaller of two draws of sigmoid(N(t_mean, t_std^2)); the first
    `flow_matching` fraction then gets r = t. omega has the density omega^-beta on [1, MAX_OMEGA].
    About the fraction `class_dropout` of the batch, all of it with r = t, loses its class."""
    B, device = len(x), x.device if generator is None else generator.device
    noise = torch.randn(x.shape, generator=generator, device=device)
    normals = torch.randn(2, B, generator=generator, device=device)
    uniform = torch.rand(4, B, generator=generator, device=device)

    # the larger of the two times is t
    r, t = torch.sigmoid(t_mean + t_std * normals).sort(0).values
    index = torch.arange(B, device=device)
    matching = index < int(B * flow_matching)

    # omega by the inverse of its cumulative distribution; flow matching is guided at all times
    omega = MAX_OMEGA ** uniform[0]
    if beta != 1:
        omega = (1 + uniform[0] * (MAX_OMEGA ** (1 - beta) - 1)) ** (1 / (1 - beta))
    t_min = torch.where(matching, 0, uniform[1] / 2)
    t_max = torch.where(matching, 1, (1 + uniform[2]) / 2)
    dropped = (uniform[3] < class_dropout).sum()
    return Draws(noise, t, torch.where(matching, t, r), omega, t_min, t_max,
                 matching & (index < dropped))


def imf_loss(net, x, y, draws, tangent="v-head", norm_eps=0.01):
    """The loss of clean data x (B, C, H, W) with classes y (B,), and {"loss_u", "loss_v"}.

    net is a DiT, or a DDP around one. tangent is the direction of du/dt: "v-head" (iMF),
    "boundary" (u at r = t; v still serves the guidance) or "conditional" (the original MeanFlow:
    v_g, which is e - x without guidance). With a small norm_eps the loss stays close to 2 and says
    nothing: each squared error is divided by itself plus norm_eps. loss_u, loss_v are the mean
    squared errors of V, v. Raises ValueError."""
    if tangent not in TANGENTS:
        raise ValueError(f"tangent {tangent!r} is none of {', '.join(TANGENTS)}")
    dit = getattr(net, "module", net)

    # omega' (omega inside the interval, else 1), the rows with r < t, the guided rows; found on the
    # device of the draws, usually the CPU: there nonzero() need not wait for the GPU
    inside = (draws.t_min <= draws.t) & (draws.t <= draws.t_max)
    guided = inside & (draws.omega != 1) & ~draws.drop
    omega_inside = to_device(torch.where(inside, draws.omega, 1), x.device)
    jvp_rows = to_device((draws.r < draws.t).nonzero()[:, 0], x.device)
    guided_rows = to_device(guided.nonzero()[:, 0], x.device)
    e, t, r, omega, t_min, t_max, drop = (to_device(values, x.device) for values in draws)
    y = torch.where(drop, dit.num_classes, y)

    # z_t, and the only pass that autograd sees
    z = (1 - column(t)) * x + column(t) * e
    u, v = net(z, t, t - r, omega, t_min, t_max, y)
    e_minus_x = e - x
    if dit.predict == "x":
        e_minus_x = dit.velocity_from(x, z, t)  # the same, but for t < 0.05

    with torch.no_grad():
        # v_g = (e - x) + (1 - 1/omega') (v_c - v_u), where v_c is guided itself: at v_c = v_g this
        # is v_u + omega' (e - x - v_u). Where r = t the interval is [0, 1], and v is v_c already
        v_c = v.clone()
        v_c[jvp_rows] = velocity(dit.v, jvp_rows, z, t, omega_inside, y)
        v_g = guided_velocity(dit, guided_rows, z, t, omega_inside, v_c, e_minus_x)

        # the direction of du/dt: this choice is all that iMF changes in MeanFlow's loss
        if tangent == "v-head":
            dz = v_c[jvp_rows]
        elif tangent == "boundary":
            dz = velocity(dit.u, jvp_rows, z, t, omega_inside, y)
        else:
            dz = v_g[jvp_rows]
        du_dt = total_derivative(dit, jvp_rows, dz, z, t, r, omega, t_min, t_max, y)

    V = u + column(t - r) * du_dt
    loss = weighted_error(V, v_g, norm_eps) + weighted_error(v, v_g, norm_eps)
    return loss, {"loss_u": (V - v_g).detach().square().mean(),
                  "loss_v": (v - v_g).detach().square().mean()}


def to_device(values, device):
    """The values on a device. With CUDA the CPU does not wait for the copy; with MPS it must."""
    return values.to(device, non_blocking=device.type == "cuda")


def column(scalars):
    """(B,) as (B, 1, 1, 1): one factor for each image."""
    return scalars.view(-1, 1, 1, 1)


def velocity(branch, rows, z, t, omega, y):
    """The velocity at z_t in these rows: u or v at h = 0, guided by omega at all times."""
    zero = torch.zeros_like(t[rows])
    return branch(z[rows], t[rows], zero, omega[rows], zero, zero + 1, y[rows])


def guided_velocity(dit, rows, z, t, omega_inside, v_c, e_minus_x):
    """v_g, the target of the regression: e - x, in these rows guided away from v_u."""
    no_class = torch.full(t.shape, dit.num_classes, device=t.device)
    v_u = velocity(dit.v, rows, z, t, torch.ones_like(t), no_class)
    v_g = e_minus_x.clone()
    v_g[rows] += column(1 - 1 / omega_inside[rows]) * (v_c[rows] - v_u)
    return v_g


def total_derivative(dit, rows, dz, z, t, r, omega, t_min, t_max, y):
    """du/dt (B, C, H, W) along the flow: in these rows a JVP with the tangents (dz, 1, 1) of
    (z, t, h = t - r); in the others, where r = t, its factor t - r is 0 and it is left at 0."""
    du_dt, one = torch.zeros_like(z), torch.ones_like(t[rows])
    with dual_level(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward derivative
        u = dit.u(make_dual(z[rows], dz), make_dual(t[rows], one),
                  make_dual((t - r)[rows], one), omega[rows], t_min[rows], t_max[rows], y[rows])
        du_dt[rows] = unpack_dual(u).tangent
    return du_dt


def weighted_error(prediction, target, norm_eps):
    """The mean of s / sg[s + norm_eps], s a sample's squared error: a large s weighs less."""
    s = (prediction - target).square().flatten(1).sum(1)
    return (s / (s + norm_eps).detach()).mean()


@torch.no_grad()
def sample(net, noise, y, steps=1, omega=1.0, t_min=0.0, t_max=1.0):
    """Images from noise (B, C, H, W) and classes y (B,), in `steps` evaluations of u.
    omega, t_min, t_max are numbers or (B,) tensors and may differ at every call."""
    omega, t_min, t_max = (
        torch.as_tensor(value, dtype=noise.dtype, device=noise.device).expand(len(y))
        for value in (omega, t_min, t_max))
    z, times = noise, torch.linspace(1, 0, steps + 1).tolist()
    for t, r in zip(times, times[1:]):
        h = torch.full_like(omega, t - r)
        z = z - (t - r) * net.u(z, torch.full_like(omega, t), h, omega, t_min, t_max, y)
    return z
