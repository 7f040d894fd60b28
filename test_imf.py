"""What improved MeanFlow is and what this code promises, in the order in which one learns it.

    pytest -q test_imf.py
"""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch.autograd.forward_ad import unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fid
import imf
import model
import sample
import train

HERE = os.path.dirname(os.path.abspath(__file__))
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = dict(patch_size=2, hidden_size=32, depth=3, num_heads=2, head_depth=2)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The networks here are small, and sums have one order."""
    torch.set_num_threads(1)


def network(image_size=8, channels=2, num_classes=5, **sizes):
    """A small DiT whose every parameter is random: nothing hides behind a zero."""
    torch.manual_seed(0)
    net = model.DiT(image_size, channels, num_classes, **SMALL | sizes)
    for p in net.parameters():
        torch.nn.init.normal_(p, p.mean().item() > 0.5, 0.3)
    return net


def data(net, n=8, seed=1):
    torch.manual_seed(seed)
    x = torch.randn(n, net.channels, net.image_size, net.image_size)
    return x, torch.randint(net.num_classes, (n,)), imf.draw(x)


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def conditions(y, d):
    """The arguments of a net behind z, from the draws."""
    return d.t, d.t - d.r, d.omega, d.t_min, d.t_max, y


# ---- The method ----


MEAN, STD = 0.5, 0.2  # Gaussian data; then z_t is Gaussian too


def z_mean(t):
    return (1 - t) * MEAN


def z_std(t):
    return ((1 - t) ** 2 * STD**2 + t**2) ** 0.5


def exact_v(z, t):
    return -MEAN + (t - (1 - t) * STD**2) / z_std(t) ** 2 * (z - z_mean(t))


def exact_u(z, r, t):
    """Along the flow of a Gaussian, (z - mean) / std stays the same."""
    z_r = z_mean(r) + z_std(r) / z_std(t) * (z - z_mean(t))
    return (z - z_r) / (t - r)


def test_exact_average_velocity_satisfies_the_meanflow_identity():
    """u + (t - r) du/dt = v, on which the whole method rests, holds for a flow with known u."""
    t, r = torch.tensor([0.9, 0.6, 1.0]).double(), torch.tensor([0.2, 0.5, 0.0]).double()
    z = torch.randn(3).double()
    u, du_dt = torch.func.jvp(exact_u, (z, r, t), (exact_v(z, t), 0 * r, 1 + 0 * t))
    torch.testing.assert_close(u + (t - r) * du_dt, exact_v(z, t))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_with_the_exact_average_velocity_map_noise_to_data(steps):
    """With the exact u any number of steps samples the data: nothing is lost in a single one."""
    class Exact:
        def u(self, z, t, h, *_):
            return exact_u(z, t[0] - h[0], t[0])

    x = imf.sample(Exact(), torch.randn(200_000).double(), torch.zeros(200_000), steps)
    assert abs(x.mean() - MEAN) < 2e-3 and abs(x.std() - STD) < 2e-3


def test_draws_have_the_stated_distributions():
    """Times, guidance and dropped classes are those of the release: they decide what is learned."""
    x = torch.empty(100_000, 1, 1, 1)
    d = imf.draw(x, torch.Generator().manual_seed(0))
    matching = torch.arange(len(x)) < 50_000
    assert torch.equal(d.r == d.t, matching) and (d.r[~matching] < d.t[~matching]).all()
    logits = torch.cat((d.t[~matching], d.r[~matching])).logit()
    assert abs(logits.mean() + 0.4) < 0.02 and abs(logits.std() - 1) < 0.02
    assert abs(d.noise.mean()) < 0.02 and abs(d.noise.std() - 1) < 0.02
    log = d.omega.log() / np.log(8)  # density 1 / omega: the logarithm is uniform
    assert 0 <= log.min() and log.max() <= 1
    assert abs(log.mean() - 0.5) < 0.01 and abs(log.var() - 1 / 12) < 2e-3
    assert (d.t_min[matching] == 0).all() and (d.t_max[matching] == 1).all()
    for value, low in ((d.t_min[~matching], 0), (d.t_max[~matching], 0.5)):
        assert low <= value.min() and value.max() <= low + 0.5
        assert abs(value.mean() - low - 0.25) < 0.01
    assert abs(d.drop.float().mean() - 0.1) < 0.005 and not d.drop[~matching].any()
    flat = imf.draw(x, torch.Generator().manual_seed(0), beta=0.0).omega  # uniform on [1, 8]
    assert 1 <= flat.min() and flat.max() <= 8 and abs(flat.mean() - 4.5) < 0.05
    steep = imf.draw(x, torch.Generator().manual_seed(0), beta=2.0).omega  # 1 / omega is uniform
    assert abs((1 / steep).mean() - (1 + 1 / 8) / 2) < 0.01


def test_the_same_generator_draws_the_same_numbers_and_strided_parts_keep_the_order():
    """Parts of a batch, for processes or accumulation, begin with flow matching like the whole."""
    x = torch.empty(12, 1, 2, 2)
    a, b = (imf.draw(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(i, j) for i, j in zip(a, b))
    for k in range(3):
        matching = (a.r == a.t)[k::3]
        assert torch.equal(matching, matching.sort(descending=True).values)


def literal_loss(net, x, y, draws, tangent="v-head", norm_eps=0.01):
    """The definition, as one would port it: three evaluations of the whole network for the
    guided target, then a JVP of the whole network over the whole batch that carries gradients."""
    e, t, r, omega, t_min, t_max, drop = draws
    zero, one, null = torch.zeros_like(t), torch.ones_like(t), torch.full_like(y, net.num_classes)

    def col(s):
        return s[:, None, None, None]

    z = (1 - col(t)) * x + col(t) * e
    with torch.no_grad():
        inside = torch.where((t_min <= t) & (t <= t_max), omega, 1)
        pair = net(torch.cat((z, z)), t.repeat(2), zero.repeat(2), torch.cat((omega, one)),
                   zero.repeat(2), one.repeat(2), torch.cat((y, null)))[1]
        v_u = pair[len(x):]
        u_at_r_equal_t, v_c = net(z, t, zero, inside, zero, one, y)
        v_g = e - x + col(1 - 1 / inside) * (v_c - v_u)
    y = torch.where(drop, null, y)
    v_g = torch.where(col(drop), e - x, v_g)
    dz = {"v-head": v_c, "boundary": u_at_r_equal_t, "conditional": v_g}[tangent]
    u, du_dt, v = torch.func.jvp(
        lambda z, t, r: net(z, t, t - r, omega, t_min, t_max, y), (z, t, r), (dz, one, zero),
        has_aux=True)
    V = u + col(t - r) * du_dt.detach()
    s_u, s_v = ((p - v_g).square().sum((1, 2, 3)) for p in (V, v))
    return (s_u / (s_u + norm_eps).detach() + s_v / (s_v + norm_eps).detach()).mean()


@pytest.mark.parametrize("tangent", imf.TANGENTS)
@pytest.mark.parametrize("n, norm_eps", [(1, 0.01), (2, 0.01), (7, 0.01), (16, 0.01), (16, 1e3)])
def test_the_loss_and_every_gradient_equal_the_literal_port(tangent, n, norm_eps):
    """What we leave out of the computation counts for nothing: the savings are exact."""
    net = network()
    x, y, draws = data(net, n)
    loss, logs = imf.imf_loss(net, x, y, draws, tangent, norm_eps)
    ours = gradients(net, loss)
    with sdpa_kernel(SDPBackend.MATH):
        expected = literal_loss(net, x, y, draws, tangent, norm_eps)
        theirs = gradients(net, expected)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert (abs(loss - 2) < 0.1) == (norm_eps == 0.01)
    assert logs["loss_u"] > 0.1 and logs["loss_v"] > 0.1


def wave(*shape, phase=0.0):
    """Numbers between -1 and 1 by a formula, the same on every machine."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(1.7 * index + phase + 0.001 * index**1.5).float().view(shape)


def test_golden_values_of_network_loss_and_sample():
    """Frozen from a version that equals the authors' release on their own weights (u, v to 3e-7,
    every gradient to 1.2e-6): any other constant, sign or embedding gives other numbers."""
    net = model.DiT(8, 2, 5, **SMALL)
    for i, (name, p) in enumerate(sorted(net.named_parameters())):
        p.data = 0.3 * wave(*p.shape, phase=i) + ("norm" in name)
    x, e, y = wave(4, 2, 8, 8), 1.3 * wave(4, 2, 8, 8, phase=0.5), torch.tensor([0, 1, 2, 4])
    draws = imf.Draws(
        e, t=torch.tensor([0.7, 0.3, 0.9, 0.5]), r=torch.tensor([0.7, 0.3, 0.2, 0.1]),
        omega=torch.tensor([3, 1.5, 6, 2]), t_min=torch.tensor([0, 0, 0.1, 0.4]),
        t_max=torch.tensor([1, 1, 0.95, 0.8]), drop=torch.tensor([True, False, False, False]))

    def close(value, expected):
        torch.testing.assert_close(value, torch.tensor(expected), rtol=2e-5, atol=2e-5)

    u, v = net(x, *conditions(y, draws))
    close(u[2, 1, 3, :4], [1.2927654, -1.1623044, 1.2749286, -1.1604910])
    close(v[1, 0, 5, 2:6], [0.8750710, -0.8449263, 0.9224192, -0.8877782])
    found = imf.sample(net, e, y, 2, omega=3.0, t_min=0.2, t_max=0.7)
    close(found[3, 0, 4, :4], [0.5489235, 1.0094329, 0.2224343, -1.3385435])
    for tangent, loss_u, loss, norm in (("v-head", 0.9811361, 0.9827975, 11.133174),
                                        ("boundary", 0.9992729, 0.9868991, 11.105856),
                                        ("conditional", 0.9666720, 0.9793963, 11.088254)):
        value, logs = imf.imf_loss(net, x, y, draws, tangent, norm_eps=100.0)
        close(torch.stack((logs["loss_u"], logs["loss_v"])), [loss_u, 0.5873508])
        close(value.detach(), loss)
        close(gradients(net, value).norm() / 10, norm / 10)


def watch(net):
    """A list that receives of each JVP the values and tangents of (z, t, h), the conditions and
    du/dt."""
    seen = []

    def u(z, t, h, *conditions, u=net.u):
        out = u(z, t, h, *conditions)
        seen.append((*zip(*map(unpack_dual, (z, t, h))), conditions, unpack_dual(out).tangent))
        return out

    net.u = u
    return seen


@pytest.mark.parametrize("seed", range(4))
def test_jvp_matches_finite_differences(seed):
    """du/dt is how fast u changes when z moves along v, and t and h by 1."""
    net = network()
    seen = watch(net)
    imf.imf_loss(net, *data(net, seed=seed))
    ((values, tangents, others, du_dt),) = seen

    def moved(s):
        return net.u(*(a + s * da for a, da in zip(values, tangents)), *others)

    eps = 2e-3  # in float32; of fourth order, to stay far below the tolerance
    with torch.no_grad():
        near, far = moved(eps) - moved(-eps), moved(2 * eps) - moved(-2 * eps)
    difference = (8 * near - far) / (12 * eps)
    assert (du_dt - difference).norm() < 1e-3 * difference.norm()
    assert (tangents[1] == 1).all() and (tangents[2] == 1).all()


class SameFunction(torch.nn.Module):
    """A network that predicts velocities, in the form of one that predicts clean images."""

    predict = "x"

    def __init__(self, net):
        super().__init__()
        self.net, self.num_classes = net, net.num_classes
        self.velocity_from = net.velocity_from

    def as_velocity(self, u, z, t):  # by way of the image
        return self.velocity_from(z - t.clamp(min=0.05).view(-1, 1, 1, 1) * u, z, t)

    def forward(self, z, t, *conditions):
        u, v = self.net(z, t, *conditions)
        return self.as_velocity(u, z, t), self.as_velocity(v, z, t)

    def u(self, z, t, *conditions):
        return self.as_velocity(self.net.u(z, t, *conditions), z, t)

    def v(self, z, t, *conditions):
        return self.as_velocity(self.net.v(z, t, *conditions), z, t)


@pytest.mark.parametrize("tangent", imf.TANGENTS)
def test_predicting_the_image_or_the_velocity_is_the_same_method(tangent):
    """One function in two forms has the same loss, gradients and du/dt: only what the last layer
    learns differs. Below t = 0.05, where (z - x) / 0.05 is learned, it is another function."""
    net = network()
    x, y, draws = data(net, 16)
    draws = draws._replace(t=draws.t.clamp(min=0.05), r=draws.r.clamp(min=0.05))
    seen = watch(net)
    expected, logs = imf.imf_loss(net, x, y, draws, tangent, norm_eps=10.0)
    theirs = gradients(net, expected)
    loss, same_logs = imf.imf_loss(SameFunction(net), x, y, draws, tangent, norm_eps=10.0)
    ours = gradients(net, loss)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(same_logs, logs, rtol=1e-5, atol=0)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    velocity, image = (du_dt for *_, du_dt in seen if du_dt is not None)
    assert (velocity - image).norm() < 1e-5 * velocity.norm()


def test_a_network_that_predicts_the_image_turns_it_into_velocities():
    """u = (z - x_u) / max(t, 0.05), v likewise; the target too, and the tangent of t counts."""
    velocity, image = network(), network(predict="x")
    x, y, d = data(velocity)
    t = torch.tensor([0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
    d = d._replace(t=t, r=torch.where(d.r < d.t, t / 2, t))
    for ours, out in zip(image(x, *conditions(y, d)), velocity(x, *conditions(y, d))):
        torch.testing.assert_close(ours, (x - out) / t.clamp(min=0.05)[:, None, None, None])
    seen = watch(image)
    _, logs = imf.imf_loss(image, x, y, d._replace(omega=torch.ones(8)))
    ((values, tangents, others, du_dt),) = seen
    h = 1e-3
    moved = [image.u(*(a + s * da for a, da in zip(values, tangents)), *others) for s in (h, -h)]
    difference = (moved[0] - moved[1]) / (2 * h)
    assert (du_dt - difference)[1:].norm() < 1e-2 * difference[1:].norm()  # t > 0.05
    z = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * d.noise
    y = torch.where(d.drop, image.num_classes, y)
    v = image.v(z, *conditions(y, d._replace(omega=torch.ones(8))))
    target = (z - x) / t.clamp(min=0.05)[:, None, None, None]
    torch.testing.assert_close(logs["loss_v"], (v - target).square().mean())


def test_where_r_equals_t_it_is_flow_matching():
    """With r = t and no class, u and v are both regressed on e - x."""
    net = network()
    x, y, _ = data(net)
    draws = imf.draw(x, flow_matching=1.0, class_dropout=1.0)
    _, logs = imf.imf_loss(net, x, y, draws)
    t = draws.t[:, None, None, None]
    u, v = net((1 - t) * x + t * draws.noise, *conditions(torch.full_like(y, 5), draws))
    torch.testing.assert_close(logs["loss_u"], (u - (draws.noise - x)).square().mean())
    torch.testing.assert_close(logs["loss_v"], (v - (draws.noise - x)).square().mean())


def test_only_the_training_pass_carries_a_gradient():
    """Guidance and JVP run without autograd: one ordinary backward pass, and no more memory."""
    net = network()
    carries = []
    for name in ("u", "v"):
        def watched(*args, method=getattr(net, name)):
            out = method(*args)
            carries.append(out.requires_grad)
            return out
        setattr(net, name, watched)
    for tangent in imf.TANGENTS:
        imf.imf_loss(net, *data(net), tangent)
    assert len(carries) == 3 * 3 + 1 and not any(carries)


def test_outside_its_interval_guidance_is_off():
    """For t outside [t_min, t_max] the target is e - x, whatever omega is."""
    net = network()
    x, y, draws = data(net)
    never = draws._replace(t_min=torch.full_like(draws.t, 2.0), r=draws.t * 0.5)
    _, logs = imf.imf_loss(net, x, y, never)
    t = draws.t[:, None, None, None]
    y_kept = torch.where(draws.drop, net.num_classes, y)
    _, v = net((1 - t) * x + t * draws.noise, *conditions(y_kept, never))
    torch.testing.assert_close(logs["loss_v"], (v - (draws.noise - x)).square().mean())
    always = never._replace(t_min=torch.zeros_like(draws.t), t_max=torch.ones_like(draws.t))
    assert abs(imf.imf_loss(net, x, y, always)[1]["loss_v"] - logs["loss_v"]) > 1e-3


def test_a_dropped_class_is_the_null_class():
    """A sample that loses its class trains only the embedding of "no class"."""
    net = network()
    x, y, draws = data(net)
    every = draws._replace(drop=torch.ones_like(draws.drop))
    imf.imf_loss(net, x, y, every)[0].backward()
    rows = net.y_embedder.weight.grad.abs().sum(1)
    assert rows[-1] > 0 and (rows[:-1] == 0).all()
    assert imf.imf_loss(net, x, y, every)[0] == imf.imf_loss(net, x, (y + 1) % 5, every)[0]


def test_an_unknown_tangent_is_refused():
    """A misspelt variant of the method must not train another one."""
    net = network()
    with pytest.raises(ValueError, match="sideways"):
        imf.imf_loss(net, *data(net), "sideways")


# ---- The network ----


@pytest.mark.parametrize("name, to_sample, to_train", [
    ("B/2", 88.9, 145.6), ("M/2", 173.9, 230.6), ("L/2", 409.1, 509.8), ("XL/2", 610.4, 711.1)])
def test_parameters_of_the_networks_of_the_paper(name, to_sample, to_train):
    """The four networks have as many parameters, in millions, as the paper's."""
    with torch.device("meta"):
        net = model.DiT(32, 4, 1000, **model.MODELS[name])
    million = sum(p.numel() for p in net.parameters()) / 1e6
    v_head = sum(p.numel() for p in net.v_heads.parameters()) / 1e6
    assert round(million, 1) == to_train and round(million - v_head, 1) == to_sample


def test_initialisation():
    """Every block begins as the identity and u, v as zero; the weights have the release's scales.
    """
    torch.manual_seed(0)
    net = model.DiT(16, 3, 10, 4, 384, 2, 6, 1)
    block = net.u_heads[0]
    assert (block.attn_scale == 0).all() and (block.mlp_scale == 0).all()
    for layer in (net.u_final_layer, net.v_final_layer):
        assert (layer.linear.weight == 0).all() and (layer.linear.bias == 0).all()
    for linear in (block.attn.qkv_proj, block.attn.out_proj, block.mlp.w13, block.mlp.w2):
        assert abs(linear.weight.std() * linear.in_features**0.5 - 0.32) < 0.01
    assert abs(net.h_embedder.mlp[0].weight.std() - 1 / 16) < 2e-3
    assert abs(net.y_embedder.weight.std() - 384**-0.5) < 5e-3
    bound = (6 / (4 * 4 * 3 + 384)) ** 0.5  # Xavier-uniform
    assert 0.99 * bound < net.x_embedder.weight.abs().max() <= bound


def test_branches_alone_equal_the_whole():
    """net.u and net.v, which the savings rely on, are the two outputs of net."""
    net = network()
    x, y, d = data(net)
    u, v = net(x, *conditions(y, d))
    assert u.shape == v.shape == x.shape
    assert torch.equal(net.u(x, *conditions(y, d)), u)
    assert torch.equal(net.v(x, *conditions(y, d)), v)


def test_rotary_embedding_turns_neighbouring_pairs():
    """Pair k of index i is rotated by i * 10000^(-2k / head_dim), as released weights expect."""
    x = torch.randn(3, 5, 8)
    out = model.rotate(x, model.rotations(5, 8, "cpu"))
    angle = torch.tensor(4 * 10000 ** (-2 / 8))  # index 4, pair (2, 3)
    a, b = x[:, 4, 2], x[:, 4, 3]
    torch.testing.assert_close(out[:, 4, 2], a * angle.cos() - b * angle.sin())
    torch.testing.assert_close(out[:, 4, 3], a * angle.sin() + b * angle.cos())
    torch.testing.assert_close(out[:, 0], x[:, 0])


def test_scalars_are_embedded_by_sinusoids():
    """128 cosines, then 128 sines, of the scalar times exp(-ln(10000) i / 128)."""
    embedder = model.ScalarEmbedder(32)
    embedder.mlp = torch.nn.Identity()
    angles = torch.tensor([[0.7], [8.0]]) * 10000 ** (-torch.arange(128) / 128)
    torch.testing.assert_close(embedder(torch.tensor([0.7, 8.0])),
                               torch.cat((angles.cos(), angles.sin()), 1))


def released(net, v_head):
    """The state dict of `net` under the authors' names, q, k, v and w1, w3 apart."""
    out = {}
    for name, value in net.state_dict().items():
        if name.startswith("v_heads") and not v_head:
            continue
        name = name.replace("t_min_embedder", "cfg_t_start_embedder")
        name = name.replace("t_max_embedder", "cfg_t_end_embedder")
        name = name.replace("y_embedder", "y_embedder.embedding_table._flax_embedding")
        name = "net." + name.replace("x_embedder", "x_embedder.proj")
        stem, kind = name.rsplit(".", 1)
        linear = ("mlp.0", "mlp.2", "_proj", ".w13", ".w2", ".linear")
        if stem.endswith(linear) and "x_embedder" not in stem:
            name = f"{stem}._flax_linear.{kind}"
        parts = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "w13": ["w1", "w3"]}
        whole = next((key for key in parts if key in name), None)
        if whole is None:
            out[name] = value
        else:
            names = [name.replace(whole, part) for part in parts[whole]]
            out |= zip(names, value.chunk(len(names)))
    return out


@pytest.mark.parametrize("v_head", [False, True])
def test_released_weights_load_by_name_and_shape_alone(v_head, tmp_path):
    """The authors' files load without any flag, and give what the same weights give here."""
    net = network(depth=5, num_classes=7)
    torch.save(released(net, v_head), tmp_path / "iMF.pth")
    state = torch.load(tmp_path / "iMF.pth")
    assert "net.u_heads.0.attn.q_proj._flax_linear.weight" in state
    assert "net.cfg_t_end_embedder.mlp.2._flax_linear.bias" in state and len(state) > 60
    same = model.from_official(dict(reversed(state.items())), image_size=8)
    x, y, d = data(net)
    assert torch.equal(same.u(x, *conditions(y, d)), net.u(x, *conditions(y, d)))
    if v_head:
        assert torch.equal(same.v(x, *conditions(y, d)), net.v(x, *conditions(y, d)))
    else:
        with pytest.raises(ValueError, match="no v-head"):
            same.v(x, *conditions(y, d))
    state.pop("net.shared_blocks.0.attn.k_proj._flax_linear.weight")
    with pytest.raises(KeyError, match="k_proj"):
        model.from_official(state, image_size=8)


# ---- Cost ----


def test_a_step_needs_little_more_than_half_of_the_arithmetic_of_the_literal_port(monkeypatch):
    """Counted, not timed: 0.55 of the floating-point operations of the loss as one would port it.
    """
    net = network(16, 4, 10, patch_size=2, hidden_size=96, depth=12, num_heads=2, head_depth=8)
    x, y, draws = data(net, 32)
    net, x, y = net.to("meta"), x.to("meta"), y.to("meta")  # shapes are enough

    def arithmetic(loss, draws):  # the fused CPU kernel would be invisible to the counter
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count:
            loss(net, x, y, draws).backward()
        return count.get_total_flops()

    ours = arithmetic(lambda *args: imf.imf_loss(*args)[0], draws)
    monkeypatch.setattr(model.Linear, "forward", torch.nn.Linear.forward)  # as a port has it
    assert ours < 0.56 * arithmetic(literal_loss, [values.to("meta") for values in draws])


def test_a_linear_layer_s_forward_derivative_costs_one_product():
    """PyTorch's own JVP of nn.Linear multiplies x by the zero tangent of W too; ours does not."""
    layer, x = model.Linear(16, 8), torch.randn(4, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as count:
        _, dy = torch.func.jvp(layer, (x,), (2 * x,))
    assert count.get_total_flops() == 2 * (2 * 4 * 16 * 8)
    torch.testing.assert_close(dy, 2 * x @ layer.weight.T)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no compiler")
def test_a_compiled_step_equals_the_eager_one_and_is_compiled_once():
    """Compiled code has silently dropped tangents before; and one graph serves all batches."""
    net = network()
    seen = watch(net)

    def steps():
        for seed in range(4):  # the guided samples are never as many as the step before
            loss, logs = imf.imf_loss(net, *data(net, 10, seed))
            yield loss.detach(), logs["loss_u"], seen.pop()[-1], gradients(net, loss)

    eager = list(steps())
    torch.compiler.reset()
    stats = torch._dynamo.utils.counters
    stats.clear()
    net.compile(fullgraph=True)
    for ours, expected in zip(steps(), eager):
        for a, b in zip(ours, expected):
            assert (a - b).norm() < 1e-5 * b.norm()
    assert stats["stats"]["unique_graphs"] == 3  # of the training pass, of v, of the JVP


def test_activation_checkpointing_changes_no_gradient():
    """--grad-checkpoint saves memory and nothing else changes."""
    net = network()
    found = []
    for net.grad_checkpoint in (False, True):
        found.append(gradients(net, imf.imf_loss(net, *data(net))[0]))
    assert torch.equal(*found)


# ---- Sampling ----


def checkpoint(path, net, **settings):
    """A checkpoint such as train.py writes, as far as sample.py reads it."""
    settings = {"image_size": net.image_size, "predict": net.predict, **settings}
    torch.save({"ema": net.state_dict(), "settings": settings, "step": 1}, path)
    return str(path)


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command line in this process: (exit status, standard output, standard error)."""
    def call(program, *argv):
        monkeypatch.setattr(sys, "argv", [program.__name__ + ".py", *map(str, argv)])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        status = 0
        try:
            sample.run(program.main)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()
    return call


def refused(result, *names):
    """Whether a command line ended with status 2, one line that has all these names, no traceback.
    """
    status, _, err = result
    last = err.strip().splitlines()[-1]
    assert "Traceback" not in err and status == 2, err
    return ".py: " in last and all(str(name) in last for name in names) or pytest.fail(err)


def test_an_image_depends_on_its_own_seed_alone():
    """Image i is the same however many are sampled, in whatever order, beside whichever others."""
    net = network(channels=1)

    def images(numbers, seed=0):
        return np.concatenate(list(sample.generate(net, numbers, [0], seed)))

    assert len(np.unique(np.concatenate((images(range(20)), images(range(20), 1))), axis=0)) == 40
    whole = images(range(20))
    for some in (range(3), range(1, 20, 2), [7, 4], range(19, -1, -1)):
        assert np.array_equal(images(some), whole[list(some)])


def test_guidance_and_steps_are_free_at_every_call():
    """omega, interval and number of steps are inputs of the network, not of the training."""
    net = network()
    noise, y, _ = data(net)
    one = imf.sample(net, noise, y, 1, omega=2.0, t_min=0.3, t_max=0.7)
    many = imf.sample(net, noise, y, 1, torch.full((8,), 2.0), torch.full((8,), 0.3), 0.7)
    assert torch.equal(one, many)
    for other in (dict(steps=3), dict(omega=3.0), dict(t_min=0.1), dict(t_max=0.8)):
        kwargs = dict(steps=1, omega=2.0, t_min=0.3, t_max=0.7) | other
        assert (imf.sample(net, noise, y, **kwargs) - one).abs().max() > 1e-4


def test_pixels_are_rounded_from_minus_one_to_one():
    """A sample of -1 is black, 0 is 128, 1 is white, and what lies beyond is cut off."""
    class Constant(torch.nn.Module):
        channels, image_size = 1, 2

        def u(self, z, *_):
            return z - torch.tensor([[-1.5, -1.0], [0.0, 1.0]])

    net = Constant()
    net.p = torch.nn.Parameter(torch.zeros(()))
    [images] = sample.generate(net, range(3), [0])
    assert images.shape == (3, 3, 2, 2) and images[2, 1].tolist() == [[0, 0], [128, 255]]


def test_sample_writes_a_sheet_a_folder_or_an_npz(tmp_path, call):
    """The three outputs hold the same images, and nothing else is left behind."""
    path = checkpoint(tmp_path / "last.pt", network(channels=3))

    def run(*argv):
        assert call(sample, path, *argv)[0] == 0

    run("--num", 6, "--classes", 3, 1, "--out", tmp_path / "a.npz", "--seed", 5)
    run("--num", 6, "--classes", 3, 1, "--out", tmp_path / "new.folder", "--seed", 5)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.dtype == np.uint8 and images.shape == (6, 8, 8, 3)
    assert labels.tolist() == [3, 1] * 3
    for i, image in enumerate(images):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"new.folder/{i:06d}.png")), image)
    run("--omega", 1, 2, 4, "--num", 5, "--out", tmp_path / "b.png", "--interval", 0.2, 0.8)
    sheet = np.asarray(Image.open(tmp_path / "b.png"))
    assert sheet.shape == (3 * 80, 5 * 80, 3)
    run("--omega", 4, "--num", 5, "--out", tmp_path / "c.npz", "--interval", 0.2, 0.8)
    row = np.load(tmp_path / "c.npz")["arr_0"]  # each pixel 8 x 8, with a border of one
    assert np.array_equal(sheet[2 * 80 + 8:3 * 80 - 8:8, 80 + 8:2 * 80 - 8:8], row[1])
    run()
    assert Image.open(tmp_path / "samples.png").size == (10 * 80, 10 * 80)
    assert sorted(os.listdir(tmp_path)) == [
        "a.npz", "b.png", "c.npz", "last.pt", "new.folder", "samples.png"]
    assert refused(call(sample, path, "--out", tmp_path / "new.folder"), "new.folder")


class Hostile:
    """Unpickled, it would make a folder."""

    def __reduce__(self):
        return os.mkdir, (os.environ["IMF_HOSTILE"],)


def test_a_bad_checkpoint_is_one_line_and_runs_no_code(tmp_path, call, monkeypatch):
    """Whatever a file holds, it is named and refused, and nothing in it is executed."""
    monkeypatch.setenv("IMF_HOSTILE", str(tmp_path / "owned"))
    net = network(channels=1)
    whole = open(checkpoint(tmp_path / "good.pt", net), "rb").read()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"ema": Hostile()}))
    for name, content in {
            "hostile": {"ema": Hostile(), "settings": {}, "step": 1}, "list": [1, 2],
            "other": {"weights": torch.ones(3)}, "net": {f"net.{i}": torch.ones(2) for i in "12"},
            "ema": {"ema": {"a": 1}, "settings": {"image_size": 8}, "step": 1}}.items():
        torch.save(content, tmp_path / f"{name}.pt")
    for size in (9, 10**9, -4, "x"):
        checkpoint(tmp_path / f"size{size}.pt", net, image_size=size)
    torch.nn.init.constant_(net.class_tokens, float("nan"))
    checkpoint(tmp_path / "nan.pt", net)
    names = sorted(os.listdir(tmp_path))
    (tmp_path / "folder").mkdir()
    for name in [*names, "missing.pt", "folder"]:
        if name != "good.pt":
            assert refused(call(sample, tmp_path / name), "sample.py", name)
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "folder"])


@pytest.mark.parametrize("argv", [
    ["--classes", "5"], ["--classes", "-1"], ["--omega", "0"], ["--omega", "-2"],
    ["--omega", "nan"], ["--omega", "inf"], ["--interval", "0.6", "0.4"],
    ["--interval", "0", "1.5"], ["--steps", "0"], ["--num", "0"], ["--num", "x"],
    ["--vae", "some"], ["--device", "abacus"], ["--out", "last.pt/x.png"], ["--sead", "1"],
    ["--out", "."], ["--out", "folder.png"]])
def test_sample_refuses_bad_arguments_in_one_line(argv, tmp_path, call, monkeypatch):
    """A wrong argument is named, and no file appears."""
    checkpoint(tmp_path / "last.pt", network(channels=1))
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    assert refused(call(sample, "last.pt", *argv), "sample.py")
    assert sorted(os.listdir(tmp_path)) == ["folder.png", "last.pt"]


# ---- Training ----


def test_a_short_training_samples_in_one_step_what_the_data_show():
    """The method works: after 150 steps, one evaluation turns noise into images like the data."""
    torch.manual_seed(0)
    patterns = torch.tensor([[1.0, 1, -1, -1], [-1, 1, -1, 1]]).repeat_interleave(4, 1)
    patterns = patterns.view(2, 4, 4)
    net = model.DiT(4, 1, 1, 2, 32, 2, 2, 1)
    noise, y = torch.randn(200, 1, 4, 4), torch.zeros(200, dtype=torch.long)

    def distance():  # to the nearest of all images that the data may have
        x = imf.sample(net, noise, y)
        images = [scale * p for scale in torch.linspace(0.8, 1, 11) for p in patterns]
        distances = torch.stack([(x - i).square().mean((1, 2, 3)) for i in images])
        return distances.min(0).values.mean().item()

    before = distance()
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0)
    for _ in range(150):
        x = patterns[torch.randint(2, (64,))] * (0.8 + 0.2 * torch.rand(64, 1, 1))
        imf.imf_loss(net, x[:, None], y[:64], imf.draw(x[:, None]))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before > 1.2 and distance() < 0.4 * before


def test_digits_are_a_pure_function_of_number_and_seed():
    """The built-in data are the same on every start, all different, and none is cut off."""
    images, labels = train.digits(500, seed=3)
    again, _ = train.digits(500, seed=3)
    other, _ = train.digits(500, seed=4)
    assert images.dtype == np.uint8 and images.shape[0] == 500 and labels.shape == (500,)
    assert np.array_equal(images, again) and not np.array_equal(images, other)
    assert set(labels) == set(range(10)) and len(np.unique(images, axis=0)) == 500
    border = np.maximum(images[:, :, [0, -1]].max((1, 2, 3)), images[..., [0, -1]].max((1, 2, 3)))
    assert (border > 0).mean() < 0.02


def test_every_image_of_an_epoch_comes_once_in_an_order_of_its_own():
    """Batches and draws follow from (seed, step), parts are slices of the whole: so runs resume,
    and any number of processes and parts trains the same model."""
    args = types.SimpleNamespace(batch_size=5, seed=7, t_mean=-0.4, t_std=1.0, accum=2)
    images, labels = train.digits(10)
    images = torch.from_numpy(images)
    steps = [train.batch(images, labels, args, k) for k in range(4)]
    x = torch.cat([step[0] for step in steps]).flatten(1)
    assert len(x[:10].unique(dim=0)) == len(x[10:].unique(dim=0)) == 10
    assert not torch.equal(x[:10], x[10:])
    assert x.min() >= -1 and x.max() <= 1 and x.max() > 0.9
    assert not torch.equal(steps[0][2].noise, steps[1][2].noise)
    x, y, draws = steps[1]
    for rank in (0, 1):  # of two processes, in two parts each
        parts = train.batches(images, labels, args, 1, rank, 2)
        for share in (rank, rank + 2):
            part, label, own = next(parts)
            assert torch.equal(part, x[share::4]) and torch.equal(label, y[share::4])
            assert all(torch.equal(a, b[share::4]) for a, b in zip(own, draws))


def test_the_learning_rate_rises_in_the_warm_up_and_falls_in_the_cooldown():
    """Linear over the warm-up, constant, linear down to 0 over the last fraction of the steps."""
    args = types.SimpleNamespace(warmup=4, steps=20, cooldown=0.0)
    assert [train.schedule(k, args) for k in (0, 1, 3, 4, 19)] == [0.25, 0.5, 1, 1, 1]
    args.cooldown = 0.5
    assert [train.schedule(k, args) for k in (0, 3, 10, 15)] == [0.25, 1, 1, 0.5]
    assert train.schedule(19, args) == pytest.approx(0.1)


@pytest.mark.parametrize("muon_lr", [0.0, 0.05])
def test_an_update_is_adamw_of_the_release_or_muon_and_its_average(muon_lr):
    """AdamW with betas (0.9, 0.95), no weight decay; ema = decay * ema + (1 - decay) * net. With
    --muon-lr the blocks' matrices learn at one rate in all directions instead."""
    net, ema = network(), network().requires_grad_(False)
    args = types.SimpleNamespace(lr=0.02, muon_lr=muon_lr)
    optimizers = train.make_optimizers(net, args)
    group = optimizers["optimizer"].param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0)
    matrix, other = net.u_heads[0].mlp.w13.weight, net.u_final_layer.linear.weight
    before = matrix.detach().clone(), other.detach().clone()
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    train.update(net, ema, optimizers.values(), 0.5, 0.75)
    first, second = (b - p.detach() for b, p in zip(before, (matrix, other)))
    torch.testing.assert_close(second, 0.01 * other.grad.sign(), rtol=1e-3, atol=1e-6)
    average = ema.u_final_layer.linear.weight
    torch.testing.assert_close(average, 0.75 * before[1] + 0.25 * other.detach())
    assert not any(p.requires_grad for p in ema.parameters())  # or a graph would grow every step
    if muon_lr:
        scale = 0.5 * 0.05 * (matrix.shape[0] / matrix.shape[1]) ** 0.5
        values = torch.linalg.svdvals(first / scale)
        assert 0.5 < values.min() and values.max() < 1.3
        product = first.T @ matrix.grad  # symmetric: the same singular vectors
        assert (product - product.T).norm() < 1e-3 * product.norm()
    else:
        torch.testing.assert_close(first, 0.01 * matrix.grad.sign(), rtol=1e-3, atol=1e-6)


@pytest.fixture
def small(monkeypatch):
    """`--model tiny` made smaller still, and fewer digits."""
    monkeypatch.setitem(model.MODELS, "tiny", SMALL)
    digits = train.digits
    monkeypatch.setattr(train, "digits", lambda n: digits(100))


def trained(out):
    return torch.load(out / "last.pt", weights_only=True)


def records(out):
    return [json.loads(line) for line in open(out / "log.jsonl")]


def weights_of(out):
    return torch.cat([p.flatten() for p in trained(out)["net"].values()])


def same(a, b):
    """Equal, bit for bit, through dictionaries, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_run_continued_is_the_run_uninterrupted(small, tmp_path, call):
    """Stopped anywhere and started again, a run ends in the same bits, and its log too."""
    def run(out, steps, *argv):
        assert call(train, "--out", tmp_path / out, "--steps", steps, "--log-every", 1,
                    "--batch-size", 8, "--cooldown", 0, *argv)[0] == 0
        return trained(tmp_path / out)

    whole = run("a", 6)
    run("b", 2)
    with open(tmp_path / "b" / "log.jsonl", "a") as log:  # steps after the checkpoint, then a kill
        log.write('{"step": 3, "loss_u": 7}\n{"step": 4, "lo')
    run("b", 3)
    assert same(run("b", 6), whole)
    losses = [[record["loss_u"] for record in records(tmp_path / out)] for out in "ab"]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    before = (tmp_path / "b" / "last.pt").stat()
    run("b", 6)
    assert (tmp_path / "b" / "last.pt").stat() == before
    assert sorted(os.listdir(tmp_path / "a")) == ["last.pt", "log.jsonl", "step-000006.png"]
    net, info = sample.load(tmp_path / "a" / "last.pt")
    assert info["step"] == 6 and same(net.state_dict(), whole["ema"])
    (tmp_path / "b" / "last.pt").rename(tmp_path / "start.pt")  # --init is read once
    run("c", 1, "--init", tmp_path / "start.pt", "--lr", 1e-12, "--muon-lr", 0)
    assert all((p - trained(tmp_path / "c")["net"][name]).abs().max() < 1e-6
               for name, p in whole["ema"].items())
    (tmp_path / "start.pt").unlink()
    run("c", 2, "--init", tmp_path / "start.pt", "--lr", 1e-12, "--muon-lr", 0)


def test_killed_or_interrupted_it_ends_in_the_same_weights(flowers, tmp_path, call):
    """Ctrl-C saves and ends; kill -9 loses the steps since the last checkpoint and no more."""
    argv = ["--data", flowers, "--steps", "8", "--batch-size", "4", "--save-every", "1",
            "--log-every", "1", "--out"]
    assert call(train, *argv, tmp_path / "whole")[0] == 0
    out = tmp_path / "stopped"
    for wait, how, status in ((2, signal.SIGINT, 130), (4, signal.SIGKILL, -9)):  # wait: records
        process = subprocess.Popen([sys.executable, os.path.join(HERE, "train.py"), *argv, out],
                                   stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
        log = out / "log.jsonl"
        while process.poll() is None:
            if log.exists() and log.read_text().count("\n") >= wait:
                break
            time.sleep(0.01)
        process.send_signal(how)
        assert "Traceback" not in process.communicate()[1]
        assert process.returncode in (status, 0)
    assert call(train, *argv, out)[0] == 0
    assert same(trained(tmp_path / "whole"), trained(out))


def test_steps_without_a_finite_gradient_are_skipped_and_twenty_in_a_row_end_the_run(
        small, tmp_path, call, monkeypatch):
    """A NaN never reaches the weights, and a run that yields nothing else says so; a last step
    without a gradient still leaves a checkpoint."""
    calls, loss = [], imf.imf_loss

    def broken(*args):
        calls.append(0)
        value, logs = loss(*args)
        return value * (float("nan") if len(calls) in bad else 1), logs

    monkeypatch.setattr(imf, "imf_loss", broken)
    argv = ["--out", tmp_path, "--batch-size", 4, "--save-every", 100, "--log-every", 1,
            "--cooldown", 0, "--steps"]
    bad = [2, 3, 5]
    assert call(train, *argv, 5)[0] == 0
    assert [record["grad_norm"] is None for record in records(tmp_path)] == [
        False, True, True, False, True]
    good, bad = trained(tmp_path), range(1000)
    assert good["step"] == 5 and weights_of(tmp_path).isfinite().all()
    assert refused(call(train, *argv, 60), "20 steps")
    assert len(calls) == 25 and same(trained(tmp_path), good)


def test_a_full_disk_leaves_the_last_checkpoint(small, tmp_path, call, monkeypatch):
    """A checkpoint appears whole or not at all."""
    argv = ["--out", tmp_path, "--batch-size", 4, "--cooldown", 0, "--steps"]
    call(train, *argv, 1)
    before = (tmp_path / "last.pt").read_bytes()

    def full(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert refused(call(train, *argv, 2), "cannot write", "last.pt", "No space left")
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_another_setting_on_the_same_out_is_refused_by_name(small, tmp_path, call):
    """Two trainings are never mixed by mistake."""
    argv = ["--out", tmp_path, "--steps", 1, "--batch-size", 4]
    assert call(train, *argv)[0] == 0
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    for other in (["--lr", 1], ["--seed", 1], ["--tangent", "boundary"], ["--ema", 0.5],
                  ["--warmup", 7], ["--cooldown", 0], ["--model", "B/2"], ["--batch-size", 5],
                  ["--steps", 2]):
        assert refused(call(train, *argv, *other), other[0])
    assert before == {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}


@pytest.fixture
def flowers(tmp_path):
    """A folder of three classes, of all sizes and modes, with files that are no images."""
    rng = np.random.default_rng(0)
    kinds = {"aster": ["RGB", "L"], "iris": ["RGBA", "P", "1"], "rose": ["CMYK"]}
    for name, modes in kinds.items():
        folder = tmp_path / "flowers" / name
        folder.mkdir(parents=True)
        for i, mode in enumerate(modes):
            pixels = rng.integers(256, size=(20 + 30 * i, 41, 3), dtype=np.uint8)
            suffix = "jpg" if mode == "CMYK" else "png"
            Image.fromarray(pixels).convert(mode).save(folder / f"{i}.{suffix}")
    for name in ("iris/notes.txt", "rose/.hidden.png"):
        (tmp_path / "flowers" / name).write_text("not an image")
    return tmp_path / "flowers"


def test_a_folder_is_decoded_once_and_again_when_it_changes(flowers, tmp_path, monkeypatch):
    """A cache is made once; chunks that are missing are made again, damaged ones named; and it is
    enough to train from, without the images."""
    monkeypatch.setattr(train, "CHUNK", 10)
    for i in range(20):
        shutil.copy(flowers / "aster" / "0.png", flowers / "aster" / f"copy-{i:02d}.png")

    def load(size=16, **kwargs):
        images, *rest = train.folder_data(flowers, size, tmp_path / "cache", **kwargs)
        return torch.stack(list(images)), *rest

    first, labels, source = load()
    assert first.shape == (26, 3, 16, 16) and first.dtype == torch.uint8
    assert labels.tolist() == [0] * 22 + [1, 1, 1, 2]
    by_hand = train.centre_crop(Image.open(flowers / "rose" / "0.jpg").convert("RGB"), 16)
    assert np.array_equal(first[25].permute(1, 2, 0), by_hand)

    [folder] = (tmp_path / "cache").iterdir()
    chunks = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    assert list(chunks) == ["000000000.pt", "000000010.pt", "000000020.pt"]
    seen, decode = [], train.decode
    monkeypatch.setattr(train, "decode", lambda path, size: seen.append(path) or decode(path, size))
    assert torch.equal(load()[0], first) and load()[-1] == source and not seen
    (folder / "000000010.pt").unlink()
    assert torch.equal(load()[0], first) and len(seen) == 10
    assert chunks == {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    os.truncate(folder / "000000020.pt", 1000)
    with pytest.raises(ValueError, match="000000020.pt"):
        load()
    (folder / "000000020.pt").write_bytes(chunks["000000020.pt"])
    moved, *rest = train.cached_data(shutil.move(folder, tmp_path / source))
    assert torch.equal(torch.stack(list(moved)), first) and rest[1] == source
    (tmp_path / source / "000000010.pt").unlink()
    with pytest.raises(ValueError, match="incomplete"):
        train.cached_data(tmp_path / source)
    shutil.copy(flowers / "aster" / "0.png", flowers / "iris" / "one-more.png")
    changed, _, other = load()
    assert len(changed) == 27 and other != source


def test_the_centre_crop_is_that_of_adm(tmp_path):
    """Halved with BOX, then BICUBIC, then cropped; pictures of more than 8 bits are refused."""
    image = Image.fromarray(np.arange(100 * 40 * 3, dtype=np.uint32).view(np.uint8)[:12000]
                            .reshape(40, 100, 3))
    by_hand = image.resize((50, 20), Image.BOX).resize((40, 16), Image.BICUBIC)
    by_hand = by_hand.crop((12, 0, 28, 16))
    assert np.array_equal(np.asarray(train.centre_crop(image, 16)), np.asarray(by_hand))
    Image.fromarray(np.full((9, 9), 0x8000, np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(tmp_path / "b.tif")
    Image.fromarray(np.full((9, 9), 0x80, np.uint8)).save(tmp_path / "c.png")
    assert (train.decode(tmp_path / "c.png", 4) == 0x80).all()
    for name in ("a.png", "b.tif"):
        with pytest.raises(ValueError, match=name):
            train.decode(tmp_path / name, 4)


def test_an_npz_of_images_and_labels_is_training_data(small, tmp_path, call, monkeypatch):
    """What sample.py writes, grey or in colour, can be trained on, at the size that it has."""
    monkeypatch.setenv("IMF_HOSTILE", str(tmp_path / "owned"))
    images = np.random.default_rng(0).integers(256, size=(12, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(12, dtype=np.uint8) % 3
    np.savez(tmp_path / "grey.npz", arr_0=images[..., 0], arr_1=labels)
    np.savez(tmp_path / "colour.npz", arr_0=images, arr_1=labels)
    found, same_labels, _ = train.npz_data(tmp_path / "colour.npz")
    assert torch.equal(found, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert np.array_equal(same_labels, labels)
    assert call(train, "--data", tmp_path / "grey.npz", "--steps", 1, "--batch-size", 4, "--out",
                tmp_path / "out")[0] == 0
    net, info = sample.load(tmp_path / "out" / "last.pt")
    assert (net.image_size, net.channels, net.num_classes, net.predict) == (8, 1, 3, "x")
    bad = {"no-labels": (images,), "negative": (images, labels.astype(int) - 1),
           "float": (images, labels / 2), "few": (images, labels[:5]), "huge": (images, labels + 99),
           "type": (images / 255, labels), "pickled": (images, np.array([Hostile()] * 12, object)),
           "shape": (images[:, :, 0, 0], labels), "oblong": (images[:, :6], labels),
           "patch": (images[:, :7, :7], labels), "empty": (images[:0], labels[:0])}
    for name, arrays in bad.items():
        np.savez(tmp_path / f"{name}.npz", *arrays)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "grey.npz").read_bytes()[:300])
    for name in (*bad, "cut", "missing"):
        assert refused(call(train, "--data", tmp_path / f"{name}.npz", "--steps", 1, "--out",
                            tmp_path / "new"), name if name != "patch" else "multiple of 2")
    assert not (tmp_path / "new").exists() and not (tmp_path / "owned").exists()


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """A VAE like the paper's, with 25,000 random parameters."""
    import diffusers
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, latent_channels=4)
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return str(folder)


def test_latents_are_sampled_from_the_posterior_and_normalised_per_channel(
        vae_folder, flowers, tmp_path, monkeypatch):
    """Stored are mean and standard deviation; a batch draws from them; decoding undoes it all."""
    vae = sample.load_vae(vae_folder)
    coded, labels, source = train.folder_data(flowers, 32, tmp_path / "cache", vae)
    pixels, same_labels, other = train.folder_data(flowers, 32, tmp_path / "pixels")
    latents = torch.stack(list(coded))
    assert latents.shape == (6, 8, 4, 4) and latents.dtype == torch.float16
    assert np.array_equal(labels, same_labels) and source != other
    with torch.no_grad():
        posterior = vae.encode(torch.stack(list(pixels)) / 127.5 - 1).latent_dist
    torch.testing.assert_close(latents, torch.cat((posterior.mean, posterior.std), 1).half())

    args = types.SimpleNamespace(batch_size=6000, seed=1, t_mean=-0.4, t_std=1.0)
    x, y, _ = train.batch(coded, labels, args, 0)
    first = x[y == 2]  # one image, a thousand times
    mean, std = latents[5].float().chunk(2)
    z = first * sample.LATENT_STD + sample.LATENT_MEAN
    assert len(first) == 1000 and (z.mean(0) - mean).abs().max() < 0.15 * std.max()
    assert (z.std(0) / std - 1).abs().max() < 0.15
    assert sample.LATENT_MEAN.flatten().tolist() == pytest.approx(
        [0.86488, -0.27787343, 0.21616915, 0.3738409])
    assert sample.LATENT_STD.flatten().tolist() == pytest.approx(
        [4.85503674, 5.31922414, 3.93725398, 3.9870003])

    monkeypatch.setattr(imf, "sample", lambda *_, **__: first[:8])
    [decoded] = sample.generate(network(4, 4), range(8), [0], vae=vae)
    with torch.no_grad():
        expected = (vae.decode(z[:8]).sample * 127.5 + 127.5).round().clamp(0, 255)
    assert np.abs(decoded.astype(float) - expected.numpy()).max() <= 1


def test_from_images_to_latents_to_a_network_to_images(
        small, vae_folder, flowers, tmp_path, call):
    """The whole way, from a folder of images to sampled images, through one VAE."""
    out = tmp_path / "out"
    assert call(train, "--data", flowers, "--image-size", 32, "--vae", vae_folder, "--steps", 2,
                "--batch-size", 4, "--out", out)[0] == 0
    net, info = sample.load(out / "last.pt")
    assert (net.image_size, net.channels, net.num_classes) == (4, 4, 3)
    assert info["vae"] == vae_folder and Image.open(out / "step-000002.png").width == 10 * 68
    assert call(sample, out / "last.pt", "--num", 5, "--out", tmp_path / "a.npz")[0] == 0
    images = np.load(tmp_path / "a.npz")["arr_0"]
    assert images.shape == (5, 32, 32, 3) and images.std() > 0
    for name in (str(flowers), str(tmp_path / "nowhere")):
        assert refused(call(sample, out / "last.pt", "--vae", name), "--vae", name)
    import diffusers
    diffusers.AutoencoderKL(latent_channels=16, norm_num_groups=4, block_out_channels=(8,)
                            ).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="4 channels of latents at 1/8"):
        sample.load_vae(str(tmp_path / "other"))


@pytest.mark.parametrize("depth, steps, expected", [
    (12, 1, (8, 0.4, 0.65)), (24, 1, (10.5, 0.4, 0.6)), (32, 2, (10.5, 0.4, 0.6)),
    (48, 1, (8, 0.42, 0.62)), (48, 2, (4, 0.36, 0.64)), (5, 1, (2, 0, 1))])
def test_released_weights_are_known_by_their_names_and_guided_as_recommended(
        depth, steps, expected, tmp_path, monkeypatch):
    """Who samples the authors' weights need not know their scale, interval or VAE."""
    net = network(image_size=32, channels=4, depth=depth)
    torch.save(released(net, v_head=False), tmp_path / "iMF.pth")
    monkeypatch.setattr(sample, "load_vae", lambda name, device: name)
    args = types.SimpleNamespace(steps=steps, vae=None, omega=None, interval=None)
    same_net, vae, [setting] = sample.prepare(tmp_path / "iMF.pth", args, "cpu")
    assert vae == sample.VAE == "stabilityai/sd-vae-ft-mse" and same_net.image_size == 32
    assert setting == dict(zip(("steps", "omega", "t_min", "t_max"), (steps, *expected)))


def test_training_begins_with_released_weights_whose_v_head_is_a_copy_of_the_u_head(
        small, vae_folder, flowers, tmp_path, call):
    """--init: where r = t the two heads should agree, so the v-head that the files lack is u's."""
    net = network(image_size=32, channels=4, num_classes=3)
    torch.save(released(net, v_head=False), tmp_path / "iMF.pth")
    assert call(train, "--init", tmp_path / "iMF.pth", "--data", flowers, "--image-size", 256,
                "--vae", vae_folder, "--steps", 1, "--batch-size", 2, "--lr", 1e-12, "--muon-lr", 0, "--out",
                tmp_path / "out")[0] == 0
    fresh = model.from_state(trained(tmp_path / "out")["net"])
    x, y, d = data(net)
    u, v = fresh(x, *conditions(y, d))
    torch.testing.assert_close(u, net.u(x, *conditions(y, d)))
    torch.testing.assert_close(u, v)
    assert refused(call(train, "--init", tmp_path / "iMF.pth", "--steps", 1, "--out",
                        tmp_path / "other"), "--init")  # digits


@pytest.mark.parametrize("argv, named", [
    (["--model", "XXL"], "XXL"), (["--tangent", "up"], "up"), (["--steps", "0"], "--steps"),
    (["--batch-size", "-3"], "--batch-size"), (["--lr", "nan"], "--lr"), (["--lr", "0"], "--lr"),
    (["--ema", "1.5"], "--ema"), (["--seed", "-1"], "--seed"), (["--warmup", "-1"], "--warmup"),
    (["--batch-size", "8", "--accum", "3"], "--accum"), (["--out", "file"], "file"),
    (["--out", "file/below"], "file"), (["--data", "nowhere"], "nowhere"),
    (["--data", "file"], "file"), (["--data", "empty"], "empty"), (["--data", "flat"], "flat"),
    (["--data", "hollow"], "hollow"), (["--data", "texts"], "texts"), (["--data", "half"], "b.png"),
    (["--data", "fine", "--image-size", "15"], "15"), (["--device", "abacus"], "abacus"),
    (["--data", "fine", "--cache", "file"], "file"), (["--out", "broken"], "broken"),
    (["--vae", "some"], "--vae"), (["--image-size", "0"], "--image-size"),
    (["--image-size", "64"], "--data"), (["--init", "nowhere"], "nowhere")])
def test_train_refuses_bad_input_in_one_line_and_changes_nothing(
        argv, named, tmp_path, call, monkeypatch):
    """What the user got wrong is named, with status 2, before anything is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "digits", lambda n, digits=train.digits: digits(100))
    for folder in ("empty", "flat", "hollow/rose", "texts/rose", "fine/rose", "half/rose",
                   "broken"):
        os.makedirs(folder)
    for name in ("file", "texts/rose/a.txt", "half/rose/b.png", "broken/last.pt"):
        with open(name, "w") as file:
            file.write("text")
    for name in ("flat", "fine/rose", "half/rose"):
        Image.new("RGB", (40, 40)).save(f"{name}/a.png")
    before = sorted(os.walk("."))
    assert refused(call(train, "--steps", 1, *argv), "train.py: ", named)
    shutil.rmtree("half-32px", ignore_errors=True)  # what was decoded stays
    assert sorted(os.walk(".")) == before


# ---- Several processes ----


def torchrun(n, script, *argv):
    """Runs a script in n processes on the CPU: (exit status, standard output, standard error)."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}",
         "--", os.path.join(HERE, script), *map(str, argv)], text=True, capture_output=True,
        env=ONE_THREAD)
    return done.returncode, done.stdout, done.stderr


def test_any_number_of_processes_and_parts_trains_the_same_model_and_samples_the_same_images(
        flowers, tmp_path, call, monkeypatch):
    """One process, torchrun with one and with two, and two parts per batch: up to rounding the
    same weights, to the byte the same cache and images."""
    monkeypatch.setattr(train, "CHUNK", 4096)
    argv = ["--data", flowers, "--image-size", 16, "--steps", 5, "--batch-size", 8, "--out"]
    for n in (1, 2):
        cache = tmp_path / f"cache{n}"
        assert torchrun(n, "train.py", *argv, tmp_path / f"run{n}", "--cache", cache)[0] == 0
    assert call(train, *argv, tmp_path / "plain", "--cache", tmp_path / "cache1")[0] == 0
    assert call(train, *argv, tmp_path / "parts", "--accum", 2)[0] == 0
    one = weights_of(tmp_path / "plain")
    for name in ("run1", "run2", "parts"):
        assert (weights_of(tmp_path / name) - one).norm() < 1e-6 * one.norm()
    caches = [{path.name: path.read_bytes() for path in (tmp_path / f"cache{n}").glob("*/*")}
              for n in (1, 2)]
    assert caches[0] == caches[1] and list(caches[0]) == ["000000000.pt"]

    path = tmp_path / "plain" / "last.pt"
    assert torchrun(2, "sample.py", path, "--num", 9, "--out", tmp_path / "two.npz")[0] == 0
    assert call(sample, path, "--num", 9, "--out", tmp_path / "one.npz")[0] == 0
    assert np.array_equal(*(np.load(tmp_path / f"{n}.npz")["arr_0"] for n in ("one", "two")))


def test_a_user_error_under_torchrun_ends_all_processes_with_its_message(tmp_path):
    """One process that fails takes the others with it, and says why."""
    status, _, err = torchrun(2, "train.py", "--data", tmp_path / "nowhere", "--out", tmp_path)
    assert status != 0 and "nowhere" in err


# ---- The scores ----


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights under the names of the published file, lively enough to tell images apart."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "none.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid.Inception, "load_state_dict", lambda self, state: None)
        shapes = {name: tuple(value.shape) for name, value in
                  fid.Inception(folder / "none.pth").state_dict().items() if value.ndim}
    names = hashlib.sha256(repr(sorted(shapes.items())).encode()).hexdigest()
    assert names[:16] == "61093f3898ff55ee"  # of the names and shapes in the published file
    state, normal = {}, np.random.default_rng(0).standard_normal
    for name, shape in shapes.items():
        value = normal(shape, np.float32) if name[:3] != "fc." else None
        if name.endswith("conv.weight"):
            state[name] = value * (2 / value[0].size) ** 0.5
        elif name[:3] != "fc.":
            state[name] = value * 0.1 + name.endswith(("bn.weight", "var"))
    state["fc.weight"] = normal((1008, 2048), np.float32) * 0.2
    state["fc.bias"] = np.ones(1008, np.float32)  # which no score uses
    torch.save({name: torch.from_numpy(value) for name, value in state.items()}, folder / "w.pth")
    return str(folder / "w.pth")


@pytest.fixture(scope="module")
def inception(weights):
    return fid.Inception(weights)


class Thumbnail(torch.nn.Module):
    """Quick in the place of the Inception: an image's features are its pixels, 32 x 64 of them."""

    def forward(self, images):
        x = fid.resize(torch.as_tensor(images))
        x = torch.nn.functional.adaptive_avg_pool2d(x, (32, 64)).mean(1).flatten(1) / 50
        return x, x[:, :1008]


def pictures(n, size, seed=0):
    """Smooth random images, uint8 (n, size, size, 3)."""
    small = np.random.default_rng(seed).integers(256, size=(n, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(i).resize((size, size), 2)) for i in small])


@pytest.mark.parametrize("size, features, logits", [
    (32, [0.365731, 0.039498, 1.231857, 0.474546], [0.4017, -14.0730, 5.1209, -1.4260]),
    (256, [0.377276, 0.038352, 1.2402, 0.458161], [0.3454, -14.0328, 5.1145, -1.5483]),
    (299, [0.378247, 0.03827, 1.240301, 0.458069], [0.3433, -14.0373, 5.1098, -1.5549])])
def test_the_inception_is_that_of_torch_fidelity(size, features, logits, inception):
    """Four of each, as torch-fidelity 0.4.0 computes them with these weights and images."""
    found, found_logits = inception(torch.from_numpy(pictures(2, size)).permute(0, 3, 1, 2))
    assert found.shape == (2, 2048) and found_logits.shape == (2, 1008)
    assert found[1, [0, 700, 1400, 2047]].tolist() == pytest.approx(features, abs=5e-6)
    assert found_logits[1, [0, 300, 600, 1007]].tolist() == pytest.approx(logits, abs=1e-4)


def gaussian(rng, n, dim=48, scale=1.0):
    return torch.from_numpy(rng.standard_normal((n, dim)) @ rng.standard_normal((dim, dim)) * scale)


@pytest.mark.parametrize("n", [30, 200])  # fewer and more than the 48 dimensions
def test_fid_is_the_formula_of_the_paper_and_zero_for_a_set_with_itself(n):
    """The Frechet distance of two Gaussians, with singular covariances too."""
    rng = np.random.default_rng(1)
    x, y = gaussian(rng, n), gaussian(rng, 300, scale=1.3)
    (mu1, sigma1), (mu2, sigma2) = fid.moments(x), fid.moments(y)
    np.testing.assert_allclose(sigma1, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)
    product = np.linalg.eigvals(sigma1.numpy() @ sigma2.numpy()).astype(complex)
    expected = ((mu1 - mu2) ** 2).sum() + (sigma1 + sigma2).trace() - 2 * (product**0.5).real.sum()
    assert abs(fid.frechet_distance(mu1, sigma1, mu2, sigma2) - expected) < 1e-5 * expected
    assert abs(fid.frechet_distance(mu2, sigma2, mu1, sigma1) - expected) < 1e-5 * expected
    assert 0 <= fid.frechet_distance(mu1, sigma1, mu1, sigma1) < 1e-8 * sigma1.trace()
    assert np.isnan(fid.frechet_distance(mu1 * np.nan, sigma1, mu1, sigma1))
    q = np.linalg.qr(rng.standard_normal((48, 48)))[0]
    a, b = rng.uniform(0, 3, (2, 48))  # these covariances commute: a closed form
    found = fid.frechet_distance(a, q * a @ q.T, b, q * b @ q.T)
    assert found == pytest.approx(((a - b) ** 2 + (a**0.5 - b**0.5) ** 2).sum(), rel=1e-9)


def test_inception_score_is_its_formula_in_the_order_given():
    """exp of the mean divergence of p(y|x) from p(y), averaged over the splits."""
    logits = torch.from_numpy(np.random.default_rng(2).standard_normal((100, 7)) * 3)
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    expected = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in np.split(p, 5)]
    assert fid.inception_score(logits, 5) == pytest.approx((np.mean(expected), np.std(expected)))
    sure = torch.eye(10).repeat(10, 1) * 1000  # every class, and no doubt about any
    assert fid.inception_score(sure) == pytest.approx((10, 0))


def test_precision_and_recall_are_their_definition():
    """The fraction of one set within reach of the other's third neighbours."""
    rng = np.random.default_rng(3)
    x, y = gaussian(rng, 1100, 6).float(), gaussian(rng, 1200, 6).float() + 1

    def within(a, b):  # some b has it no farther than b's third neighbour
        reach = np.sort(np.linalg.norm(b[:, None] - b[None], axis=2), 1)[:, 3]
        return (np.linalg.norm(a[:, None] - b[None], axis=2) <= reach).any(1).mean()

    a, b = x.double().numpy()[:300], y.double().numpy()[:200]
    assert fid.precision_recall(x[:300], y[:200]) == pytest.approx((within(a, b), within(b, a)))
    assert fid.precision_recall(x, x) == (1, 1) and fid.precision_recall(x, x + 1000) == (0, 0)
    assert fid.precision_recall(x, torch.cat((x, y + 1000)))[0] == 1  # in more than one block
    line = torch.arange(4.0)[:, None]  # the third neighbour of 0 is 3, no farther than -3 is
    assert fid.precision_recall(0 * line - 3, line)[0] == 1


def figures(text):
    """The numbers of each line, by name."""
    lines = [line.split() for line in text.splitlines()]
    return [dict(zip(line[::2], map(float, line[1::2]))) for line in lines]


def test_a_folder_an_npz_statistics_and_two_processes_give_the_same_figure(
        weights, inception, tmp_path, call, monkeypatch):
    """However the images come, the scores are those of the set."""
    a, b = tmp_path / "a", tmp_path / "b.npz"
    (a / "deep/er").mkdir(parents=True)
    for i, image in enumerate(pictures(6, 24)):
        Image.fromarray(image).save(a / ("deep/er" if i < 3 else "") / f"{i}.png")
    np.savez_compressed(tmp_path / "a.npz", arr_0=pictures(6, 24))
    np.savez(b, arr_0=pictures(5, 20, seed=1), arr_1=np.arange(5))
    monkeypatch.setattr(fid, "Inception", lambda path: inception)

    def ask(*argv):
        status, out, err = call(fid, *argv)
        assert status == 0, err
        return figures(out)[0], err

    folder, err = ask(a, b, "--save", tmp_path / "saved.npz")
    assert list(folder) == ["fid", "is", "is_std", "precision", "recall"] and "papers" in err
    assert ask(tmp_path / "a.npz", b)[0] == pytest.approx(folder, rel=1e-6)
    status, out, _ = torchrun(2, "fid.py", a, b, "--inception", weights)
    assert figures(out) == [pytest.approx(folder, rel=1e-6)]
    mu, sigma = fid.moments(inception(pictures(5, 20, seed=1).transpose(0, 3, 1, 2))[0])
    np.savez(tmp_path / "ref.npz", ref_mu=mu, ref_sigma=sigma)  # the authors' names
    monkeypatch.setattr(fid, "Inception", None)  # two statistics need no network
    known, _ = ask(tmp_path / "saved.npz", tmp_path / "ref.npz")
    assert known == {"fid": pytest.approx(folder["fid"], rel=1e-6)}


def test_a_checkpoint_is_scored_as_it_is_sampled_and_in_training(
        small, tmp_path, call, monkeypatch):
    """A line for each scale, from the images that sample.py would write; --fid-ref logs the same.
    """
    net, real = network(channels=1), pictures(9, 20)
    np.savez(tmp_path / "b.npz", arr_0=real)
    mu, sigma = fid.moments(Thumbnail()(real.transpose(0, 3, 1, 2))[0])
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma)
    monkeypatch.setattr(fid, "Inception", lambda path: Thumbnail())

    def expected(net, n, classes, seed, omega):
        images = np.concatenate(list(sample.generate(net, range(n), classes, seed, omega=omega)))
        return pytest.approx(fid.frechet_distance(*fid.moments(Thumbnail()(images)[0]), mu, sigma),
                             rel=1e-5)

    path = checkpoint(tmp_path / "last.pt", net)
    out = call(fid, path, tmp_path / "b.npz", "--num", 35, "--seed", 2, "--omega", 1, 3)[1]
    assert [row["omega"] for row in figures(out)] == [1, 3]
    assert figures(out)[1]["fid"] == expected(net.eval(), 35, range(5), 2, 3.0)

    argv = ["--steps", 4, "--batch-size", 4, "--log-every", 3, "--out", tmp_path / "out",
            "--fid-every", 2, "--fid-num", 20, "--fid-ref"]
    assert call(train, *argv, tmp_path / "ref.npz")[0] == 0
    assert ["fid" in record for record in records(tmp_path / "out")] == [True, False, True]
    trained_net, _ = sample.load(tmp_path / "out" / "last.pt")
    assert records(tmp_path / "out")[-1]["fid"] == expected(trained_net, 20, range(10), 0, 2.0)
    assert refused(call(train, *argv, tmp_path / "b.npz"), "b.npz", "no mu, sigma")


def bad_scores(path, weights):
    """Arguments of fid.py and what its one line must name, all below the folder `path`."""
    mu, sigma, images = np.zeros(2048), np.eye(2048), pictures(3, 16)
    for name in ("damaged", "single"):
        (path / name).mkdir()
        Image.fromarray(images[0]).save(path / name / "0.png")
    (path / "empty/below").mkdir(parents=True)
    (path / "damaged/1.png").write_bytes((path / "damaged/0.png").read_bytes()[:150])
    for name in ("text.npz", "text.pt"):
        (path / name).write_text("text")
    arrays = {
        "good": dict(arr_0=images), "keys": dict(x=images), "float": dict(arr_0=images / 255),
        "flat": dict(arr_0=images[0, 0]), "two": dict(arr_0=images[..., :2]), "half": dict(mu=mu),
        "one": dict(arr_0=images[:1]), "none": dict(arr_0=images[:0]),
        "pickled": dict(arr_0=np.array([Hostile()], object)),
        "objects": dict(mu=np.array([Hostile()], object), sigma=sigma),
        "nan": dict(mu=mu, sigma=sigma * np.nan), "text": dict(mu=mu.astype(str), sigma=sigma),
        "small": dict(mu=mu[:64], sigma=sigma[:64, :64])}
    for name, content in arrays.items():
        np.savez_compressed(path / f"{name}_.npz", **content)
    whole = (path / "good_.npz").read_bytes()
    (path / "cut.npz").write_bytes(whole[:len(whole) // 2])
    state = torch.load(weights)
    for name, content in (("other", {"fc.weight": torch.ones(2)}), ("list", [1]),
                          ("hostile", {"fc.weight": Hostile()})):
        torch.save(content, path / f"{name}.pth")
        yield ["good_.npz", "--inception", f"{name}.pth"], f"{name}.pth"
    torch.save(state | {"fc.weight": state["fc.weight"] * np.nan}, path / "nan.pth")
    yield ["good_.npz", "--inception", "nan.pth"], "not finite"
    for name in ("missing", "empty", "single", "text.pt", "text.npz", "missing.npz", "cut.npz",
                 *(f"{name}_.npz" for name in arrays if name != "good"), "damaged/1.png"):
        yield [name.split("/")[0], "good_.npz"], name
        yield ["good_.npz", name.split("/")[0]], name
    for argv in (["--omega", "0"], ["--num", "1"], ["--steps", "0"], ["--device", "abacus"]):
        yield ["good_.npz", *argv], argv[0]
    yield ["good_.npz", "--save", "text.pt/x.npz"], "text.pt"
    yield ["good_.npz", "--inception", ""], "--inception FILE"  # nor a network


def test_bad_input_to_the_scores_is_refused_in_one_line(weights, tmp_path, call, monkeypatch):
    """A set of images, statistics or weights that is none is named, and runs no code."""
    def unreachable(*_, **__):
        raise OSError("no route to host")

    load = fid.Inception
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr(fid, "Inception", lambda path: Thumbnail() if path is None else load(path))
    monkeypatch.setenv("IMF_HOSTILE", str(tmp_path / "owned"))
    monkeypatch.chdir(tmp_path)
    cases = list(bad_scores(tmp_path, weights))
    before = sorted(os.listdir())
    for argv, named in cases:
        assert refused(call(fid, *argv), "fid.py: ", named), argv
        assert sorted(os.listdir()) == before, argv
