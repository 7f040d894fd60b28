"""Improved MeanFlow: the random draws, the loss, the sampler (arXiv 2512.02012).

    z_t = (1 - t) x + t e                     x data, e noise; t = 1 is pure noise, t = 0 is data
    v(z_t) = E[e - x | z_t]                   marginal velocity, the mean over all pairs (x, e) that
                                              meet at z_t of their conditional velocities e - x
    u(z_t, r, t) = 1/(t - r) int_r^t v dtau   average velocity: one step is z_r = z_t - (t - r) u
    u = v - (t - r) du/dt                     MeanFlow identity, du/dt along the flow dz/dt = v

MeanFlow regresses u on the right side with e - x for v, sg[(e - x) - (t - r) du/dt]; sg, the stop-
gradient, makes a constant of it. Improved MeanFlow solves the identity for v, and regresses
V = u + (t - r) sg[du/dt] on e - x. Both minimise the square of the same difference. What is new is
the direction of du/dt: MeanFlow takes e - x, which no network can know from z_t; improved MeanFlow
takes the network's own v(z_t), so V depends on (z_t, r, t) alone: an ordinary regression."""

from typing import NamedTuple

import torch
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel

TANGENTS = ("v-head", "boundary", "conditional")


class Draws(NamedTuple):
    """The random numbers of one training step. The samples with r = t come first."""

    noise: torch.Tensor  # e, (B, C, H, W)
    t: torch.Tensor  # (B,), like all below
    r: torch.Tensor
    omega: torch.Tensor  # guidance scale, and the interval [t_min, t_max] in which it acts
    t_min: torch.Tensor
    t_max: torch.Tensor
    drop: torch.Tensor  # bool: this sample loses its class; only samples with r = t do


def draw(x, generator=None, t_mean=-0.4, t_std=1.0, one_step=0.0, class_dropout=0.1):
    """Draws for a batch of the shape of x (B, C, H, W), on the generator's device, else on x's. The
    first half has r = t: slices can leave out du/dt. The last, a share `one_step`, has r = 0."""
    B, device = len(x), x.device if generator is None else generator.device
    noise = torch.randn(x.shape, generator=generator, device=device)
    normals = torch.randn(2, B, generator=generator, device=device)
    for_omega, for_t_min, for_t_max, for_drop = torch.rand(4, B, generator=generator, device=device)

    # two logit-normal times: t is the larger one, r the smaller one, t itself or 0
    r, t = torch.sigmoid(t_mean + t_std * normals).sort(0).values
    m = B // 2
    r[:m] = t[:m]
    r[B - int(B * one_step):] = 0

    # omega: density ~ 1 / omega on [1, 8]. Where r = t it acts at all times: imf_loss needs this
    omega = 8 ** for_omega
    t_min, t_max = for_t_min / 2, (1 + for_t_max) / 2
    t_min[:m], t_max[:m] = 0, 1

    # as in the release, a tenth of all samples lose their class, and these are the first ones
    drop = torch.arange(B, device=device) < (for_drop < class_dropout).sum().clamp(max=m)
    return Draws(noise, t, r, omega, t_min, t_max, drop)


def imf_loss(net, x, y, draws, tangent="v-head", norm_eps=0.01):
    """(loss, {"loss_u", "loss_v"}) of data x (B, C, H, W), pixels from -1 to 1, of classes y (B,).

    net is a DiT, or a DistributedDataParallel around one. loss_u and loss_v are the mean squared
    errors of V and v; the loss itself is near 2 if norm_eps is small (see weighted_error). tangent,
    the direction of du/dt, is "v-head" (iMF), "boundary" (u at r = t; the v-head is trained all the
    same, for v_g) or "conditional" (the original MeanFlow). ValueError: another, or no v-head."""
    dit = getattr(net, "module", net)  # the DiT in a DDP: what needs no gradients goes around DDP
    m = int((draws.r < draws.t).int().argmax())  # [:m] have r = t (if all have, m = 0 is right too)
    e, t, r, omega, t_min, t_max, drop = (values.to(x.device) for values in draws)
    y = torch.where(drop, dit.num_classes, y)  # the index num_classes means "no class"
    h = t - r

    # u and the v-head's v at z_t: the only evaluation that carries gradients
    z = (1 - column(t)) * x + column(t) * e
    u, v = net(z, t, h, omega, t_min, t_max, y)

    with torch.no_grad():
        # the network is told omega and its interval; the target is guided by omega': omega inside
        # the interval, 1 (no guidance) outside, and 1 where the class is dropped
        guided = (t_min <= t) & (t <= t_max) & ~drop
        omega_prime = torch.where(guided, omega, 1)

        # v_c: with class, guided by omega'; v_u: with neither; both at h = 0, interval [0, 1].
        # v[:m] had just these: it is v_c (where the class is dropped, v_g has 0 times v_c)
        v_c = torch.cat((v[:m], velocity(dit.v, z[m:], t[m:], omega_prime[m:], y[m:])))
        v_u = velocity(dit.v, z, t, torch.ones_like(t), torch.full_like(y, dit.num_classes))

        # the guided target: trained on it, v_c becomes v_u + omega' (E[e - x | z, y] - v_u), usual
        # guidance. e - x is (z - x) / t, but a network that predicts x divides by max(t, 0.05)
        conditional_v = e - x if dit.predict == "u" else dit.velocity_from(x, z, t)
        v_g = conditional_v + column(1 - 1 / omega_prime) * (v_c - v_u)

        # the direction of du/dt: this choice is all that iMF changes in MeanFlow's loss_u
        if tangent == "v-head":
            dz = v_c[m:]  # v, guided
        elif tangent == "boundary":
            dz = velocity(dit.u, z[m:], t[m:], omega_prime[m:], y[m:])
        elif tangent == "conditional":
            dz = v_g[m:]  # e - x, guided
        else:
            raise ValueError(f"tangent {tangent!r} is none of {', '.join(TANGENTS)}")

        # where r = t, du/dt is multiplied by 0
        du_dt = torch.zeros_like(z)
        du_dt[m:] = total_derivative(
            dit.u, dz, z[m:], t[m:], h[m:], omega[m:], t_min[m:], t_max[m:], y[m:])

    V = u + column(h) * du_dt
    loss = weighted_error(V, v_g, norm_eps) + weighted_error(v, v_g, norm_eps)
    return loss, {"loss_u": (V - v_g).detach().square().mean(),
                  "loss_v": (v - v_g).detach().square().mean()}


def column(scalars):
    """(B,) as (B, 1, 1, 1): one factor for each image."""
    return scalars.view(-1, 1, 1, 1)


def velocity(branch, z, t, omega, y):
    """The marginal velocity at z_t by dit.v or dit.u: h = 0, guided by omega at all times."""
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    return branch(z, t, zero, omega, zero, one, y)


def total_derivative(branch, dz, z, t, h, omega, t_min, t_max, y):
    """du/dt (B, C, H, W) along the flow, with r fixed: the JVP of `branch` (dit.u) with tangents dz
    for z and 1 for both t and h. (The blocks see h alone; a network that predicts x uses t.)

    By hand, as torch.func.jvp refuses compiled blocks; and with plain attention, as the fused
    kernels have no forward derivative. (no_grad leaves forward derivatives on.)"""
    one = torch.ones_like(t)
    with dual_level(), sdpa_kernel(SDPBackend.MATH):
        u = branch(make_dual(z, dz), make_dual(t, one), make_dual(h, one), omega, t_min, t_max, y)
        return unpack_dual(u).tangent


def weighted_error(prediction, target, norm_eps):
    """The mean of s / sg[s + norm_eps], s being a sample's squared error. If norm_eps is far below
    s, each sample counts 1 and only the gradient, that of log(s), tells good from bad."""
    s = (prediction - target).square().flatten(1).sum(1)
    return (s / (s + norm_eps).detach()).mean()


@torch.no_grad()
def sample(net, noise, y, steps=1, omega=1.0, t_min=0.0, t_max=1.0):
    """Images (B, C, H, W), pixels about -1 to 1, from noise of that shape and classes y (B,), in
    `steps` evaluations of u. omega, t_min, t_max: numbers or (B,) tensors, chosen freely."""
    zero = noise.new_zeros(len(y))
    omega, t_min, t_max = zero + omega, zero + t_min, zero + t_max
    z, times = noise, torch.linspace(1, 0, steps + 1).tolist()
    for t, r in zip(times, times[1:]):
        h = torch.full_like(omega, t - r)
        z = z - (t - r) * net.u(z, torch.full_like(omega, t), h, omega, t_min, t_max, y)
    return z
