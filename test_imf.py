"""What improved MeanFlow is and what this code promises, in the order in which one learns it.

    pytest -q test_imf.py
"""

import hashlib, json, os, pickle, re, shutil, signal, subprocess, sys, time, types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.autograd.forward_ad import unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import fid, imf, model, sample, train

HERE = Path(__file__).resolve().parent
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


def conditions(y, d):
    """The arguments of a net behind z, from the draws."""
    return d.t, d.t - d.r, d.omega, d.t_min, d.t_max, y


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def watch(net):
    """A list that receives, as (value, tangent), what net.u and net.v are given and return."""
    seen = []
    for name in ("u", "v"):
        def watched(*args, method=getattr(net, name)):
            out = method(*args)
            seen.append(([unpack_dual(a) for a in args], unpack_dual(out)))
            return out
        setattr(net, name, watched)
    return seen


# ---- The method ----


def test_exact_average_velocity_satisfies_the_identity_and_maps_noise_to_data():
    """For a known flow u + (t - r) du/dt = v, and one step of u loses nothing against many."""
    def moments(t):  # of z_t, where the data are N(0.5, 0.2^2)
        return (1 - t) * 0.5, ((1 - t) ** 2 * 0.2**2 + t**2) ** 0.5

    def exact_v(z, t):
        mean, std = moments(t)
        return -0.5 + (t - (1 - t) * 0.2**2) / std**2 * (z - mean)

    def exact_u(z, r, t):  # along the flow, (z - mean) / std stays the same
        (mean, std), (mean_r, std_r) = moments(t), moments(r)
        return (z - mean_r - std_r / std * (z - mean)) / (t - r)

    t, r = torch.tensor([[0.9, 0.6, 1.0], [0.2, 0.5, 0.0]]).double()
    z = torch.randn(3).double()
    u, du_dt = torch.func.jvp(exact_u, (z, r, t), (exact_v(z, t), 0 * r, 1 + 0 * t))
    assert_close(u + (t - r) * du_dt, exact_v(z, t))
    net = types.SimpleNamespace(u=lambda z, t, h, *_: exact_u(z, t[0] - h[0], t[0]))
    for steps in (1, 2, 5):
        x = imf.sample(net, torch.randn(200_000).double(), torch.zeros(200_000), steps)
        assert abs(x.mean() - 0.5) < 2e-3 and abs(x.std() - 0.2) < 2e-3


def test_draws_have_the_stated_distributions():
    """Times, guidance and dropped classes are those of the release: they decide what is learned."""
    def draw(**kwargs):
        return imf.draw(torch.empty(100_000, 1), torch.Generator().manual_seed(0), **kwargs)

    d = draw()
    assert all(torch.equal(a, b) for a, b in zip(d, draw()))
    matching = torch.arange(100_000) < 50_000
    assert torch.equal(d.r == d.t, matching) and (d.r[~matching] < d.t[~matching]).all()
    logits = torch.cat((d.t[~matching], d.r[~matching])).logit()
    assert abs(logits.mean() + 0.4) < 0.02 and abs(logits.std() - 1) < 0.02
    assert abs(d.noise.mean()) < 0.02 and abs(d.noise.std() - 1) < 0.02
    log = d.omega.log() / np.log(8)  # density 1 / omega: the logarithm is uniform
    assert 0 <= log.min() and log.max() <= 1
    assert abs(log.mean() - 0.5) < 0.01 and abs(log.var() - 1 / 12) < 2e-3
    flat, steep = draw(beta=0.0).omega, draw(beta=2.0).omega
    assert 1 <= flat.min() and flat.max() <= 8 and abs(flat.mean() - 4.5) < 0.05
    assert abs((1 / steep).mean() - (1 + 1 / 8) / 2) < 0.01  # the reciprocal is uniform
    assert (d.t_min[matching] == 0).all() and (d.t_max[matching] == 1).all()
    for value, low in ((d.t_min[~matching], 0), (d.t_max[~matching], 0.5)):
        assert low <= value.min() and value.max() <= low + 0.5
        assert abs(value.mean() - low - 0.25) < 0.01
    assert abs(d.drop.float().mean() - 0.1) < 0.005 and not d.drop[~matching].any()


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
@pytest.mark.parametrize("n, norm_eps, predict", [
    (1, 0.01, "u"), (2, 0.01, "u"), (7, 0.01, "u"), (16, 0.01, "u"), (16, 1e3, "u"),
    (16, 0.01, "x"), (16, 1e3, "x")])
def test_the_loss_and_every_gradient_equal_the_literal_port(tangent, n, norm_eps, predict):
    """What we leave out counts for nothing; predicting the image is the same method, t >= 0.05."""
    net = network(predict=predict)
    x, y, draws = data(net, n)
    low = 0.05 if predict == "x" else 0
    draws = draws._replace(t=draws.t.clamp(low), r=draws.r.clamp(low))
    loss, logs = imf.imf_loss(net, x, y, draws, tangent, norm_eps)
    ours = gradients(net, loss)
    with sdpa_kernel(SDPBackend.MATH):
        expected = literal_loss(net, x, y, draws, tangent, norm_eps)
        theirs = gradients(net, expected)
    assert_close(loss, expected, rtol=1e-6, atol=0)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert (abs(loss - 2) < 0.1) == (norm_eps == 0.01)
    assert logs["loss_u"] > 0.1 and logs["loss_v"] > 0.1


def test_a_network_that_predicts_the_image_turns_it_into_velocities():
    """u = (z - x_u) / max(t, 0.05), v and the target likewise: small t must not amplify errors."""
    velocity, image = network(), network(predict="x")
    x, y, d = data(velocity)
    t = torch.tensor([0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
    d = d._replace(t=t, r=t / 2, omega=torch.ones(8), drop=torch.zeros(8, dtype=torch.bool))
    z = (1 - imf.column(t)) * x + imf.column(t) * d.noise
    u, v = image(z, *conditions(y, d))
    for found, out in zip((u, v), velocity(z, *conditions(y, d))):
        assert_close(found, (z - out) / imf.column(t.clamp(min=0.05)))
    _, logs = imf.imf_loss(image, x, y, d)
    target = (z - x) / imf.column(t.clamp(min=0.05))
    assert_close(logs["loss_v"], (v - target).square().mean())


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
        assert_close(value, torch.tensor(expected), rtol=2e-5, atol=2e-5)

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


@pytest.mark.parametrize("predict", ["u", "x"])
@pytest.mark.parametrize("seed", range(4))
def test_jvp_matches_finite_differences(seed, predict):
    """du/dt is how fast u changes when z moves along v, and t and h by 1."""
    net = network(predict=predict)
    x, y, draws = data(net, seed=seed)
    low = 0.1 if predict == "x" else 0  # it has a kink at 0.05
    draws = draws._replace(t=draws.t.clamp(low), r=draws.r.clamp(low))
    seen = watch(net)
    imf.imf_loss(net, x, y, draws)
    ((args, (_, du_dt)),) = [call for call in seen if call[1].tangent is not None]

    def moved(s):
        return net.u(*(a if da is None else a + s * da for a, da in args))

    eps = 2e-3  # in float32; of fourth order, to stay far below the tolerance
    with torch.no_grad():
        near, far = moved(eps) - moved(-eps), moved(2 * eps) - moved(-2 * eps)
    difference = (8 * near - far) / (12 * eps)
    assert (du_dt - difference).norm() < 1e-3 * difference.norm()
    assert (args[1].tangent == 1).all() and (args[2].tangent == 1).all()


def test_tangents_need_no_autograd_and_an_unknown_one_is_refused():
    """Guidance and JVP carry no gradient, which saves memory; a misspelt method is not another."""
    net = network()
    seen = watch(net)
    for tangent in imf.TANGENTS:
        imf.imf_loss(net, *data(net), tangent)
    assert len(seen) == 3 * 3 + 1 and not any(out.primal.requires_grad for _, out in seen)
    with pytest.raises(ValueError, match="sideways"):
        imf.imf_loss(net, *data(net), "sideways")


def test_without_guidance_it_is_a_regression_on_e_minus_x():
    """Outside the interval, or without a class, the target is e - x; where r = t, that of u too."""
    net = network()
    x, y, d = data(net)
    z = (1 - imf.column(d.t)) * x + imf.column(d.t) * d.noise
    outside = d._replace(r=d.t / 2, t_min=torch.full_like(d.t, 2.0))
    dropped = d._replace(r=d.t, drop=torch.ones_like(d.drop))
    logs = {}
    for draws in (outside, dropped):
        loss, logs = imf.imf_loss(net, x, y, draws)
        u, v = net(z, *conditions(torch.where(draws.drop, net.num_classes, y), draws))
        assert_close(logs["loss_v"], (v - (d.noise - x)).square().mean())
    assert_close(logs["loss_u"], (u - (d.noise - x)).square().mean())
    assert imf.imf_loss(net, x, (y + 1) % 5, dropped)[0] == loss
    loss.backward()
    rows = net.y_embedder.weight.grad.abs().sum(1)
    assert rows[-1] > 0 and (rows[:-1] == 0).all()
    inside = outside._replace(t_min=torch.zeros_like(d.t), t_max=torch.ones_like(d.t))
    off, on = (imf.imf_loss(net, x, y, draws)[1]["loss_v"] for draws in (outside, inside))
    assert abs(on - off) > 1e-3


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
    """Every block begins as the identity and u, v as zero; weights have the release's scales."""
    torch.manual_seed(0)
    net = model.DiT(16, 3, 10, 4, 384, 2, 6, 1)
    block = net.u_heads[0]
    final_layers = *net.u_final_layer.linear.parameters(), *net.v_final_layer.linear.parameters()
    assert all((p == 0).all() for p in (block.attn_scale, block.mlp_scale, *final_layers))
    for linear in (block.attn.qkv_proj, block.attn.out_proj, block.mlp.w13, block.mlp.w2):
        assert abs(linear.weight.std() * linear.in_features**0.5 - 0.32) < 0.01
    assert abs(net.h_embedder.mlp[0].weight.std() - 1 / 16) < 2e-3
    assert abs(net.y_embedder.weight.std() - 384**-0.5) < 5e-3
    bound = (6 / (4 * 4 * 3 + 384)) ** 0.5  # Xavier-uniform
    assert 0.99 * bound < net.x_embedder.weight.abs().max() <= bound


def test_positions_and_scalars_are_embedded_as_in_the_release():
    """Pairs (0, 1), (2, 3), ... rotate and 128 cosines precede 128 sines: weights rely on it."""
    x = torch.randn(3, 5, 8)
    out = model.rotate(x, model.rotations(5, 8, "cpu"))
    angle = torch.tensor(4 * 10000 ** (-2 / 8))  # index 4, pair (2, 3)
    a, b = x[:, 4, 2], x[:, 4, 3]
    assert_close(out[:, 4, 2], a * angle.cos() - b * angle.sin())
    assert_close(out[:, 4, 3], a * angle.sin() + b * angle.cos())
    assert_close(out[:, 0], x[:, 0])
    embedder = model.ScalarEmbedder(32)
    embedder.mlp = torch.nn.Identity()
    angles = torch.tensor([[0.7], [8.0]]) * 10000 ** (-torch.arange(128) / 128)
    expected = torch.cat((angles.cos(), angles.sin()), 1)
    assert_close(embedder(torch.tensor([0.7, 8.0])), expected)


def released(net, v_head):
    """The state dict of `net` under the authors' names, q, k, v and w1, w3 apart."""
    theirs = {"t_min_emb": "cfg_t_start_emb", "t_max_emb": "cfg_t_end_emb",
              "x_embedder": "x_embedder.proj",
              "y_embedder": "y_embedder.embedding_table._flax_embedding"}
    apart = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "w13": ("w1", "w3")}
    state = {}
    for name, value in net.state_dict().items():
        for ours in theirs:
            name = name.replace(ours, theirs[ours])
        name = re.sub(r"(mlp\.[02]|_proj|w13|w2|linear)\.", r"\1._flax_linear.", name)
        whole = next((whole for whole in apart if whole in name), name)
        parts = apart.get(whole, [whole])
        for part, rows in zip(parts, value.chunk(len(parts))):
            state["net." + name.replace(whole, part)] = rows
    return {name: value for name, value in state.items() if v_head or "v_heads" not in name}


@pytest.mark.parametrize("v_head, depth, steps, expected", [
    (True, 12, 1, (8, 0.4, 0.65)), (False, 24, 1, (10.5, 0.4, 0.6)),
    (False, 32, 2, (10.5, 0.4, 0.6)), (False, 48, 1, (8, 0.42, 0.62)),
    (False, 48, 2, (4, 0.36, 0.64)), (True, 5, 1, (2.5, 0, 1))])
def test_released_weights_load_by_name(v_head, depth, steps, expected, tmp_path, monkeypatch):
    """The authors' files need no flag: they give what these weights give, guided as recommended."""
    net = network(32, 4, depth=depth)
    state = released(net, v_head)
    assert "net.u_heads.0.attn.q_proj._flax_linear.weight" in state
    assert "net.cfg_t_end_embedder.mlp.2._flax_linear.bias" in state and len(state) > 60
    torch.save(dict(reversed(state.items())), tmp_path / "iMF.pth")
    monkeypatch.setattr(sample, "load_vae", lambda name, device: name)
    args = types.SimpleNamespace(steps=steps, vae=None, omega=None, interval=None)
    same, vae, [setting] = sample.prepare(tmp_path / "iMF.pth", args, "cpu")
    assert vae == sample.VAE == "stabilityai/sd-vae-ft-mse" and same.image_size == 32
    assert setting == dict(zip(("steps", "omega", "t_min", "t_max"), (steps, *expected)))

    x, y, d = data(net, 2)
    u, v = net(x, *conditions(y, d))
    assert u.shape == v.shape == x.shape
    assert torch.equal(net.u(x, *conditions(y, d)), u)
    assert torch.equal(net.v(x, *conditions(y, d)), v)
    assert torch.equal(same.u(x, *conditions(y, d)), u)
    if v_head:
        assert torch.equal(same.v(x, *conditions(y, d)), v)
    else:
        with pytest.raises(ValueError, match="no v-head"):
            same.v(x, *conditions(y, d))
    state.pop("net.shared_blocks.0.attn.k_proj._flax_linear.weight")
    with pytest.raises(KeyError, match="k_proj"):
        model.from_official(state)


# ---- Cost ----


def test_a_step_needs_little_more_than_half_of_the_arithmetic_of_the_literal_port(monkeypatch):
    """Counted, not timed: 0.55 of it, as a JVP of Linear omits the zero tangent of its weights."""
    net = network(16, 4, 10, patch_size=2, hidden_size=96, depth=12, num_heads=2, head_depth=8)
    x, y, draws = data(net, 32)
    net, x, y = net.to("meta"), x.to("meta"), y.to("meta")  # shapes are enough

    def arithmetic(function, *args):  # the fused CPU kernel would be invisible to the counter
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count:
            function(*args)
        return count.get_total_flops()

    layer, z = model.Linear(16, 8).requires_grad_(False), torch.randn(4, 16)
    assert arithmetic(torch.func.jvp, layer, (z,), (2 * z,)) == 2 * (2 * 4 * 16 * 8)
    assert_close(torch.func.jvp(layer, (z,), (2 * z,))[1], 2 * z @ layer.weight.T)
    ours = arithmetic(lambda: imf.imf_loss(net, x, y, draws)[0].backward())
    monkeypatch.setattr(model.Linear, "forward", torch.nn.Linear.forward)  # as a port has it
    draws = [values.to("meta") for values in draws]
    assert ours < 0.56 * arithmetic(lambda: literal_loss(net, x, y, draws).backward())


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no compiler")
def test_a_compiled_step_equals_the_eager_one_and_is_compiled_once():
    """Compiled code has silently dropped tangents before; and one graph serves all batches."""
    net = network()
    seen = watch(net)

    def steps():
        for seed in range(4):  # the guided samples are never as many as the step before
            loss, logs = imf.imf_loss(net, *data(net, 10, seed))
            yield loss.detach(), logs["loss_u"], seen[-1][1].tangent, gradients(net, loss)

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
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line here and returns what it printed; with `refused` it must end with status
    2 and one line that has all these words."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(program, *argv, refused=()):
        monkeypatch.setattr(sys, "argv", [program.__name__ + ".py", *map(str, argv)])
        status = 0
        try:
            sample.run(program.main)
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        assert status == (2 if refused else 0) and "Traceback" not in err, (argv, err)
        last = err.strip().split("\n")[-1]
        for word in (program.__name__ + ".py: ", *map(str, refused)) if refused else ():
            assert word in last, (argv, err)
        return out
    return run


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
    chosen = dict(steps=1, omega=2.0, t_min=0.3, t_max=0.7)
    one = imf.sample(net, noise, y, **chosen)
    many = imf.sample(net, noise, y, 1, torch.full((8,), 2.0), torch.full((8,), 0.3), 0.7)
    assert torch.equal(one, many)
    for other in (dict(steps=3), dict(omega=3.0), dict(t_min=0.1), dict(t_max=0.8)):
        assert (imf.sample(net, noise, y, **chosen | other) - one).abs().max() > 1e-4


def test_pixels_are_rounded_from_minus_one_to_one():
    """A sample of -1 is black, 0 is 128, 1 is white, and what lies beyond is cut off."""
    net = network(2, channels=1)
    net.u = lambda z, *_: z - torch.tensor([[-1.5, -1.0], [0.0, 1.0]])
    [images] = sample.generate(net, range(3), [0])
    assert images.shape == (3, 3, 2, 2) and images[2, 1].tolist() == [[0, 0], [128, 255]]


def test_sample_writes_a_sheet_a_folder_or_an_npz(tmp_path, run):
    """The three outputs hold the same images, and nothing else is left behind."""
    path = checkpoint(tmp_path / "last.pt", network(channels=3))
    argv = [path, "--num", 6, "--classes", 3, 1, "--interval", 0.2, 0.8, "--seed", 5, "--omega"]
    for name in ("a.npz", "a.png", "new.folder"):
        run(sample, *argv, 1, 4, "--out", tmp_path / name)
    run(sample, *argv, 4, "--out", tmp_path / "b.npz")
    run(sample, path)
    assert Image.open(tmp_path / "samples.png").size == (10 * 80, 10 * 80)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.dtype == np.uint8 and images.shape == (12, 8, 8, 3)
    assert labels.tolist() == [3, 1] * 6
    assert np.array_equal(images[6:], np.load(tmp_path / "b.npz")["arr_0"])
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (2 * 80, 6 * 80, 3)
    for i, image in enumerate(images):
        top, left = i // 6 * 80 + 8, i % 6 * 80 + 8  # each pixel 8 x 8, with a border of one
        assert np.array_equal(sheet[top:top + 64:8, left:left + 64:8], image)
        assert np.array_equal(Image.open(tmp_path / f"new.folder/{i:06d}.png"), image)
    assert sorted(os.listdir(tmp_path)) == [
        "a.npz", "a.png", "b.npz", "last.pt", "new.folder", "samples.png"]


# ---- Data ----


def pictures(n, size, seed=0):
    """Smooth random images, uint8 (n, size, size, 3)."""
    small = np.random.default_rng(seed).integers(256, size=(n, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(i).resize((size, size), 2)) for i in small])


PICTURES, LABELS = pictures(12, 8), np.arange(12) % 3


@pytest.fixture
def small(monkeypatch):
    """`--model tiny` made smaller still, and fewer digits."""
    monkeypatch.setitem(model.MODELS, "tiny", SMALL)
    monkeypatch.setattr(train, "digits", lambda n, digits=train.digits: digits(100))


def test_digits_are_a_pure_function_of_number_and_seed():
    """The built-in data are the same on every start, all different, and none is cut off."""
    images, labels = train.digits(500, seed=3)
    assert images.dtype == np.uint8 and images.shape[0] == 500 and labels.shape == (500,)
    assert np.array_equal(images, train.digits(500, seed=3)[0])
    assert not np.array_equal(images, train.digits(500, seed=4)[0])
    assert set(labels) == set(range(10)) and len(np.unique(images, axis=0)) == 500
    inner = images.copy()
    inner[..., 1:-1, 1:-1] = 0
    assert inner.any((1, 2, 3)).mean() < 0.02


def test_every_image_of_an_epoch_comes_once_in_an_order_of_its_own():
    """A batch follows from (seed, step) and parts are its slices: so runs resume and divide."""
    args = types.SimpleNamespace(batch_size=5, seed=7, t_mean=-0.4, t_std=1.0, accum=2)
    images, labels = train.digits(10)
    images = torch.from_numpy(images)
    steps = [train.batch(images, labels, args, k) for k in range(4)]
    x = torch.cat([step[0] for step in steps]).flatten(1)
    assert len(x[:10].unique(dim=0)) == len(x[10:].unique(dim=0)) == 10
    assert not torch.equal(x[:10], x[10:])
    assert x.min() >= -1 and x.max() <= 1 and x.max() > 0.9
    assert not torch.equal(steps[0][2].noise, steps[1][2].noise)
    for rank in (0, 1):  # of two processes, in two parts each
        parts = train.batches(images, labels, args, 1, rank, 2)
        for share in (rank, rank + 2):
            x, y, draws = next(parts)
            for part, whole in zip((x, y, *draws), (*steps[1][:2], *steps[1][2])):
                assert torch.equal(part, whole[share::4])


@pytest.fixture
def flowers(tmp_path):
    """A folder of three classes, of all sizes and modes, with files that are no images."""
    rng = np.random.default_rng(0)
    for i, (name, mode) in enumerate([
            ("aster/0.png", "RGB"), ("aster/1.png", "L"), ("iris/0.png", "RGBA"),
            ("iris/1.png", "P"), ("iris/2.png", "1"), ("rose/0.jpg", "CMYK")]):
        path = tmp_path / "flowers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(256, size=(20 + 15 * i, 41, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)
    for name in ("iris/notes.txt", "rose/.hidden.png"):
        (tmp_path / "flowers" / name).write_text("not an image")
    return tmp_path / "flowers"


def test_a_folder_is_decoded_once_and_again_when_it_changes(flowers, tmp_path, monkeypatch):
    """Missing chunks of a cache are made again, damaged ones named, and the whole is enough."""
    monkeypatch.setattr(train, "CHUNK", 10)
    for i in range(20):
        shutil.copy(flowers / "aster/0.png", flowers / f"aster/copy-{i:02d}.png")

    def load():
        images, labels, source = train.folder_data(flowers, 16, tmp_path / "cache")
        return torch.stack(list(images)), labels.tolist(), source

    first, labels, source = load()
    assert first.shape == (26, 3, 16, 16) and first.dtype == torch.uint8
    assert labels == [0] * 22 + [1, 1, 1, 2]
    by_hand = train.centre_crop(Image.open(flowers / "rose/0.jpg").convert("RGB"), 16)
    assert np.array_equal(first[25].permute(1, 2, 0), by_hand)

    [folder] = (tmp_path / "cache").iterdir()
    chunks = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    assert [path.name for path in chunks] == ["000000000.pt", "000000010.pt", "000000020.pt"]
    _, middle, last = chunks
    seen, decode = [], train.decode
    monkeypatch.setattr(train, "decode", lambda path, size: seen.append(path) or decode(path, size))
    for missing in (0, 10):
        again, *rest = load()
        assert torch.equal(again, first) and rest == [labels, source] and len(seen) == missing
        middle.unlink()
    assert torch.equal(load()[0], first) and len(seen) == 20
    assert chunks == {path: path.read_bytes() for path in sorted(folder.iterdir())}
    os.truncate(last, 1000)
    with pytest.raises(ValueError, match=last.name):
        load()
    last.write_bytes(chunks[last])
    moved, *rest = train.cached_data(shutil.move(folder, tmp_path / source))
    assert torch.equal(torch.stack(list(moved)), first) and rest[1] == source
    (tmp_path / source / middle.name).unlink()
    with pytest.raises(ValueError, match="incomplete"):
        train.cached_data(tmp_path / source)
    shutil.copy(flowers / "aster/0.png", flowers / "iris/one-more.png")
    changed, _, other = load()
    assert len(changed) == 27 and other != source


def test_the_centre_crop_is_that_of_adm(tmp_path):
    """Halved with BOX, then BICUBIC, then cropped; pictures of more than 8 bits are refused."""
    pixels = np.random.default_rng(0).integers(256, size=(40, 100, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    by_hand = image.resize((50, 20), Image.BOX).resize((40, 16), Image.BICUBIC)
    assert np.array_equal(train.centre_crop(image, 16), by_hand.crop((12, 0, 28, 16)))
    Image.fromarray(np.full((9, 9), 0x80, np.uint8)).save(tmp_path / "c.png")
    assert (train.decode(tmp_path / "c.png", 4) == 0x80).all()
    for name, pixels in (("a.png", np.uint16(0x8000)), ("b.tif", np.float32(0.5))):
        Image.fromarray(np.full((9, 9), pixels)).save(tmp_path / name)
        with pytest.raises(ValueError, match=name):
            train.decode(tmp_path / name, 4)


def test_an_npz_of_images_and_labels_is_training_data(small, tmp_path, run):
    """What sample.py writes, grey or in colour, can be trained on, at the size that it has."""
    np.savez(tmp_path / "grey.npz", PICTURES[..., 0], LABELS)
    np.savez(tmp_path / "colour.npz", PICTURES, LABELS.astype(np.uint8))
    images, labels, _ = train.npz_data(tmp_path / "colour.npz")
    assert np.array_equal(images, PICTURES.transpose(0, 3, 1, 2)) and np.array_equal(labels, LABELS)
    run(train, "--data", tmp_path / "grey.npz", "--steps", 1, "--batch-size", 4, "--out", tmp_path)
    net, _ = sample.load(tmp_path / "last.pt")
    assert (net.image_size, net.channels, net.num_classes, net.predict) == (8, 1, 3, "x")


def save_vae(folder, latent_channels, levels):
    """A VAE of 25,000 random parameters; the paper's has 4 channels and 4 levels."""
    import diffusers
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8,) * levels, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, norm_num_groups=4,
        latent_channels=latent_channels).save_pretrained(folder)
    return str(folder)


def test_latents_are_drawn_from_the_posterior_and_normalised(flowers, tmp_path, monkeypatch):
    """Stored are mean and standard deviation; a batch draws from them; decoding undoes it all."""
    vae = sample.load_vae(save_vae(tmp_path / "vae", 4, 4))
    coded, labels, source = train.folder_data(flowers, 32, tmp_path / "cache", vae)
    pixels, same_labels, other = train.folder_data(flowers, 32, tmp_path / "pixels")
    latents = torch.stack(list(coded))
    assert latents.shape == (6, 8, 4, 4) and latents.dtype == torch.float16
    assert np.array_equal(labels, same_labels) and source != other
    with torch.no_grad():
        posterior = vae.encode(torch.stack(list(pixels)) / 127.5 - 1).latent_dist
    assert_close(latents, torch.cat((posterior.mean, posterior.std), 1).half())

    args = types.SimpleNamespace(batch_size=6000, seed=1, t_mean=-0.4, t_std=1.0)
    x, y, _ = train.batch(coded, labels, args, 0)
    first = x[y == 2]  # one image, a thousand times
    mean, std = latents[5].float().chunk(2)
    z = first * sample.LATENT_STD + sample.LATENT_MEAN
    assert len(first) == 1000 and (z.mean(0) - mean).abs().max() < 0.15 * std.max()
    assert (z.std(0) / std - 1).abs().max() < 0.15
    constants = torch.stack((sample.LATENT_MEAN, sample.LATENT_STD)).flatten().tolist()
    assert constants == pytest.approx([0.86488, -0.27787343, 0.21616915, 0.3738409,
                                       4.85503674, 5.31922414, 3.93725398, 3.9870003])

    monkeypatch.setattr(imf, "sample", lambda *_, **__: first[:8])
    [decoded] = sample.generate(network(4, 4), range(8), [0], vae=vae)
    with torch.no_grad():
        expected = (vae.decode(z[:8]).sample * 127.5 + 127.5).round().clamp(0, 255)
    assert np.abs(decoded.astype(float) - expected.numpy()).max() <= 1


def test_from_images_to_latents_to_released_weights_to_images(small, flowers, tmp_path, run):
    """The whole way; --init makes the missing v-head a copy of the u-head, as they should agree."""
    vae, out = save_vae(tmp_path / "vae", 4, 4), tmp_path / "out"
    net = network(image_size=4, channels=4, num_classes=3)
    torch.save(released(net, v_head=False), tmp_path / "iMF.pth")
    init = ["--init", tmp_path / "iMF.pth", "--batch-size", 4, "--steps", 2, "--lr", 1e-12,
            "--muon-lr", 0, "--out"]
    run(train, *init, out, "--data", flowers, "--image-size", 32, "--vae", vae)
    fresh, info = sample.load(out / "last.pt")
    assert (fresh.image_size, fresh.channels, fresh.num_classes) == (4, 4, 3)
    assert info["vae"] == vae and Image.open(out / "step-000002.png").width == 10 * 68
    x, y, d = data(net)
    u, v = fresh(x, *conditions(y, d))
    assert_close(u, net.u(x, *conditions(y, d)))
    assert_close(u, v)
    run(sample, out / "last.pt", "--num", 5, "--out", tmp_path / "a.npz")
    images = np.load(tmp_path / "a.npz")["arr_0"]
    assert images.shape == (5, 32, 32, 3) and images.std() > 0
    for name in (flowers, tmp_path / "nowhere"):
        run(sample, out / "last.pt", "--vae", name, refused=["--vae", name])
    run(train, *init, tmp_path / "other", refused=["--init"])  # digits are no latents
    with pytest.raises(ValueError, match="4 channels of latents at 1/8"):
        sample.load_vae(save_vae(tmp_path / "other", 16, 1))


# ---- Training ----


def test_a_short_training_samples_in_one_step_what_the_data_show():
    """The method works: after 150 steps, one evaluation turns noise into images like the data."""
    torch.manual_seed(0)
    patterns = torch.tensor([[1.0, 1, -1, -1], [-1, 1, -1, 1]]).repeat_interleave(4, 1)
    patterns = patterns.view(2, 1, 4, 4)
    net = model.DiT(4, 1, 1, 2, 32, 2, 2, 1)
    noise, y = torch.randn(200, 1, 4, 4), torch.zeros(200, dtype=torch.long)

    def distance():  # to the nearest of all images that the data may have
        images = torch.cat([scale * patterns for scale in torch.linspace(0.8, 1, 11)])
        x = imf.sample(net, noise, y)
        return (x[:, None] - images).square().mean((2, 3, 4)).amin(1).mean()

    before = distance()
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0)
    for _ in range(150):
        x = patterns[torch.randint(2, (64,))] * (0.8 + 0.2 * torch.rand(64, 1, 1, 1))
        imf.imf_loss(net, x, y[:64], imf.draw(x))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before > 1.2 and distance() < 0.4 * before


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
    assert_close(second, 0.01 * other.grad.sign(), rtol=1e-3, atol=1e-6)
    average = ema.u_final_layer.linear.weight
    assert_close(average, 0.75 * before[1] + 0.25 * other.detach())
    assert not any(p.requires_grad for p in ema.parameters())  # or a graph would grow every step
    if muon_lr:
        scale = 0.5 * 0.05 * (matrix.shape[0] / matrix.shape[1]) ** 0.5
        values = torch.linalg.svdvals(first / scale)
        assert 0.5 < values.min() and values.max() < 1.3
        product = first.T @ matrix.grad  # symmetric: the same singular vectors
        assert (product - product.T).norm() < 1e-3 * product.norm()
    else:
        assert_close(first, 0.01 * matrix.grad.sign(), rtol=1e-3, atol=1e-6)


def records(out):
    return [json.loads(line) for line in open(out / "log.jsonl")]


def weights_of(out, name="net"):
    saved = torch.load(out / "last.pt", weights_only=True)
    return torch.cat([p.flatten() for p in saved[name].values()])


def assert_same_run(*folders):
    """The last checkpoints in two folders are equal, bit for bit."""
    a, b = (torch.load(out / "last.pt", weights_only=True) for out in folders)
    assert a.pop("settings") == b.pop("settings")
    assert_close(a, b, rtol=0, atol=0)


def test_a_run_continued_is_the_run_uninterrupted(small, tmp_path, run):
    """Stopped anywhere and started again, a run ends in the same bits, and its log too."""
    a, b, c = (tmp_path / name for name in "abc")

    def train_to(steps, out, *argv):
        run(train, "--out", out, "--steps", steps, "--log-every", 1, "--batch-size", 8,
            "--cooldown", 0, *argv)

    train_to(6, a)
    train_to(2, b)
    with open(b / "log.jsonl", "a") as log:  # steps after the checkpoint, then a kill
        log.write('{"step": 3, "loss_u": 7}\n{"step": 4, "lo')
    train_to(3, b)
    train_to(6, b)
    assert_same_run(a, b)
    losses = [[record["loss_u"] for record in records(out)] for out in (a, b)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    before = (b / "last.pt").stat()
    train_to(6, b)
    assert (b / "last.pt").stat() == before
    assert sorted(os.listdir(a)) == ["last.pt", "log.jsonl", "step-000006.png"]
    train_to(1, c, "--init", b / "last.pt", "--lr", 1e-12, "--muon-lr", 0)
    assert (weights_of(c) - weights_of(b, "ema")).abs().max() < 1e-6
    (b / "last.pt").unlink()  # --init is read once
    train_to(2, c, "--init", b / "last.pt", "--lr", 1e-12, "--muon-lr", 0)


def test_killed_or_interrupted_it_ends_in_the_same_weights(flowers, tmp_path, run):
    """Ctrl-C saves and ends; kill -9 loses the steps since the last checkpoint and no more."""
    argv = ["--data", flowers, "--steps", "8", "--batch-size", "4", "--save-every", "1",
            "--log-every", "1", "--out"]
    run(train, *argv, tmp_path / "whole")
    out = tmp_path / "stopped"
    for wait, how, status in ((2, signal.SIGINT, 130), (4, signal.SIGKILL, -9)):  # wait: records
        process = subprocess.Popen([sys.executable, HERE / "train.py", *argv, out],
                                   stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
        log = out / "log.jsonl"
        while process.poll() is None:
            if log.exists() and log.read_text().count("\n") >= wait:
                break
            time.sleep(0.01)
        process.send_signal(how)
        assert "Traceback" not in process.communicate()[1]
        assert process.returncode in (status, 0)
    run(train, *argv, out)
    assert_same_run(tmp_path / "whole", out)


def test_steps_without_a_finite_gradient_are_skipped(small, tmp_path, run, monkeypatch):
    """A NaN never reaches the weights, and twenty in a row end the run with the last checkpoint."""
    calls, loss = [], imf.imf_loss

    def broken(*args):
        calls.append(0)
        value, logs = loss(*args)
        return value * (float("nan") if len(calls) in bad else 1), logs

    monkeypatch.setattr(imf, "imf_loss", broken)
    argv = ["--out", tmp_path, "--batch-size", 4, "--log-every", 1, "--cooldown", 0, "--steps"]
    bad = [2, 3, 5]
    run(train, *argv, 5)
    norms = [record["grad_norm"] for record in records(tmp_path)]
    assert [norm is None for norm in norms] == [False, True, True, False, True]
    assert weights_of(tmp_path).isfinite().all()
    before = (tmp_path / "last.pt").read_bytes()
    bad = range(1000)
    run(train, *argv, 60, refused=["20 steps"])
    assert len(calls) == 25 and (tmp_path / "last.pt").read_bytes() == before


def test_a_full_disk_or_another_setting_keeps_the_last(small, tmp_path, run, monkeypatch):
    """A checkpoint appears whole or not at all, and two trainings are never mixed by mistake."""
    def full(saved, file, save=torch.save):
        if saved["step"] == 1:
            return save(saved, file)
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    argv = ["--out", tmp_path, "--batch-size", 4, "--save-every", 1, "--steps", 2]
    monkeypatch.setattr(torch, "save", full)
    run(train, *argv, refused=["cannot write", "last.pt", "No space left"])
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "log.jsonl", "step-000002.png"]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1
    for other in (["--lr", 1], ["--seed", 1], ["--tangent", "boundary"], ["--ema", 0.5],
                  ["--warmup", 7], ["--cooldown", 0], ["--model", "B/2"], ["--batch-size", 5],
                  ["--steps", 1]):
        run(train, *argv, *other, refused=other[:1])
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


# ---- Several processes ----


def torchrun(n, script, *argv):
    """Runs a script in n processes on the CPU: (exit status, standard output, standard error)."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}",
         "--", HERE / script, *map(str, argv)], text=True, capture_output=True,
        env=ONE_THREAD)
    return done.returncode, done.stdout, done.stderr


def test_any_number_of_processes_and_parts_gives_the_same(flowers, tmp_path, run):
    """Up to rounding the weights, to the byte cache and images: machines need not be alike."""
    argv = ["--data", flowers, "--image-size", 16, "--steps", 5, "--batch-size", 8, "--out"]
    for n in (1, 2):
        cache = tmp_path / f"cache{n}"
        assert torchrun(n, "train.py", *argv, tmp_path / f"run{n}", "--cache", cache)[0] == 0
    run(train, *argv, tmp_path / "plain", "--cache", tmp_path / "cache1")
    run(train, *argv, tmp_path / "parts", "--accum", 2)
    one = weights_of(tmp_path / "plain")
    for name in ("run1", "run2", "parts"):
        assert (weights_of(tmp_path / name) - one).norm() < 1e-6 * one.norm()
    [first], [second] = (list((tmp_path / f"cache{n}").glob("*/*")) for n in (1, 2))
    assert first.name == second.name == "000000000.pt"
    assert first.read_bytes() == second.read_bytes()

    argv = [tmp_path / "plain/last.pt", "--num", 9, "--out"]
    assert torchrun(2, "sample.py", *argv, tmp_path / "two.npz")[0] == 0
    run(sample, *argv, tmp_path / "one.npz")
    assert np.array_equal(*(np.load(tmp_path / f"{n}.npz")["arr_0"] for n in ("one", "two")))
    status, _, err = torchrun(2, "train.py", "--data", tmp_path / "nowhere", "--out", tmp_path)
    assert status != 0 and "nowhere" in err  # a process that fails ends the others, and says why


# ---- The scores ----


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights under the names of the published file, lively enough to tell images apart."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid.Inception, "load_state_dict", lambda self, state: None)
        state = fid.Inception(path).state_dict()
    state = {name: value for name, value in state.items() if value.ndim}
    shapes = repr(sorted((name, tuple(value.shape)) for name, value in state.items())).encode()
    # of the names and shapes in the published file
    assert hashlib.sha256(shapes).hexdigest()[:16] == "61093f3898ff55ee"
    normal = np.random.default_rng(0).standard_normal
    state.pop("fc.bias")
    for name, value in state.items():
        value.copy_(torch.from_numpy(normal(value.shape, np.float32)))
        if name.endswith("conv.weight"):
            value *= (2 / value[0].numel()) ** 0.5
        else:
            value *= 0.2 if name == "fc.weight" else 0.1
            value += name.endswith(("bn.weight", "var"))
    torch.save(state | {"fc.bias": torch.ones(1008)}, path)  # a bias that no score uses
    return path


def test_the_inception_is_that_of_torch_fidelity(weights):
    """Four of each, as torch-fidelity 0.4.0 computes them with these weights and images."""
    for size, features, logits in (
            (32, [0.365731, 0.039498, 1.231857, 0.474546], [0.4017, -14.0730, 5.1209, -1.4260]),
            (256, [0.377276, 0.038352, 1.2402, 0.458161], [0.3454, -14.0328, 5.1145, -1.5483]),
            (299, [0.378247, 0.03827, 1.240301, 0.458069], [0.3433, -14.0373, 5.1098, -1.5549])):
        found = fid.Inception(weights)(pictures(2, size).transpose(0, 3, 1, 2))
        assert found[0].shape == (2, 2048) and found[1].shape == (2, 1008)
        assert found[0][1, [0, 700, 1400, 2047]].tolist() == pytest.approx(features, abs=5e-6)
        assert found[1][1, [0, 300, 600, 1007]].tolist() == pytest.approx(logits, abs=1e-4)


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


def scores(text):
    """The numbers of each line, by name."""
    lines = [line.split() for line in text.splitlines()]
    return [dict(zip(line[::2], map(float, line[1::2]))) for line in lines]


def test_folder_npz_statistics_and_processes_score_the_same(weights, tmp_path, run, monkeypatch):
    """However the images come, the scores are those of the set."""
    inception = fid.Inception(weights)
    monkeypatch.chdir(tmp_path)
    os.makedirs("a/deep/er")
    for i, image in enumerate(pictures(6, 24)):
        Image.fromarray(image).save(f"a/deep/er/{i}.png" if i < 3 else f"a/{i}.png")
    other = pictures(5, 20, seed=1)
    np.savez_compressed("a.npz", arr_0=pictures(6, 24))
    np.savez("b.npz", arr_0=other, arr_1=np.arange(5))
    mu, sigma = fid.moments(inception(other.transpose(0, 3, 1, 2))[0])
    np.savez("ref.npz", ref_mu=mu, ref_sigma=sigma)  # the authors' names
    monkeypatch.setattr(fid, "Inception", lambda path: inception)

    [folder] = scores(run(fid, "a", "b.npz", "--save", "saved.npz"))
    assert list(folder) == ["fid", "is", "is_std", "precision", "recall"]
    same = pytest.approx(folder, rel=1e-6)
    assert scores(run(fid, "a.npz", "b.npz")) == [same]
    assert scores(torchrun(2, "fid.py", "a", "b.npz", "--inception", weights)[1]) == [same]
    monkeypatch.setattr(fid, "Inception", None)  # two statistics need no network
    [known] = scores(run(fid, "saved.npz", "ref.npz"))
    assert known == {"fid": pytest.approx(folder["fid"], rel=1e-6)}


class Thumbnail(torch.nn.Module):
    """Quick in the place of the Inception: an image's features are its pixels, 32 x 64 of them."""

    def forward(self, images):
        x = fid.resize(torch.as_tensor(images))
        x = torch.nn.functional.adaptive_avg_pool2d(x, (32, 64)).mean(1).flatten(1) / 50
        return x, x[:, :1008]


def test_a_checkpoint_is_scored_as_it_is_sampled(small, tmp_path, run, monkeypatch):
    """A line for each scale, of the images that sample.py would write; training logs the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fid, "Inception", lambda path: Thumbnail())
    mu, sigma = fid.moments(Thumbnail()(pictures(9, 20).transpose(0, 3, 1, 2))[0])
    np.savez("b.npz", arr_0=pictures(9, 20))
    np.savez("ref.npz", mu=mu, sigma=sigma)

    def expected(path, n, seed, omega):
        net, _ = sample.load(path)
        images = sample.generate(net, range(n), range(net.num_classes), seed, omega=omega)
        found = fid.moments(Thumbnail()(np.concatenate(list(images)))[0])
        return pytest.approx(fid.frechet_distance(*found, mu, sigma), rel=1e-5)

    checkpoint("last.pt", network(channels=1))
    one, three = scores(run(fid, "last.pt", "b.npz", "--num", 35, "--seed", 2, "--omega", 1, 3))
    assert (one["omega"], three["omega"]) == (1, 3)
    assert three["fid"] == expected("last.pt", 35, 2, 3.0)

    argv = ["--steps", 4, "--batch-size", 4, "--log-every", 3, "--out", "out", "--fid-every", 2,
            "--fid-num", 20, "--fid-ref"]
    run(train, *argv, "ref.npz")
    assert ["fid" in record for record in records(tmp_path / "out")] == [True, False, True]
    assert records(tmp_path / "out")[-1]["fid"] == expected("out/last.pt", 20, 0, 2.5)
    run(train, *argv, "b.npz", refused=["b.npz", "no mu, sigma"])


# ---- What is refused ----


class Hostile:
    """Unpickled, it would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


def write(path, content):
    """A file of raw bytes, or of what its suffix says: an image, arrays, a state."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".png":
        Image.fromarray(content).save(path)
    elif path.suffix == ".npz":
        np.savez(path, *content) if isinstance(content, tuple) else np.savez(path, **content)
    else:
        torch.save(content, path)


def refused_by_sample():
    """Yields arguments and what the refusal must name; the files are written to this folder."""
    net = network(channels=1)
    whole = checkpoint(Path("last.pt"), net).read_bytes()
    files = {
        "cut": whole[:len(whole) // 2], "zero": b"", "text": b"not a checkpoint",
        "pickle": pickle.dumps({"ema": Hostile()}), "list": [1, 2],
        "hostile": {"ema": Hostile(), "settings": {}, "step": 1},
        "other": {"weights": torch.ones(3)}, "net": {f"net.{i}": torch.ones(2) for i in "12"},
        "ema": {"ema": {"a": 1}, "settings": {"image_size": 8}, "step": 1}}
    for name, content in files.items():
        write(f"{name}.pt", content)
    for size in (9, 10**9, -4, "x"):
        checkpoint(f"{size}.pt", net, image_size=size)
    torch.nn.init.constant_(net.class_tokens, float("nan"))
    checkpoint("nan.pt", net)
    os.mkdir("folder.png")
    for name in (*files, 9, 10**9, -4, "x", "nan", "missing"):
        yield [f"{name}.pt"], f"{name}.pt"
    yield ["folder.png"], "folder.png"
    yield ["last.pt", "--out", "last.pt/x.png"], "last.pt"
    for argv in ("--classes 5", "--classes -1", "--omega 0", "--omega -2", "--omega nan",
                 "--omega inf", "--interval 0.6 0.4", "--interval 0 1.5", "--steps 0", "--num 0",
                 "--num x", "--vae some", "--device abacus", "--sead 1", "--out .",
                 "--out folder.png"):
        yield ["last.pt", *argv.split()], argv.split()[0]


HOSTILE = np.array([Hostile()] * 12, object)
NO_IMAGES = {"float": PICTURES / 255, "line": PICTURES[0, 0], "two": PICTURES[..., :2],
             "none": PICTURES[:0], "unsafe": HOSTILE}
NO_LABELS = {"negative": LABELS - 1, "halves": LABELS / 2, "few": LABELS[:5], "huge": LABELS + 99,
             "objects": HOSTILE}


def refused_by_train():
    for name, images in NO_IMAGES.items():
        write(f"{name}.npz", (images, LABELS[:len(images)]))
    for name, labels in NO_LABELS.items():
        write(f"{name}.npz", (PICTURES, labels))
    write("good.npz", (PICTURES, LABELS))
    write("oblong.npz", (PICTURES[:, :6], LABELS))
    write("odd.npz", (PICTURES[:, :7, :7], LABELS))
    write("alone.npz", (PICTURES,))
    write("cut.npz", Path("good.npz").read_bytes()[:300])
    for name in (*NO_IMAGES, *NO_LABELS, "oblong", "alone", "cut", "missing"):
        yield ["--data", f"{name}.npz"], f"{name}.npz"
    for name in ("flat/a.png", "fine/rose/a.png", "half/rose/a.png"):
        write(name, PICTURES[0])
    for name in ("file", "texts/rose/a.txt", "lies/rose/b.png", "broken/last.pt"):
        write(name, b"text")
    write("half/rose/b.png", Path("fine/rose/a.png").read_bytes()[:150])
    os.makedirs("hollow/rose")
    os.mkdir("empty")
    for argv in ("--steps 0", "--lr nan", "--lr 0", "--batch-size -3", "--batch-size 8 --accum 3",
                 "--ema 1.5", "--seed -1", "--warmup -1", "--vae some", "--image-size 0"):
        yield argv.split(), argv.split()[-2]
    for argv in ("--model XXL", "--tangent up", "--device abacus", "--init nowhere", "--out file",
                 "--out file/below", "--out broken", "--data nowhere", "--data file",
                 "--data empty", "--data hollow", "--data flat", "--data texts",
                 "--data fine --image-size 15", "--data fine --cache file"):
        yield argv.split(), argv.split()[-1]
    yield ["--data", "half"], "half/rose/b.png"
    yield ["--data", "lies"], "lies/rose/b.png"
    yield ["--data", "odd.npz"], "multiple of 2"
    yield ["--image-size", "64"], "--data"


def refused_by_fid(weights):
    mu, sigma = np.zeros(2048), np.eye(2048)
    files = {
        "keys": dict(x=mu), "one": dict(arr_0=PICTURES[:1]), "half": dict(mu=mu),
        "pickled": dict(mu=HOSTILE, sigma=sigma), "nan": dict(mu=mu, sigma=sigma * np.nan),
        "text": dict(mu=mu.astype(str), sigma=sigma), "small": dict(mu=mu[:9], sigma=sigma[:9, :9]),
        "file": b"text"}
    for name, content in files.items():
        write(f"{name}.npz", content)
    sets = [f"{name}.npz" for name in (*files, *NO_IMAGES, "cut", "missing")]
    for name in ("missing", "hollow", "flat", "half/rose/b.png", "text.pt", *sets):
        yield [name.split("/")[0], "good.npz"], name
        yield ["good.npz", name.split("/")[0]], name
    state = torch.load(weights)
    for name, content, named in (
            ("other.pth", {"fc.weight": torch.ones(2)}, "other.pth"), ("list.pth", [1], "list.pth"),
            ("hostile.pth", {"fc.weight": Hostile()}, "hostile.pth"),
            ("nan.pth", state | {"fc.weight": state["fc.weight"] * np.nan}, "not finite")):
        write(name, content)
        yield ["good.npz", "--inception", name], named
    for argv in ("--omega 0", "--num 1", "--steps 0", "--device abacus"):
        yield ["good.npz", *argv.split()], argv.split()[0]
    yield ["good.npz", "--save", "text.pt/x.npz"], "text.pt"
    yield ["good.npz", "--inception", ""], "--inception FILE"  # nor a network


def test_bad_input_is_refused_in_one_line(small, weights, run, tmp_path, monkeypatch):
    """What is wrong is named, with status 2; nothing is written and no code in a file is run."""
    def unreachable(*_, **__):
        raise OSError("no route to host")

    load = fid.Inception
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr(fid, "Inception", lambda path: Thumbnail() if path is None else load(path))
    monkeypatch.chdir(tmp_path)
    cases = [(sample, *case) for case in refused_by_sample()]
    cases += [(train, *case) for case in refused_by_train()]
    cases += [(fid, *case) for case in refused_by_fid(weights)]
    before = sorted(tmp_path.rglob("*"))
    for program, argv, named in cases:
        run(program, *argv, refused=[named])
        for decoded in tmp_path.glob("*-32px"):  # what was decoded stays
            shutil.rmtree(decoded)
        assert sorted(tmp_path.rglob("*")) == before, argv
