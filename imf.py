"""Improved MeanFlow: the draws, the guided target, the loss, the sampler (arXiv 2512.02012).

    z_t = (1 - t) x + t e                    t = 1 is noise, t = 0 is data, dz/dt = v = e - x
    u(z_t, r, t) = 1/(t - r) int_r^t v       average velocity: one step is z_r = z_t - (t - r) u
    u = v - (t - r) du/dt                    the MeanFlow identity

MeanFlow regresses u on that right-hand side, which contains u itself. Improved MeanFlow regresses
V = u + (t - r) sg[du/dt] on v: an ordinary regression, since the direction of du/dt is the
network's own velocity and V so depends on (z_t, r, t) alone.
"""

from typing import NamedTuple

import torch
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel

class Draws(NamedTuple):
    """The random numbers of one training step. The samples with r = t (flow matching) are first."""

    noise: torch.Tensor  # e, (B, C, H, W)
    t: torch.Tensor  # (B,), as all that follow
    r: torch.Tensor
    omega: torch.Tensor  # guidance scale, and the interval [t_min, t_max] in which it acts
    t_min: torch.Tensor
    t_max: torch.Tensor
    drop: torch.Tensor  # bool: this sample loses its class

def draw(x, generator=None, flow_matching=0.5, t_mean=-0.4, t_std=1, beta=1, class_dropout=0.1):
    """Draws for a batch shaped like x (B, C, H, W), on the generator's device (x's without one).
    Time: two logit-normals, sigmoid(N(t_mean, t_std^2)); the first part, flow_matching, has r = t.
    Guidance: omega on [1, 8] with density omega^-beta; the interval U(0, .5) to U(.5, 1), but 0 to
    1 where r = t. About the part class_dropout of the batch, all with r = t, loses its class."""
    B = len(x)
    device = x.device if generator is None else generator.device
    noise = torch.randn(x.shape, generator=generator, device=device)
    normals = torch.randn(2, B, generator=generator, device=device)
    r, t = torch.sigmoid(t_mean + t_std * normals).sort(0)[0]
    a, b, c, d = torch.rand(4, B, generator=generator, device=device)
    omega = 8**a if beta == 1 else (1 + a * (8 ** (1 - beta) - 1)) ** (1 / (1 - beta))
    i = torch.arange(B, device=device)
    fm = i < int(B * flow_matching)
    return Draws(noise, t, torch.where(fm, t, r), omega, torch.where(fm, 0, b / 2),
                 torch.where(fm, 1, (1 + c) / 2), fm & (i < (d < class_dropout).sum()))

TANGENTS = ("v-head", "boundary", "conditional")

def imf_loss(net, x, y, draws, tangent="v-head", norm_eps=0.01):
    """The loss of a batch x (B, C, H, W), y (B,), and {"loss_u", "loss_v"}: plain mean squares.
    net is a DiT, or a DDP around one. The loss itself is always close to 2 and says nothing, as
    every sample pulls about equally hard; with a large norm_eps it is a mean square, scaled.
    tangent is the direction of du/dt: "v-head" (iMF), "boundary" (iMF without a head: u at r = t),
    or "conditional" (the original MeanFlow: the sample's own v_g). ValueError for any other."""
    if tangent not in TANGENTS:
        raise ValueError(f"tangent {tangent!r} is none of {', '.join(TANGENTS)}")
    dit = getattr(net, "module", net)
    e, t, r, omega, t_min, t_max, drop = (d.to(x.device) for d in draws)
    col = (-1, 1, 1, 1)  # (B,) as a factor of (B, C, H, W)
    y = torch.where(drop, dit.num_classes, y)
    omega_ = torch.where((t_min <= t) & (t <= t_max), omega, 1)  # omega': no guidance outside
    zero, one = torch.zeros_like(t), torch.ones_like(t)

    z = (1 - t.view(col)) * x + t.view(col) * e
    u, v = net(z, t - r, omega, t_min, t_max, y)  # the only pass that autograd sees

    with torch.no_grad():
        def at_r_equal_t(branch, i, omega, y):  # h = 0, always guided; omega, y are those of i
            return branch(z[i], zero[i], omega, zero[i], one[i], y)

        m = (r < t).nonzero()[:, 0]  # where du/dt counts; elsewhere v is v_c already
        v_c = v.detach().clone()
        v_c[m] = at_r_equal_t(dit.v, m, omega_[m], y[m])

        # v_g = (e - x) + (1 - 1/omega') (v_c - v_u), which is e - x outside of g
        g = ((omega_ != 1) & ~drop).nonzero()[:, 0]
        v_u = at_r_equal_t(dit.v, g, one[g], torch.full_like(g, dit.num_classes))
        v_g = e - x
        v_g[g] += (1 - 1 / omega_[g]).view(col) * (v_c[g] - v_u)

        # du/dt is the JVP along (dz, dh) = (v_theta, 1)
        if tangent == "v-head":
            dz = v_c[m]
        elif tangent == "boundary":
            dz = at_r_equal_t(dit.u, m, omega_[m], y[m])
        else:
            dz = v_g[m]
        with dual_level(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no tangents
            u_ = dit.u(make_dual(z[m], dz), make_dual((t - r)[m], one[m]),
                       omega[m], t_min[m], t_max[m], y[m])
            du_dt = unpack_dual(u_).tangent

    V = u.index_add(0, m, (t - r)[m].view(col) * du_dt)  # V = u + (t - r) sg[du/dt]
    loss = 0
    for prediction in (V, v):  # each s / sg[s + eps]
        s = (prediction - v_g).square().flatten(1).sum(1)
        loss = loss + (s / (s + norm_eps).detach()).mean()
    with torch.no_grad():
        return loss, {"loss_u": (V - v_g).square().mean(), "loss_v": (v - v_g).square().mean()}

@torch.no_grad()
def sample(net, noise, y, steps=1, omega=1.0, t_min=0.0, t_max=1.0):
    """Images x from noise (B, C, H, W) and classes y (B,), in `steps` evaluations of u.
    omega, t_min, t_max are numbers or (B,) tensors, free at every call."""
    omega, t_min, t_max = (torch.as_tensor(c, dtype=noise.dtype, device=noise.device).expand(len(y))
                           for c in (omega, t_min, t_max))
    z, times = noise, torch.linspace(1, 0, steps + 1).tolist()
    for t, r in zip(times, times[1:]):
        z = z - (t - r) * net.u(z, torch.full_like(omega, t - r), omega, t_min, t_max, y)
    return z
