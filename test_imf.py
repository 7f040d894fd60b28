"""What improved MeanFlow is and what this code promises, in the order in which one learns it.

    pytest -q test_imf.py                      the tests
    python test_imf.py bench [MODEL [BATCH [RUNS [KIND ...]]]]   our step beside a literal port's
    python test_imf.py precision [MODEL [BATCH [STEPS]]]         how far bf16 is from float32
    python test_imf.py judge [CHECKPOINT [OMEGA [STEPS]]]      are its digits those asked for?
"""

import contextlib
import copy
import fcntl
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
import tracemalloc
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
SMALL = dict(patch_size=2, hidden_size=32, depth=3, num_heads=2, head_depth=2)


def network(image_size=8, channels=2, num_classes=5, **sizes):
    """A small DiT whose every parameter is random: nothing is hidden behind a zero."""
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


# ---- The method ------------------------------------------------------------------------------


M, S = 0.5, 0.2  # Gaussian data: mean and standard deviation; then z_t is Gaussian too


def exact_v(z, t):
    mean, std = (1 - t) * M, ((1 - t) ** 2 * S**2 + t**2) ** 0.5
    return -M + (t - (1 - t) * S**2) / std**2 * (z - mean)


def exact_u(z, r, t):
    """Along the flow of a Gaussian, (z - mean) / std stays the same."""
    mean, std = (lambda t: (1 - t) * M), (lambda t: ((1 - t) ** 2 * S**2 + t**2) ** 0.5)
    z_r = mean(r) + std(r) / std(t) * (z - mean(t))
    return (z - z_r) / (t - r)


def test_exact_average_velocity_satisfies_the_meanflow_identity():
    t, r = torch.tensor([0.9, 0.6, 1.0]).double(), torch.tensor([0.2, 0.5, 0.0]).double()
    z = torch.randn(3).double()
    u, du_dt = torch.func.jvp(exact_u, (z, r, t), (exact_v(z, t), 0 * r, 1 + 0 * t))
    torch.testing.assert_close(u + (t - r) * du_dt, exact_v(z, t))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_with_the_exact_average_velocity_map_noise_to_data(steps):
    class Exact:
        t = 1.0  # a network does not see t; this one keeps count

        def u(self, z, h, *_):
            u, self.t = exact_u(z, self.t - h[0], self.t), self.t - h[0]
            return u

    x = imf.sample(Exact(), torch.randn(200_000).double(), torch.zeros(200_000), steps)
    assert abs(x.mean() - M) < 2e-3 and abs(x.std() - S) < 2e-3


def test_draws_have_the_stated_distributions():
    x = torch.empty(100_000, 1, 1, 1)
    d = imf.draw(x, torch.Generator().manual_seed(0))
    fm = torch.arange(len(x)) < 50_000
    assert torch.equal(d.r == d.t, fm) and (d.r[~fm] < d.t[~fm]).all()
    logits = torch.cat((d.t[~fm], d.r[~fm])).logit()
    assert abs(logits.mean() + 0.4) < 0.02 and abs(logits.std() - 1) < 0.02
    assert abs(d.noise.mean()) < 0.02 and abs(d.noise.std() - 1) < 0.02
    u = d.omega.log() / np.log(8)  # density 1 / omega: the logarithm is uniform
    assert 0 <= u.min() and u.max() <= 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 2e-3
    assert (d.t_min[fm] == 0).all() and (d.t_max[fm] == 1).all()
    for value, low in ((d.t_min[~fm], 0), (d.t_max[~fm], 0.5)):
        assert low <= value.min() and value.max() <= low + 0.5
        assert abs(value.mean() - low - 0.25) < 0.01
    assert abs(d.drop.float().mean() - 0.1) < 0.005 and not d.drop[~fm].any()
    flat = imf.draw(x, torch.Generator().manual_seed(0), beta=0.0).omega  # uniform on [1, 8]
    assert 1 <= flat.min() and flat.max() <= 8 and abs(flat.mean() - 4.5) < 0.05
    steep = imf.draw(x, torch.Generator().manual_seed(0), beta=2.0).omega  # 1 / omega is uniform
    assert abs((1 / steep).mean() - (1 + 1 / 8) / 2) < 0.01


def test_the_same_generator_draws_the_same_numbers_and_strided_parts_keep_the_order():
    x = torch.empty(12, 1, 2, 2)
    a, b = (imf.draw(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(i, j) for i, j in zip(a, b))
    for k in range(3):
        fm = (a.r == a.t)[k::3]
        assert torch.equal(fm, fm.sort(descending=True)[0])


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
        pair = net(torch.cat((z, z)), zero.repeat(2), torch.cat((omega, one)), zero.repeat(2),
                   one.repeat(2), torch.cat((y, null)))[1]
        v_u = pair[len(x):]
        at_r_equal_t, v_c = net(z, zero, inside, zero, one, y)
        v_g = e - x + col(1 - 1 / inside) * (v_c - v_u)
    y = torch.where(drop, null, y)
    v_g = torch.where(col(drop), e - x, v_g)
    dz = {"v-head": v_c, "boundary": at_r_equal_t, "conditional": v_g}[tangent]
    u, du_dt, v = torch.func.jvp(
        lambda z, t, r: net(z, t - r, omega, t_min, t_max, y), (z, t, r), (dz, one, zero),
        has_aux=True)
    V = u + col(t - r) * du_dt.detach()
    s_u, s_v = ((p - v_g).square().sum((1, 2, 3)) for p in (V, v))
    return (s_u / (s_u + norm_eps).detach() + s_v / (s_v + norm_eps).detach()).mean()


@pytest.mark.parametrize("tangent", imf.TANGENTS)
@pytest.mark.parametrize("n, norm_eps", [(1, 0.01), (2, 0.01), (7, 0.01), (16, 0.01), (16, 1e3)])
def test_the_loss_and_every_gradient_equal_the_literal_port(tangent, n, norm_eps):
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


def watch(net):
    """A list that receives of each JVP its (z, h), their tangents, the conditions and du/dt."""
    seen = []

    def u(z, h, *conditions, u=net.u):
        out = u(z, h, *conditions)
        seen.append((*zip(unpack_dual(z), unpack_dual(h)), conditions, unpack_dual(out).tangent))
        return out

    net.u = u
    return seen


def test_jvp_matches_finite_differences():
    net = network()
    seen = watch(net)
    imf.imf_loss(net, *data(net))
    ((z, h), (dz, dh), conditions, du_dt), = seen
    eps = 3e-3
    with torch.no_grad():
        ahead, behind = (net.u(z + s * dz, h + s * dh, *conditions) for s in (eps, -eps))
    difference = (ahead - behind) / (2 * eps)
    assert (du_dt - difference).norm() < 2e-3 * difference.norm() and (dh == 1).all()


def test_where_r_equals_t_it_is_flow_matching():
    net = network()
    x, y, _ = data(net)
    draws = imf.draw(x, flow_matching=1.0, class_dropout=1.0)
    _, logs = imf.imf_loss(net, x, y, draws)
    t = draws.t[:, None, None, None]
    none = torch.full_like(y, net.num_classes)
    zero, one = torch.zeros(len(x)), torch.ones(len(x))
    u, v = net((1 - t) * x + t * draws.noise, zero, draws.omega, zero, one, none)
    torch.testing.assert_close(logs["loss_u"], (u - (draws.noise - x)).square().mean())
    torch.testing.assert_close(logs["loss_v"], (v - (draws.noise - x)).square().mean())


def test_only_the_training_pass_carries_a_gradient():
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
    net = network()
    x, y, draws = data(net)
    never = draws._replace(t_min=torch.full_like(draws.t, 2.0), r=draws.t * 0.5)
    _, logs = imf.imf_loss(net, x, y, never)
    t = draws.t[:, None, None, None]
    _, v = net((1 - t) * x + t * draws.noise, never.t - never.r, draws.omega, never.t_min,
               never.t_max, torch.where(draws.drop, net.num_classes, y))
    torch.testing.assert_close(logs["loss_v"], (v - (draws.noise - x)).square().mean())
    always = never._replace(t_min=torch.zeros_like(draws.t), t_max=torch.ones_like(draws.t))
    assert abs(imf.imf_loss(net, x, y, always)[1]["loss_v"] - logs["loss_v"]) > 1e-3


def test_a_dropped_class_is_the_null_class():
    net = network()
    x, y, draws = data(net)
    every = draws._replace(drop=torch.ones_like(draws.drop))
    imf.imf_loss(net, x, y, every)[0].backward()
    rows = net.y_embedder.weight.grad.abs().sum(1)
    assert rows[-1] > 0 and (rows[:-1] == 0).all()
    assert imf.imf_loss(net, x, y, every)[0] == imf.imf_loss(net, x, (y + 1) % 5, every)[0]


def test_an_unknown_tangent_is_refused():
    net = network()
    with pytest.raises(ValueError, match="sideways"):
        imf.imf_loss(net, *data(net), "sideways")


# ---- The network -----------------------------------------------------------------------------


@pytest.mark.parametrize("name, to_sample, to_train", [
    ("B/2", 88.9, 145.6), ("M/2", 173.9, 230.6), ("L/2", 409.1, 509.8), ("XL/2", 610.4, 711.1)])
def test_parameters_of_the_paper_s_networks(name, to_sample, to_train):
    with torch.device("meta"):
        net = model.DiT(32, 4, 1000, **model.MODELS[name])
    million = sum(p.numel() for p in net.parameters()) / 1e6
    v_head = sum(p.numel() for p in net.v_heads.parameters()) / 1e6
    assert round(million, 1) == to_train and round(million - v_head, 1) == to_sample


def test_initialisation():
    torch.manual_seed(0)
    net = model.DiT(16, 3, 10, 4, 384, 2, 6, 1)
    block = net.u_heads[0]
    assert (block.attn_scale == 0).all() and (block.mlp_scale == 0).all()
    assert (net.u_final_layer.linear.weight == 0).all()
    for linear in (block.attn.qkv_proj, block.attn.out_proj, block.mlp.w13, block.mlp.w2):
        assert abs(linear.weight.std() * linear.in_features**0.5 - 0.32) < 0.01
    assert abs(net.h_embedder.mlp[0].weight.std() - 1 / 16) < 2e-3
    assert abs(net.y_embedder.weight.std() - 384**-0.5) < 5e-3
    assert net.x_embedder.weight.abs().max() <= (6 / (4 * 4 * 3 + 384)) ** 0.5


def test_branches_alone_equal_the_whole():
    net = network()
    x, y, d = data(net)
    conditions = d.t - d.r, d.omega, d.t_min, d.t_max, y
    u, v = net(x, *conditions)
    assert u.shape == v.shape == x.shape
    assert torch.equal(net.u(x, *conditions), u) and torch.equal(net.v(x, *conditions), v)


def test_rotary_embedding_turns_neighbouring_pairs():
    x = torch.randn(3, 5, 8)
    out = model.rotate(x, model.rotations(5, 8, "cpu"))
    angle = torch.tensor(4 * 10000 ** (-2 / 8))  # index 4, pair (2, 3)
    a, b = x[:, 4, 2], x[:, 4, 3]
    torch.testing.assert_close(out[:, 4, 2], a * angle.cos() - b * angle.sin())
    torch.testing.assert_close(out[:, 4, 3], a * angle.sin() + b * angle.cos())
    torch.testing.assert_close(out[:, 0], x[:, 0])


def test_a_linear_layer_s_forward_derivative_costs_one_product():
    layer, x = model.Linear(16, 8), torch.randn(4, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as count:
        _, dy = torch.func.jvp(layer, (x,), (2 * x,))
    assert count.get_total_flops() == 2 * (2 * 4 * 16 * 8)
    torch.testing.assert_close(dy, 2 * x @ layer.weight.T)


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
        if "embedder.mlp" in name or "proj.w" in name or ".w13." in name or ".w2." in name \
                or "layer.linear" in name:
            stem, kind = name.rsplit(".", 1)
            name = f"{stem}._flax_linear.{kind}"
        name = name.replace("x_embedder.proj._flax_linear", "x_embedder.proj")
        parts = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "w13": ["w1", "w3"]}
        for fused, names in parts.items():
            if fused in name:
                out |= {name.replace(fused, n): c for n, c in zip(names, value.chunk(len(names)))}
                break
        else:
            out[name] = value
    return out


@pytest.mark.parametrize("v_head", [False, True])
def test_released_weights_load_by_name_and_shape_alone(v_head, tmp_path):
    net = network(depth=5, num_classes=7)
    torch.save(released(net, v_head), tmp_path / "iMF.pth")
    assert len(torch.load(tmp_path / "iMF.pth")) > 60
    state = torch.load(tmp_path / "iMF.pth")
    same = model.from_official(dict(reversed(state.items())), image_size=8)
    x, y, d = data(net)
    conditions = d.t - d.r, d.omega, d.t_min, d.t_max, y
    assert torch.equal(same.u(x, *conditions), net.u(x, *conditions))
    if v_head:
        assert torch.equal(same.v(x, *conditions), net.v(x, *conditions))
    else:
        with pytest.raises(ValueError, match="no v-head"):
            same.v(x, *conditions)
    state.pop("net.shared_blocks.0.attn.k_proj._flax_linear.weight")
    with pytest.raises(KeyError, match="k_proj"):
        model.from_official(state, image_size=8)


# ---- Cost ------------------------------------------------------------------------------------


def plain_linear(step):
    """Runs a step with PyTorch's own nn.Linear, as a port has it."""
    ours, model.Linear.forward = model.Linear.forward, torch.nn.Linear.forward
    try:
        return step()
    finally:
        model.Linear.forward = ours


def test_a_step_needs_little_more_than_half_of_the_literal_port_s_arithmetic():
    net = network(16, 4, 10, patch_size=2, hidden_size=96, depth=12, num_heads=2, head_depth=8)
    x, y, draws = data(net, 64)

    def arithmetic(step):  # the fused CPU kernel would be invisible to the counter
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count:
            step().backward()
        return count.get_total_flops()

    ours = arithmetic(lambda: imf.imf_loss(net, x, y, draws)[0])
    literal = plain_linear(lambda: arithmetic(lambda: literal_loss(net, x, y, draws)))
    assert ours < 0.56 * literal


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no compiler")
def test_a_compiled_step_equals_the_eager_one_and_is_compiled_once():
    net = network()
    seen = watch(net)

    def steps():
        for seed in range(8):  # the guided samples are never as many as the step before
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


# ---- Sampling --------------------------------------------------------------------------------


def checkpoint(path, net, **settings):
    """A checkpoint such as train.py writes, as far as sample.py reads it."""
    settings = {"image_size": net.image_size, **settings}
    torch.save({"ema": net.state_dict(), "settings": settings, "step": 1}, path)
    return str(path)


def call(program, *argv, monkeypatch, capsys=None):
    """Runs a command line in this process; returns (exit status, standard error)."""
    monkeypatch.setattr(sys, "argv", [program.__name__ + ".py", *map(str, argv)])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    status = 0
    try:
        sample.run(program.main)
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().err if capsys else ""


def test_an_image_depends_on_its_own_seed_alone():
    net = network(channels=1)

    def draw(numbers, seed=0):
        return np.concatenate(list(sample.generate(net, numbers, [0, 1, 2], seed)))

    whole = draw(range(20))
    for some in (range(3), range(1, 20, 2), [7, 4], range(19, -1, -1)):
        assert np.array_equal(draw(some), whole[list(some)])
    assert len(np.unique(np.concatenate((whole, draw(range(20), seed=1))), axis=0)) == 40


def test_guidance_and_steps_are_free_at_every_call():
    net = network()
    noise, y, _ = data(net)
    one = imf.sample(net, noise, y, 1, omega=2.0, t_min=0.3, t_max=0.7)
    many = imf.sample(net, noise, y, 1, torch.full((8,), 2.0), torch.full((8,), 0.3), 0.7)
    assert torch.equal(one, many)
    for other in (dict(steps=3), dict(omega=3.0), dict(t_min=0.1), dict(t_max=0.8)):
        kwargs = dict(steps=1, omega=2.0, t_min=0.3, t_max=0.7) | other
        assert (imf.sample(net, noise, y, **kwargs) - one).abs().max() > 1e-4


def test_sample_writes_a_sheet_a_folder_or_an_npz(tmp_path, monkeypatch):
    net = network(channels=3)
    path = checkpoint(tmp_path / "last.pt", net)

    def run(*argv):
        assert call(sample, path, *argv, monkeypatch=monkeypatch)[0] == 0

    run("--num", 6, "--classes", 3, 1, "--out", tmp_path / "a.npz", "--seed", 5)
    run("--num", 6, "--classes", 3, 1, "--out", tmp_path / "folder", "--seed", 5)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.dtype == np.uint8 and images.shape == (6, 8, 8, 3)
    assert labels.tolist() == [3, 1] * 3
    for i, image in enumerate(images):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "folder" / f"{i:06d}.png")), image)
    run()
    assert Image.open(tmp_path / "samples.png").size == (10 * 80, 10 * 80)
    run("--omega", 1, 2, 4, "--num", 5, "--out", tmp_path / "b.png", "--interval", 0.2, 0.8)
    assert Image.open(tmp_path / "b.png").size == (5 * 80, 3 * 80)
    run("--omega", 1, 2, "--num", 3, "--out", tmp_path / "b.png", "--interval", 0.2, 0.8,
        "--interval", 0, 0.5, "--steps", 1, 2, 4)
    assert Image.open(tmp_path / "b.png").size == (3 * 80, 12 * 80)
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "b.png", "folder", "last.pt", "samples.png"]


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["IMF_HOSTILE"],)


def test_a_bad_checkpoint_is_one_line_and_runs_no_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IMF_HOSTILE", str(tmp_path / "owned"))
    good = checkpoint(tmp_path / "good.pt", network(channels=1))
    with open(good, "rb") as file:
        whole = file.read()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"ema": Hostile()}))
    torch.save({"ema": Hostile(), "settings": {}, "step": 1}, tmp_path / "hostile.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"weights": torch.ones(3)}, tmp_path / "other.pt")
    torch.save({"ema": {"a": 1}, "settings": {"image_size": 8}, "step": 1}, tmp_path / "ema.pt")
    for size in (9, 10**9, -4, 8.0, "8"):
        checkpoint(tmp_path / f"size{size}.pt", network(channels=1), image_size=size)
    torch.save({f"net.{i}": torch.ones(2) for i in range(3)}, tmp_path / "net.pt")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # in the middle of some weight
    (tmp_path / "flipped.pt").write_bytes(flipped)
    net = network(channels=1)
    torch.nn.init.constant_(net.class_tokens, float("nan"))
    checkpoint(tmp_path / "nan.pt", net)
    names = sorted(os.listdir(tmp_path))
    (tmp_path / "folder").mkdir()
    for name in [*names, "missing.pt", "folder"]:
        if name != "good.pt":
            status, err = call(sample, tmp_path / name, monkeypatch=monkeypatch, capsys=capsys)
            assert status == 2 and err.count("\n") == 1 and name in err, err
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "folder"])


@pytest.mark.parametrize("argv", [
    ["--classes", "5"], ["--classes", "-1"],
    ["--omega", "0"], ["--omega", "-2"], ["--omega", "nan"], ["--omega", "inf"],
    ["--interval", "0.6", "0.4"], ["--interval", "0", "1.5"], ["--steps", "0"], ["--num", "0"],
    ["--num", "x"], ["--batch-size", "0"], ["--device", "abacus"], ["--out", "x.jpeg"],
    ["--out", "last.pt/x.png"], ["--sead", "1"],
    ["--num", "1000000", "--out", "x.png"], ["--out", "."], ["--out", "folder.png"]])
def test_sample_refuses_bad_arguments_in_one_line(argv, tmp_path, monkeypatch, capsys):
    checkpoint(tmp_path / "last.pt", network(channels=1))
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    status, err = call(sample, "last.pt", *argv, monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and err.splitlines()[-1].startswith("sample.py: ")
    assert sorted(os.listdir(tmp_path)) == ["folder.png", "last.pt"]


# ---- Training --------------------------------------------------------------------------------


def test_a_short_training_draws_in_one_step_what_the_data_show():
    torch.manual_seed(0)
    patterns = torch.tensor([[1.0, 1, -1, -1], [-1, 1, -1, 1]]).repeat_interleave(4, 1)
    patterns = patterns.view(2, 4, 4)
    net = model.DiT(4, 1, 1, 2, 32, 2, 2, 1)
    noise, y = torch.randn(200, 1, 4, 4), torch.zeros(200, dtype=torch.long)

    def distance():  # to the nearest of all images that the data may have
        x = imf.sample(net, noise, y)
        images = [scale * p for scale in torch.linspace(0.8, 1, 11) for p in patterns]
        distances = torch.stack([(x - i).square().mean((1, 2, 3)) for i in images])
        return distances.min(0)[0].mean().item()

    before = distance()
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0)
    for _ in range(150):
        x = patterns[torch.randint(2, (64,))] * (0.8 + 0.2 * torch.rand(64, 1, 1))
        imf.imf_loss(net, x[:, None], y[:64], imf.draw(x[:, None]))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before > 1.2 and distance() < 0.4 * before


def test_digits_are_a_pure_function_of_number_and_seed():
    images, labels = train.digits(500, seed=3)
    again, _ = train.digits(500, seed=3)
    other, _ = train.digits(500, seed=4)
    assert images.dtype == np.uint8 and images.shape[0] == 500 and labels.shape == (500,)
    assert np.array_equal(images, again) and not np.array_equal(images, other)
    assert set(labels) == set(range(10)) and len(np.unique(images, axis=0)) == 500
    border = np.maximum(images[:, :, [0, -1]].max((1, 2, 3)), images[..., [0, -1]].max((1, 2, 3)))
    assert (border > 0).mean() < 0.02  # nothing is cut off


def test_every_image_of_an_epoch_comes_once_in_an_order_of_its_own():
    args = types.SimpleNamespace(batch_size=5, seed=7, t_mean=-0.4, t_std=1.0)
    images, labels = train.digits(10)
    batches = [train.batch(images, labels, args, 0, 1, k) for k in range(4)]
    x = torch.cat([b[0] for b in batches]).flatten(1)
    assert len(x[:10].unique(dim=0)) == len(x[10:].unique(dim=0)) == 10
    assert not torch.equal(x[:10], x[10:])
    assert x.min() >= -1 and x.max() <= 1 and x.max() > 0.9
    assert not torch.equal(batches[0][2].noise, batches[1][2].noise)
    x, y, draws = batches[1]
    for rank in (0, 1):  # of two processes
        part, label, own = train.batch(images, labels, args, rank, 2, 1)
        assert torch.equal(part, x[rank::2]) and torch.equal(label, y[rank::2])
        assert all(torch.equal(a, b[rank::2]) for a, b in zip(own, draws))


@pytest.fixture
def small(monkeypatch):
    """`--model tiny` made smaller still, and fewer digits."""
    monkeypatch.setitem(model.MODELS, "tiny", SMALL)
    digits = train.digits
    monkeypatch.setattr(train, "digits", lambda n: digits(100))


def trained(out):
    return torch.load(out / "last.pt", weights_only=True)


def same(a, b):
    """Equal, bit for bit, through dictionaries, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_run_continued_is_the_run_uninterrupted(small, tmp_path, monkeypatch):
    def run(out, steps):
        assert call(train, "--out", tmp_path / out, "--steps", steps, "--log-every", 1,
                    "--batch-size", 8, "--cooldown", 0, monkeypatch=monkeypatch)[0] == 0
        return trained(tmp_path / out)

    whole = run("a", 6)
    run("b", 2)
    run("b", 3)
    assert same(run("b", 6), whole)
    losses = [[json.loads(line)["loss_u"] for line in open(tmp_path / out / "log.jsonl")]
              for out in "ab"]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    before = (tmp_path / "b" / "last.pt").stat()
    run("b", 6)
    assert (tmp_path / "b" / "last.pt").stat() == before
    assert sorted(os.listdir(tmp_path / "a")) == [".lock", "last.pt", "log.jsonl",
                                                  "step-000006.png"]
    net, info = sample.load(tmp_path / "a" / "last.pt")
    assert info["step"] == 6 and same(net.state_dict(), whole["ema"])


def test_a_second_run_on_the_same_out_is_refused(small, tmp_path, monkeypatch, capsys):
    argv = ["--out", tmp_path, "--steps", 1, "--batch-size", 4]
    with open(tmp_path / ".lock", "w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        status, err = call(train, *argv, monkeypatch=monkeypatch, capsys=capsys)
        assert status == 2 and "another run" in err and os.listdir(tmp_path) == [".lock"]
    assert call(train, *argv, monkeypatch=monkeypatch)[0] == 0


def test_killed_or_interrupted_it_ends_in_the_same_weights(tmp_path):
    def start(out, wait=None, how=None):
        process = subprocess.Popen(
            [sys.executable, os.path.join(HERE, "train.py"), "--out", str(tmp_path / out),
             "--steps", "8", "--batch-size", "4",
             "--save-every", "1", "--log-every", "1", "--sample-every", "9"],
            stderr=subprocess.PIPE)
        while wait and process.poll() is None:
            log = tmp_path / out / "log.jsonl"
            if log.exists() and log.read_text().count("\n") >= wait:
                process.send_signal(how)
                break
            time.sleep(0.02)
        error = process.communicate()[1].decode()
        assert "Traceback" not in error, error
        return process.returncode

    assert start("whole") == 0
    assert start("stopped", 2, 2) in (130, 0)  # SIGINT: saves first
    assert start("stopped", 4, 9) in (-9, 0)
    assert start("stopped") == 0
    assert same(trained(tmp_path / "whole"), trained(tmp_path / "stopped"))


def test_accumulation_trains_the_same_model(small, tmp_path, monkeypatch):
    weights = []
    for accum in (1, 2):
        call(train, "--out", tmp_path / str(accum), "--steps", 4, "--batch-size", 8,
             "--accum", accum, "--precision", "float32", monkeypatch=monkeypatch)
        net = trained(tmp_path / str(accum))["net"]
        weights.append(torch.cat([p.flatten() for p in net.values()]))
    assert (weights[0] - weights[1]).norm() < 1e-5 * weights[0].norm()


def test_steps_without_a_finite_gradient_are_skipped_and_twenty_in_a_row_end_the_run(
        small, tmp_path, monkeypatch, capsys):
    calls, loss = [], imf.imf_loss

    def broken(*args):
        calls.append(0)
        value, logs = loss(*args)
        return value * (float("nan") if len(calls) in bad else 1), logs

    monkeypatch.setattr(imf, "imf_loss", broken)
    argv = ["--out", tmp_path, "--batch-size", 4, "--save-every", 3, "--log-every", 1,
            "--cooldown", 0, "--steps"]
    bad = [2, 3]
    assert call(train, *argv, 4, monkeypatch=monkeypatch, capsys=capsys)[0] == 0
    log = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert [line["skipped"] for line in log] == [0, 1, 2, 2]
    assert [line["grad_norm"] is None for line in log] == [False, True, True, False]
    good, bad = trained(tmp_path), range(1000)
    status, err = call(train, *argv, 60, monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and "20 steps" in err.splitlines()[-1]
    after = trained(tmp_path)
    assert len(calls) == 24 and same([after["net"], after["ema"]], [good["net"], good["ema"]])


def test_a_full_disk_leaves_the_last_checkpoint(small, tmp_path, monkeypatch, capsys):
    argv = ["--out", tmp_path, "--batch-size", 4, "--cooldown", 0, "--steps"]
    call(train, *argv, 1, monkeypatch=monkeypatch)
    before = (tmp_path / "last.pt").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, err = call(train, *argv, 2, monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and "No space left" in err.splitlines()[-1]
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


@pytest.fixture
def flowers(tmp_path):
    """A folder of three classes, of all sizes and modes, with one file that is no image."""
    rng = np.random.default_rng(0)
    kinds = {"aster": ["RGB", "L"], "iris": ["RGBA", "P", "1"], "rose": ["CMYK"]}
    for name, modes in kinds.items():
        folder = tmp_path / "flowers" / name
        folder.mkdir(parents=True)
        for i, mode in enumerate(modes):
            pixels = rng.integers(256, size=(20 + 30 * i, 41, 3), dtype=np.uint8)
            suffix = "jpg" if mode == "CMYK" else "png"
            Image.fromarray(pixels).convert(mode).save(folder / f"{i}.{suffix}")
    (tmp_path / "flowers" / "iris" / "notes.txt").write_text("not an image")
    return tmp_path / "flowers"


def test_a_folder_is_decoded_once_and_again_when_it_changes(flowers, tmp_path, monkeypatch, capsys):
    for i in range(20):
        shutil.copy(flowers / "aster" / "0.png", flowers / "aster" / f"copy-{i:02d}.png")
    cache = tmp_path / "cache"

    def load(size=16):
        images, *rest = train.folder_data(str(flowers), size, str(cache))
        return np.stack(list(images)), *rest

    first, labels, classes, source = load()
    err = capsys.readouterr().err
    assert "left out 1, no images" in err and "notes.txt" in err
    assert first.shape == (26, 3, 16, 16)
    assert labels.tolist() == [0] * 22 + [1, 1, 1, 2] and classes == 3
    [folder] = cache.glob("*/")
    files = {path: path.read_bytes() for path in folder.iterdir()}
    assert {path.name for path in files} == {"x.npy", "y.npy", ".lock"}

    seen, decode = [], train.decode
    monkeypatch.setattr(os, "cpu_count", lambda: 0)  # no worker processes
    monkeypatch.setattr(train, "decode",
                        lambda paths, size: seen.extend(paths) or decode(paths, size))
    assert np.array_equal(load()[0], first) and load()[-1] == source and not seen
    assert train.folder_data(f"{flowers}/", 16, str(cache))[-1] == source and not seen
    np.load(folder / "y.npy", "r+")[10:12] = 0  # never finished
    np.load(folder / "x.npy", "r+")[11] = 7
    load()
    assert len(seen) == 8 and all("aster" in path for path in seen)
    assert files == {path: path.read_bytes() for path in folder.iterdir()}
    (flowers / "iris" / "notes.txt").unlink()
    changed, *_, other = load()
    assert np.array_equal(changed, first) and other != source
    assert load(32)[0].shape == (26, 3, 32, 32) and len(list(cache.glob("*/"))) == 3
    for path in cache.glob("*/"):
        os.truncate(path / "x.npy", 1000)
    with pytest.raises(sample.Fault, match="is damaged, remove it"):
        load()


def test_what_is_no_image_is_left_out_even_eight_in_a_row(flowers, vae_folder, tmp_path):
    for i in range(8):
        (flowers / "aster" / f"-{i}.png").write_text("no image")
    vae = sample.load_vae(vae_folder)
    images, labels, *_ = train.folder_data(str(flowers), 32, str(tmp_path / "cache"), vae)
    assert len(images) == 6 and labels.tolist() == [0, 0, 1, 1, 1, 2]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no way to reserve space")
def test_a_disk_too_small_for_the_cache_is_told_before_anything_is_decoded(
        flowers, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(sample.Fault, match="x.npy, .* MB: No space left"):
        train.folder_data(str(flowers), 16, str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").rglob("*.npy"))
    monkeypatch.undo()
    assert len(train.folder_data(str(flowers), 16, str(tmp_path / "cache"))[0]) == 6


def test_a_process_that_starts_late_does_its_own_share(flowers, tmp_path, monkeypatch):
    for i in range(60):
        shutil.copy(flowers / "aster" / "0.png", flowers / "aster" / f"copy-{i:02d}.png")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(sample.Fault, match="not complete"):  # without the other's
        train.folder_data(str(flowers), 16, str(tmp_path / "cache"), None, 0, 2)
    images, *_ = train.folder_data(str(flowers), 16, str(tmp_path / "cache"), None, 1, 2)
    assert len(images) == 66


def test_too_many_files_that_are_no_images_end_every_start(flowers, tmp_path):
    for i in range(11):
        (flowers / "iris" / f"{i}.txt").write_text("no image either")
    for _ in range(2):
        with pytest.raises(sample.Fault, match="12 of 18 files are no images"):
            train.folder_data(str(flowers), 16, str(tmp_path / "cache"))


def test_the_centre_crop_is_that_of_adm():
    image = Image.fromarray(np.arange(100 * 40 * 3, dtype=np.uint32).view(np.uint8)[:12000]
                            .reshape(40, 100, 3))
    by_hand = image.resize((50, 20), Image.BOX).resize((40, 16), Image.BICUBIC)
    by_hand = by_hand.crop((12, 0, 28, 16))
    assert np.array_equal(np.asarray(train.centre_crop(image, 16)), np.asarray(by_hand))


def test_what_has_more_than_eight_bits_is_left_out(tmp_path):
    Image.fromarray(np.full((9, 9), 0x8000, np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(tmp_path / "b.tif")
    Image.fromarray(np.full((9, 9), 0x80, np.uint8)).save(tmp_path / "c.png")
    images, good = train.decode([tmp_path / name for name in ("a.png", "b.tif", "c.png")], 4)
    assert (images[2] == 0x80).all() and good.tolist() == [False, False, True]


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """A VAE like that of the paper, 25,000 random parameters large."""
    import diffusers
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, latent_channels=4)
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return str(folder)


def test_latents_are_drawn_from_the_posterior_and_normalised_per_channel(
        vae_folder, flowers, tmp_path, monkeypatch):
    import diffusers
    vae = sample.load_vae(vae_folder)
    net = diffusers.AutoencoderKL.from_pretrained(vae_folder)
    coded, labels, _, source = train.folder_data(str(flowers), 32, str(tmp_path / "cache"), vae)
    pixels, same, _, other = train.folder_data(str(flowers), 32, str(tmp_path / "pixels"))
    latents = np.stack(list(coded))
    assert latents.shape == (6, 8, 4, 4) and latents.dtype == np.float16
    assert np.array_equal(labels, same) and source != other
    images = torch.from_numpy(np.stack(list(pixels))) / 127.5 - 1
    with torch.no_grad():
        posterior = net.encode(images).latent_dist
        both = torch.cat((posterior.mean, posterior.std), 1)
        torch.testing.assert_close(torch.from_numpy(latents), both.half())

    args = types.SimpleNamespace(batch_size=6000, seed=1, t_mean=-0.4, t_std=1.0)
    x, y, _ = train.batch(coded, labels, args, 0, 1, 0)
    first = x[(y == 2)]  # one image, drawn a thousand times
    mean, std = torch.from_numpy(latents[5]).float().chunk(2)
    z = first * sample.LATENT_STD + sample.LATENT_MEAN
    assert len(first) == 1000 and (z.mean(0) - mean).abs().max() < 0.15 * std.max()
    assert (z.std(0) / std - 1).abs().max() < 0.15

    monkeypatch.setattr(imf, "sample", lambda *_, **__: first[:8])
    [drawn] = sample.generate(network(4, 4), range(8), [0], vae=vae)
    with torch.no_grad():
        expected = (net.decode(z[:8]).sample * 127.5 + 127.5).round().clamp(0, 255)
    assert np.abs(drawn.astype(float) - expected.numpy()).max() <= 1


def test_from_images_to_latents_to_a_network_to_images(
        small, vae_folder, flowers, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert call(train, "--data", flowers, "--image-size", 32, "--vae", vae_folder, "--steps", 2,
                "--batch-size", 4, "--out", out, monkeypatch=monkeypatch)[0] == 0
    net, info = sample.load(out / "last.pt")
    assert (net.image_size, net.channels, net.num_classes) == (4, 4, 3)
    assert info["vae"] == vae_folder and Image.open(out / "step-000002.png").width == 10 * 68
    for name in ("a.npz", "b/"):
        argv = [out / "last.pt", "--num", 5, "--out", f"{tmp_path}/{name}"]
        assert call(sample, *argv, monkeypatch=monkeypatch)[0] == 0
    images = np.load(tmp_path / "a.npz")["arr_0"]
    assert images.shape == (5, 32, 32, 3) and images.std() > 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b" / "000003.png")), images[3])
    for name in ("none", str(flowers), str(tmp_path / "nowhere")):
        status, err = call(sample, out / "last.pt", "--vae", name, "--out", tmp_path / "c.png",
                           monkeypatch=monkeypatch, capsys=capsys)
        assert status == 2 and err.splitlines()[-1].startswith("sample.py: ") and "--vae" in err
    pixels = checkpoint(tmp_path / "pixels.pt", network(channels=1))
    assert call(sample, pixels, "--vae", vae_folder, monkeypatch=monkeypatch)[0] == 2


def test_a_vae_of_another_shape_is_refused(tmp_path):
    import diffusers
    diffusers.AutoencoderKL(latent_channels=16, norm_num_groups=4, block_out_channels=(8,)
                            ).save_pretrained(tmp_path)
    with pytest.raises(sample.Fault, match="16 channels at 1/1, not 4 at 1/8"):
        sample.load_vae(str(tmp_path))


@pytest.mark.parametrize("depth, steps, expected", [
    (12, 1, (8, 0.4, 0.65)), (24, 1, (10.5, 0.4, 0.6)), (48, 1, (8, 0.42, 0.62)),
    (48, 2, (4, 0.36, 0.64)), (5, 1, (2, 0, 1))])
def test_released_weights_are_known_by_their_names_and_guided_as_advised(
        depth, steps, expected, tmp_path, monkeypatch):
    net = network(image_size=32, channels=4, depth=depth)
    torch.save(released(net, v_head=False), tmp_path / "iMF.pth")
    monkeypatch.setattr(sample, "load_vae", lambda name, device: name)
    args = types.SimpleNamespace(steps=[steps], vae=None, omega=None, interval=None)
    same, vae, [row] = sample.prepare(tmp_path / "iMF.pth", args, "cpu")
    assert vae == sample.VAE and same.image_size == 32
    assert (row["omega"], row["t_min"], row["t_max"], row["steps"]) == (*expected, steps)


def test_training_begins_with_released_weights_whose_v_head_is_a_copy_of_the_u_head(
        small, vae_folder, flowers, tmp_path, monkeypatch, capsys):
    net = network(image_size=32, channels=4, num_classes=3)
    torch.save(released(net, v_head=False), tmp_path / "iMF.pth")
    assert call(train, "--init", tmp_path / "iMF.pth", "--data", flowers, "--image-size", 256,
                "--vae", vae_folder, "--steps", 1, "--batch-size", 2, "--lr", 1e-12, "--out",
                tmp_path / "out", monkeypatch=monkeypatch)[0] == 0
    fresh = model.from_state(trained(tmp_path / "out")["net"])
    x, y, d = data(net)
    conditions = torch.zeros(len(x)), d.omega, d.t_min, d.t_max, y
    u, v = fresh(x, *conditions)
    torch.testing.assert_close(u, net.u(x, *conditions))
    torch.testing.assert_close(u, v)
    status, err = call(train, "--init", tmp_path / "iMF.pth", "--steps", 1, "--out",
                       tmp_path / "other", monkeypatch=monkeypatch, capsys=capsys)  # digits
    assert status == 2 and "--init" in err.splitlines()[-1]


def test_checkpointing_changes_no_gradient():
    net = network()
    found = []
    for net.checkpoint in (False, True):
        x, y, draws = data(net)
        found.append(gradients(net, imf.imf_loss(net, x, y, draws)[0]))
    assert torch.equal(*found)


def torchrun(n, script, *argv):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}",
         "--", os.path.join(HERE, script), *map(str, argv)], check=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True).stdout


def test_two_processes_train_the_same_model_and_draw_the_same_images(
        flowers, tmp_path, monkeypatch):
    argv = ["--data", flowers, "--image-size", 16, "--steps", 5, "--batch-size", 8]
    torchrun(2, "train.py", *argv, "--out", tmp_path / "two", "--cache", tmp_path / "cache2")
    call(train, *argv, "--out", tmp_path / "one", "--cache", tmp_path / "cache1",
         monkeypatch=monkeypatch)
    one, two = (torch.cat([p.flatten() for p in trained(tmp_path / name)["net"].values()])
                for name in ("one", "two"))
    assert (one - two).norm() < 1e-5 * one.norm()
    caches = [{p.name: p.read_bytes() for p in (tmp_path / f"cache{n}").glob("*/*")}
              for n in (1, 2)]
    assert caches[0] == caches[1] and sorted(caches[0]) == [".lock", "x.npy", "y.npy"]

    path = tmp_path / "one" / "last.pt"
    torchrun(2, "sample.py", path, "--num", 9, "--out", tmp_path / "two.npz")
    call(sample, path, "--num", 9, "--out", tmp_path / "one.npz", monkeypatch=monkeypatch)
    assert np.array_equal(*(np.load(tmp_path / f"{n}.npz")["arr_0"] for n in ("one", "two")))


def test_an_interrupted_folder_is_completed_and_a_complete_one_left_alone(
        tmp_path, monkeypatch, capsys):
    out = tmp_path / "folder"
    argv = [checkpoint(tmp_path / "last.pt", network(channels=1)), "--num", 6, "--out", f"{out}/"]

    def files():
        return {path.name: path.read_bytes() for path in out.iterdir()}

    with monkeypatch.context() as patch:  # interrupted at the third image
        left = iter([sample.atomic] * 2)
        patch.setattr(sample, "atomic", lambda path: next(left, sys.exit)(path))
        call(sample, *argv, monkeypatch=patch)
    [part] = tmp_path.glob("folder.*.part")
    before = {path.name: path.stat() for path in part.glob("*.png")}
    assert len(before) == 2 and not out.exists()
    assert call(sample, *argv, monkeypatch=monkeypatch)[0] == 0
    assert len(files()) == 6 and not part.exists()
    assert all((out / name).stat() == stat for name, stat in before.items())
    found = files()
    status, err = call(sample, *argv, monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and "a new folder" in err.splitlines()[-1] and files() == found


def test_training_on_a_folder(small, flowers, tmp_path, monkeypatch, capsys):
    argv = ["--data", flowers, "--steps", 2, "--batch-size", 8, "--out", tmp_path / "out"]
    assert call(train, *argv, "--image-size", 16, monkeypatch=monkeypatch, capsys=capsys)[0] == 0
    net, _ = sample.load(tmp_path / "out" / "last.pt")
    assert (net.image_size, net.channels, net.num_classes) == (16, 3, 3)
    assert sorted(os.listdir(tmp_path)) == ["flowers", "flowers-16px", "out"]
    status, err = call(train, *argv, "--image-size", 8, monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and "--image-size 16" in err.splitlines()[-1]


@pytest.mark.parametrize("argv, named", [
    (["--model", "XXL"], "XXL"), (["--tangent", "up"], "up"), (["--steps", "0"], "--steps"),
    (["--batch-size", "-3"], "--batch-size"), (["--lr", "nan"], "--lr"), (["--lr", "0"], "--lr"),
    (["--ema", "1.5"], "--ema"), (["--seed", "-1"], "--seed"), (["--warmup", "-1"], "--warmup"),
    (["--batch-size", "8", "--accum", "3"], "--accum"), (["--out", "file"], "file"),
    (["--out", "file/below"], "file"), (["--data", "nowhere"], "nowhere"),
    (["--data", "file"], "file"), (["--data", "empty"], "empty"), (["--data", "flat"], "flat"),
    (["--data", "hollow"], "hollow"), (["--data", "texts"], "a.txt"), (["--data", "half"], "text"),
    (["--data", "fine", "--image-size", "15"], "15"), (["--device", "abacus"], "abacus"),
    (["--data", "fine", "--cache", "file"], "file"), (["--out", "broken"], "broken"),
    (["--vae", "some"], "--vae"), (["--image-size", "0"], "--image-size"),
    (["--image-size", "64"], "--data"), (["--init", "nowhere"], "nowhere")])
def test_train_refuses_bad_input_in_one_line_and_changes_nothing(
        argv, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "flat", "hollow/rose", "texts/rose", "fine/rose", "half/rose",
                   "half/text", "broken"):
        os.makedirs(folder)
    for name in ("file", "texts/rose/a.txt", "half/text/a.txt", "broken/last.pt"):
        with open(name, "w") as file:
            file.write("text")
    for name in ("flat", "fine/rose", "half/rose"):
        Image.new("RGB", (40, 40)).save(f"{name}/a.png")
    before = sorted(os.walk("."))
    status, err = call(train, "--steps", 1, *argv, monkeypatch=monkeypatch, capsys=capsys)
    last = err.strip().splitlines()[-1]
    assert status == 2 and last.startswith("train.py: ") and named in err, err
    for name in ("texts-32px", "half-32px"):  # what was decoded stays
        shutil.rmtree(name, ignore_errors=True)
    assert "Traceback" not in err and sorted(os.walk(".")) == before


def test_another_setting_on_the_same_out_is_refused_by_name(small, tmp_path, monkeypatch, capsys):
    argv = ["--out", tmp_path, "--steps", 1, "--batch-size", 4]
    assert call(train, *argv, monkeypatch=monkeypatch, capsys=capsys)[0] == 0
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    for other in (["--lr", 1], ["--seed", 1], ["--tangent", "boundary"], ["--ema", 0.5],
                  ["--warmup", 7], ["--cooldown", 0], ["--model", "B/2"], ["--batch-size", 5],
                  ["--steps", 2]):
        status, err = call(train, *argv, *other, monkeypatch=monkeypatch, capsys=capsys)
        assert status == 2 and err.count("\n") == 1 and other[0] in err
    assert before == {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}


# ---- The scores ------------------------------------------------------------------------------


def convolutions():
    """(name, output channels, input channels, kernel) of the Inception's 94 convolutions.

    A chain reads "channels:kernel"; a and b are side by side, both behind the one before.
    """
    yield from (("Conv2d_1a_3x3", 32, 3, (3, 3)), ("Conv2d_2a_3x3", 32, 32, (3, 3)),
                ("Conv2d_2b_3x3", 64, 32, (3, 3)), ("Conv2d_3b_1x1", 80, 64, (1, 1)),
                ("Conv2d_4a_3x3", 192, 80, (3, 3)))
    kernels = dict(zip("135-|=!", ((1, 1), (3, 3), (5, 5), (1, 3), (3, 1), (1, 7), (7, 1))))
    a = "1x1 64:1, 5x5 48:1 64:5, 3x3dbl 64:1 96:3 96:3, _pool {n}:1"
    c = "1x1 192:1, 7x7 {n}:1 {n}:= 192:!, 7x7dbl {n}:1 {n}:! {n}:= {n}:! 192:=, _pool 192:1"
    d = "3x3 192:1 320:3, 7x7x3 192:1 192:= 192:! 192:3"
    e = "1x1 320:1, 3x3 384:1 384:-a 384:|b, 3x3dbl 448:1 384:3 384:-a 384:|b, _pool 192:1"
    for block, channels, text, n in (
            ("5b", 192, a, 32), ("5c", 256, a, 64), ("5d", 288, a, 64),
            ("6a", 288, "3x3 384:3, 3x3dbl 64:1 96:3 96:3", 0), ("6b", 768, c, 128),
            ("6c", 768, c, 160), ("6d", 768, c, 160), ("6e", 768, c, 192), ("7a", 768, d, 0),
            ("7b", 1280, e, 0), ("7c", 2048, e, 0)):
        for branch in text.format(n=n).split(", "):
            name, *chain = branch.split()
            width = channels
            for i, (out, kernel) in enumerate((conv.split(":") for conv in chain), 1):
                number = f"_{i - (kernel[1:] == 'b')}{kernel[1:]}" if len(chain) > 1 else ""
                yield f"Mixed_{block}.branch{name}{number}", int(out), width, kernels[kernel[0]]
                width = width if kernel[1:] == "a" else int(out)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights under the names of the published file, lively enough to tell images apart."""
    state, normal = {}, np.random.default_rng(0).standard_normal
    for name, out, channels, kernel in convolutions():
        weight = normal((out, channels, *kernel), np.float32)
        state[f"{name}.conv.weight"] = weight * (2 / weight[0].size) ** 0.5
        for end, mean in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            state[f"{name}.bn.{end}"] = normal(out, np.float32) * 0.1 + mean
    state["fc.weight"] = normal((1008, 2048), np.float32) * 0.2
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({name: torch.from_numpy(value) for name, value in state.items()}, path)
    return str(path)


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
    rng = np.random.default_rng(1)
    x, y = gaussian(rng, n), gaussian(rng, 300, scale=1.3)
    (mu1, sigma1), (mu2, sigma2) = fid.moments(x), fid.moments(y)
    np.testing.assert_allclose(sigma1, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)
    product = np.linalg.eigvals(sigma1.numpy() @ sigma2.numpy()).astype(complex)
    expected = ((mu1 - mu2) ** 2).sum() + (sigma1 + sigma2).trace() - 2 * (product**0.5).real.sum()
    assert abs(fid.frechet_distance(mu1, sigma1, mu2, sigma2) - expected) < 1e-5 * expected
    assert abs(fid.frechet_distance(mu2, sigma2, mu1, sigma1) - expected) < 1e-5 * expected
    assert 0 <= fid.frechet_distance(mu1, sigma1, mu1, sigma1) < 1e-8 * sigma1.trace()
    q = np.linalg.qr(rng.standard_normal((48, 48)))[0]
    a, b = rng.uniform(0, 3, (2, 48))  # these covariances commute: a closed form
    found = fid.frechet_distance(a, q * a @ q.T, b, q * b @ q.T)
    assert found == pytest.approx(((a - b) ** 2 + (a**0.5 - b**0.5) ** 2).sum(), rel=1e-9)


def test_inception_score_is_its_formula_in_the_order_given():
    logits = torch.from_numpy(np.random.default_rng(2).standard_normal((100, 7)) * 3)
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    expected = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in np.split(p, 5)]
    assert fid.inception_score(logits, 5) == pytest.approx((np.mean(expected), np.std(expected)))
    sure = torch.eye(10).repeat(10, 1) * 1000  # every class, and no doubt about any
    assert fid.inception_score(sure) == pytest.approx((10, 0))


def test_what_is_not_a_number_is_no_score():
    mu, sigma = np.zeros(3), np.eye(3)
    assert np.isnan(fid.frechet_distance(mu * np.nan, sigma, mu, sigma))
    with pytest.raises(sample.Fault, match="not finite"):
        fid.extract(lambda x: (x, x[:, :1008]), [torch.full((1, 2048), torch.nan)], 1)


def test_precision_and_recall_are_their_definition():
    rng = np.random.default_rng(3)
    x, y = gaussian(rng, 1100, 6).float(), gaussian(rng, 1200, 6).float() + 1

    def within(a, b):  # some b has it no farther than b's third neighbour
        reach = np.sort(np.linalg.norm(b[:, None] - b[None], axis=2), 1)[:, 3]
        return (np.linalg.norm(a[:, None] - b[None], axis=2) <= reach).any(1).mean()

    a, b = x.double().numpy()[:300], y.double().numpy()[:200]
    assert fid.precision_recall(x[:300], y[:200]) == pytest.approx((within(a, b), within(b, a)))
    assert fid.precision_recall(x, x) == (1, 1) and fid.precision_recall(x, x + 1000) == (0, 0)
    assert fid.precision_recall(x, torch.cat((x, y + 1000)))[0] == 1
    line = torch.arange(4.0)[:, None]  # the third neighbour of 0 is 3, no farther than -3 is
    assert fid.precision_recall(0 * line - 3, line)[0] == 1


def figures(text):
    """The numbers of each line, by name."""
    lines = [line.removeprefix("best: ").split() for line in text.splitlines()]
    return [dict(zip(line[::2], map(float, line[1::2]))) for line in lines]


def test_a_folder_an_npz_statistics_and_two_processes_give_the_same_figure(
        weights, inception, tmp_path, monkeypatch, capsys):
    def ask(*argv):
        assert call(fid, *argv, monkeypatch=monkeypatch)[0] == 0
        out, err = capsys.readouterr()
        return figures(out)[0], err

    a, b = tmp_path / "a", tmp_path / "b.npz"
    (a / "deep/er").mkdir(parents=True)
    for i, image in enumerate(pictures(6, 24)):
        Image.fromarray(image).save(a / ("deep/er" if i < 3 else "") / f"{i}.png")
    np.savez_compressed(tmp_path / "a.npz", arr_0=pictures(6, 24))
    np.savez(b, arr_0=pictures(5, 20, seed=1), arr_1=np.arange(5))

    monkeypatch.setattr(fid, "Inception", lambda path: inception)
    folder, err = ask(a, b, "--save", tmp_path / "new/a.npz")
    assert list(folder) == ["fid", "is", "is_std", "precision", "recall"]
    assert err.count("warning") == 2 and "singular" in err and "50,000" in err
    assert ask(tmp_path / "a.npz", b)[0] == pytest.approx(folder, rel=1e-6)
    two = figures(torchrun(2, "fid.py", a, b, "--inception", weights))
    assert two == [pytest.approx(folder, rel=1e-6)]

    mu, sigma = fid.moments(inception(pictures(5, 20, seed=1).transpose(0, 3, 1, 2))[0])
    np.savez(tmp_path / "ref.npz", ref_mu=mu, ref_sigma=sigma)  # the authors' names
    monkeypatch.setattr(fid, "Inception", None)  # two statistics need no network
    known, err = ask(tmp_path / "new/a.npz", tmp_path / "ref.npz")
    assert known == {"fid": pytest.approx(folder["fid"], rel=1e-6)} and err.count("warning") == 1


def test_a_checkpoint_is_sampled_as_it_goes_and_the_best_guidance_named(
        tmp_path, monkeypatch, capsys):
    net, real = network(channels=1), pictures(9, 20)
    np.savez(tmp_path / "b.npz", arr_0=real)
    monkeypatch.setattr(fid, "Inception", lambda path: Thumbnail())
    call(fid, checkpoint(tmp_path / "last.pt", net), tmp_path / "b.npz", "--num", 35, "--seed", 2,
         "--omega", 1, 3, "--interval", 0, 1, "--interval", 0.5, 0.6, monkeypatch=monkeypatch)
    *rows, best = figures(capsys.readouterr().out)
    settings = [(row["omega"], row["t_min"], row["t_max"]) for row in rows]
    assert settings == [(1, 0, 1), (1, 0.5, 0.6), (3, 0, 1), (3, 0.5, 0.6)]
    drawn = sample.generate(net.eval(), range(35), range(5), 2, omega=3.0, t_min=0.0, t_max=1.0)
    sets = np.concatenate(list(drawn)), real.transpose(0, 3, 1, 2)
    (mu1, sigma1), (mu2, sigma2) = (fid.moments(Thumbnail()(images)[0]) for images in sets)
    expected = fid.frechet_distance(mu1, sigma1, mu2, sigma2)
    assert rows[2]["fid"] == pytest.approx(expected, rel=1e-5)
    assert best == min(rows, key=lambda row: row["fid"])


def test_training_logs_the_fid_of_its_averaged_weights(small, tmp_path, monkeypatch, capsys):
    real = pictures(9, 20).transpose(0, 3, 1, 2)
    mu, sigma = fid.moments(Thumbnail()(real)[0])
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma)
    monkeypatch.setattr(fid, "Inception", lambda path: Thumbnail())
    argv = ["--steps", 4, "--batch-size", 4, "--log-every", 3, "--out", tmp_path / "out",
            "--fid-every", 2, "--fid-num", 20, "--fid-ref"]
    assert call(train, *argv, tmp_path / "ref.npz", monkeypatch=monkeypatch)[0] == 0
    log = [json.loads(line) for line in open(tmp_path / "out" / "log.jsonl")]
    assert [line["step"] for line in log] == [2, 3, 4]
    assert ["fid" in line for line in log] == [True, False, True]
    assert ["loss_u" in line for line in log] == [False, True, True]
    net, _ = sample.load(tmp_path / "out" / "last.pt")
    drawn = np.concatenate(list(sample.generate(net, range(20), range(10), omega=2.0)))
    expected = fid.frechet_distance(*fid.moments(Thumbnail()(drawn)[0]), mu, sigma)
    assert log[-1]["fid"] == pytest.approx(expected, rel=1e-5)
    np.savez(tmp_path / "images.npz", arr_0=pictures(3, 20))
    status, err = call(train, *argv, tmp_path / "images.npz", monkeypatch=monkeypatch,
                       capsys=capsys)
    assert status == 2 and "images.npz: no mu, sigma" in err.splitlines()[-1]


def test_images_of_several_sizes_are_one_set(tmp_path):
    for size in (20, 31, 50):
        Image.fromarray(pictures(1, size)[0]).save(tmp_path / f"{size}.png")
    (batch,) = fid.batches(sample.files(tmp_path), "cpu")
    for found, size in zip(batch, (20, 31, 50)):
        image = torch.from_numpy(pictures(1, size)).permute(0, 3, 1, 2)
        assert torch.equal(found, fid.resize(image)[0])


def test_images_are_never_all_in_memory(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((3000, 64, 64, 3), np.uint8))  # 37 MB
    tracemalloc.start()
    (_, n), *shapes = (i if isinstance(i, tuple) else i.shape
                       for i in fid.stored(tmp_path / "a.npz"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 3000 and shapes == [(64, 64, 3)] * n and peak < 4e6


def bad_inputs(path, weights):
    """Command lines and what their one line must name, all below the folder `path`."""
    mu, sigma, images = np.zeros(2048), np.eye(2048), pictures(3, 16)
    for name in ("mixed", "damaged", "single"):
        (path / name).mkdir()
        Image.fromarray(images[0]).save(path / name / "0.png")
    (path / "empty/below").mkdir(parents=True)
    (path / "mixed/notes.txt").write_text("not an image")
    (path / "damaged/1.png").write_bytes((path / "damaged/0.png").read_bytes()[:150])
    for name in ("text.npz", "text.pt"):
        (path / name).write_text("text")
    arrays = {
        "good": dict(arr_0=images), "keys": dict(x=images), "float": dict(arr_0=images / 255),
        "flat": dict(arr_0=images[0]), "two": dict(arr_0=images[..., :2]),
        "order": dict(arr_0=np.asfortranarray(images)), "half": dict(mu=mu),
        "one": dict(arr_0=images[:1]), "none": dict(arr_0=images[:0]),
        "pickled": dict(arr_0=np.array([Hostile()], object)), "thin": dict(arr_0=images[:, :0]),
        "objects": dict(mu=np.array([Hostile()], object), sigma=sigma),
        "nan": dict(mu=mu, sigma=sigma * np.nan), "text": dict(mu=mu.astype(str), sigma=sigma),
        "small": dict(mu=mu[:64], sigma=sigma[:64, :64])}
    for name, content in arrays.items():
        np.savez_compressed(path / f"{name}_.npz", **content)
    whole = (path / "good_.npz").read_bytes()
    (path / "cut.npz").write_bytes(whole[:len(whole) // 2])
    (path / "flipped.npz").write_bytes(whole[:300] + bytes([whole[300] ^ 255]) + whole[301:])
    state = torch.load(weights)
    for name, content in (("other", {"fc.weight": torch.ones(2)}), ("list", [1]),
                          ("hostile", {"fc.weight": Hostile()}),
                          ("nan", {**state, "fc.weight": state["fc.weight"] * np.nan})):
        torch.save(content, path / f"{name}.pth")
        yield ["good_.npz", "--inception", f"{name}.pth"], f"{name}.pth"
    for name in ("missing", "empty", "single", "text.pt", "text.npz", "missing.npz", "cut.npz",
                 "flipped.npz", *(f"{name}_.npz" for name in arrays if name != "good"),
                 "damaged/1.png", "mixed/notes.txt"):
        yield [name.split("/")[0], "good_.npz"], name
        yield ["good_.npz", name.split("/")[0]], name
    for argv in (["--omega", "0"], ["--num", "1"], ["--steps", "0"], ["--device", "abacus"]):
        yield ["good_.npz", *argv], argv[0]
    yield ["good_.npz", "--save", "text.pt/x.npz"], "text.pt"
    yield ["good_.npz", "--inception", ""], "--inception FILE"  # nor a network


def test_bad_input_to_the_scores_is_refused_in_one_line(weights, tmp_path, monkeypatch, capsys):
    def unreachable(*_, **__):
        raise OSError("no route to host")

    load = fid.Inception
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr(fid, "Inception", lambda path: Thumbnail() if path is None else load(path))
    monkeypatch.setenv("IMF_HOSTILE", str(tmp_path / "owned"))
    monkeypatch.chdir(tmp_path)
    cases = list(bad_inputs(tmp_path, weights))
    before = sorted(os.listdir())
    for argv, named in cases:
        status, err = call(fid, *argv, monkeypatch=monkeypatch, capsys=capsys)
        lines = [line for line in err.split("\n") if line.startswith("fid.py: ")]
        assert status == 2 and len(lines) == 1 and named in lines[0], (argv, err)
        assert "Traceback" not in err and sorted(os.listdir()) == before, (argv, err)


# ---- The benchmark ---------------------------------------------------------------------------


KINDS = "literal", "ours", "ours --checkpoint", "ours --compile"  # and "ours bf16 --compile", ...
PEAK = 989e12  # dense bf16 operations a second of an H100 or H200, by its datasheet


def one_step(kind, name, batch):
    """Runs training steps and draws images in this process: the figures of both, by name."""
    device, *_ = sample.join()
    cuda = device.type == "cuda"

    def peak():
        if cuda:
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def timed(run, into):
        def call(*args):
            torch.accelerator.synchronize() if cuda else None
            start = time.perf_counter()
            out = run(*args)
            torch.accelerator.synchronize() if cuda else None
            into.append(time.perf_counter() - start)
            return out
        return call

    torch.manual_seed(0)
    with device:
        net = model.DiT(32, 4, 1000, **model.MODELS[name])
    for p in net.parameters():
        torch.nn.init.normal_(p, p.mean().item() > 0.5, 0.02)
        p.grad = torch.zeros_like(p)
    batches = [[x.to(device), y.to(device), draws]
               for x, y, draws in (data(net, batch, seed) for seed in range(5))]
    if kind == "literal":
        model.Linear.forward = torch.nn.Linear.forward
        for args in batches:
            args[2] = imf.Draws(*(d.to(device) for d in args[2]))
        if cuda:  # the written attention: PyTorch's has no second derivative in bf16
            torch.nn.functional.scaled_dot_product_attention = (
                lambda q, k, v: (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
    net.checkpoint = "--checkpoint" in kind
    if "--compile" in kind:
        net.compile()
    loss = literal_loss if kind == "literal" else lambda *args: imf.imf_loss(*args)[0]

    def step(k):
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda or "bf16" in kind):
            result = loss(net, *batches[k % 5])
        backward(result)

    seconds, stages, found = [], {"backward": []}, {}
    backward = timed(torch.Tensor.backward, stages["backward"])
    with sdpa_kernel(SDPBackend.MATH) if kind == "literal" else contextlib.nullcontext():
        before = peak()
        for k in range(17 if cuda else 4):  # sizes change in the second
            timed(step, seconds)(k)
        found["extra GiB"] = peak() - before
        found["first step, s"], found["seconds"] = seconds[0], np.median(seconds[2:])
    if "--compile" not in kind:
        with FlopCounterMode(display=False) as count, (
                contextlib.nullcontext() if cuda else sdpa_kernel(SDPBackend.MATH)):
            step(0)
        found["operations"] = count.get_total_flops()
    if kind == "literal":
        return found

    for stage, branch in (("training pass", "forward"), ("guidance", "v"), ("JVP", "u")):
        stages[stage] = []
        setattr(net, branch, timed(getattr(net, branch), stages[stage]))
    for k in range(10 if cuda else 4):
        step(k)
    for stage, times in stages.items():  # guidance is two calls
        half = times[len(times) // 2:]
        found[stage + ", s"] = sum(half) / (5 if cuda else 2) if stage != "backward" else (
            np.median(half))
    for branch in ("forward", "v", "u"):
        delattr(net, branch)
    ema, times = copy.deepcopy(net), []
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=True)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9999)

    def update():
        optimizer.step()
        average(list(ema.parameters()), list(net.parameters()), None)

    for _ in range(4):
        timed(update, times)()
    found["update, s"] = min(times)
    optimizer.zero_grad()
    times, y = [], batches[0][1][:1]
    noise = torch.randn(64 if cuda else 8, 4, 32, 32, device=device)
    for _ in range(5):  # in float32, on CUDA in TF32; without a VAE
        timed(imf.sample, times)(net, noise, y.expand(len(noise)), 1, 2.0)
    found["drawn a second"] = len(noise) / min(times)
    return found


def benchmark(name="B/2", batch="4", runs="3", *kinds):
    """Prints our training step beside the literal port's, each run in a process of its own."""
    results, runs = {kind: [] for kind in kinds or KINDS}, int(runs)
    for _ in range(runs):
        for kind, found in results.items():
            argv = [sys.executable, __file__, kind, name, batch]
            found.append(json.loads(subprocess.check_output(argv)))

    def ratios(what, kind, other):
        found = sorted(a[what] / b[what] for a, b in zip(results[kind], results[other]))
        return f"{found[runs // 2]:8.3f} ({found[0]:.3f} to {found[-1]:.3f})"

    first = next(iter(results))
    print(f"{name}, batch {batch}, on {sample.join()[0]}, {torch.get_num_threads()} threads; "
          f"median of {runs} runs, and over {first} of the same run (range)")
    for what in dict.fromkeys(key for found in results.values() for key in found[0]):
        for kind, found in results.items():
            if what in found[0]:
                compared = ratios(what, kind, first) if what in results[first][0] else ""
                median = sorted(r[what] for r in found)[runs // 2]
                print(f"{what:18}{kind:20}{median:10.4g}{compared}")
    for eager in results:
        if (compiled := f"{eager} --compile") in results:
            print(f"{compiled} over {eager}", ratios("seconds", compiled, eager))
    eager = results.get("ours")
    if eager and torch.cuda.is_available():
        for kind in ("ours", "ours --compile", "ours --checkpoint"):
            for found in results.get(kind, [])[:1]:
                whole = found["seconds"] + found["update, s"]
                print(f"{kind:20}{int(batch) / whole:8.1f} images/s, "
                      f"{eager[0]['operations'] / whole / PEAK:.1%} of the peak in bf16")


def precision(name="B/2", batch="16", steps="300"):
    """Prints how far bf16 is from float32, with lively random weights and after a training."""
    device, *_ = sample.join()
    torch.set_float32_matmul_precision("highest")
    images, labels = train.digits(5000)
    pixels = torch.from_numpy(images).to(device) / 127.5 - 1
    pixels = torch.nn.functional.interpolate(pixels, 32).expand(-1, 4, -1, -1)
    labels = torch.from_numpy(labels).to(device)
    torch.manual_seed(0)
    net = model.DiT(32, 4, 10, **model.MODELS[name]).to(device)

    def loss(k, n=int(batch)):
        generator = torch.Generator().manual_seed(k)
        i = torch.randint(len(pixels), (n,), generator=generator)
        return imf.imf_loss(net, pixels[i], labels[i], imf.draw(pixels[i], generator))

    def measure(k, pass_, jvp):  # each in "bf16" or "float32"
        def u(*args, u=net.u):
            with torch.autocast(device.type, torch.bfloat16, enabled=jvp == "bf16"):
                out = u(*args)
            seen.append(unpack_dual(out).tangent.float())
            return out

        seen, net.u = [], u
        with torch.autocast(device.type, torch.bfloat16, enabled=pass_ == "bf16"):
            value, logs = loss(k)
        del net.u
        return seen[0], logs["loss_u"], gradients(net, value)

    def table(title):
        print(title, f"{name}, batch {batch}, {device}; relative to float32, median of 5 batches")
        exact = [measure(k, "float32", "float32") for k in range(5)]
        for pass_, jvp in (("bf16", "bf16"), ("bf16", "float32"), ("float32", "bf16")):
            errors = np.median([[((a - b).norm() / b.norm()).item() for a, b in zip(
                measure(k, pass_, jvp), exact[k])] for k in range(5)], 0)
            print(f"  {pass_} with a {jvp} JVP: " + ", ".join(
                f"{what} {error:.2e}" for what, error in zip(
                    ("du/dt", "loss_u", "gradient"), errors)), flush=True)
        other = ((exact[0][2] - exact[1][2]).norm() / exact[1][2].norm()).item()
        print(f"  gradient of another batch: {other:.2e}")

    start = copy.deepcopy(net.state_dict())
    for block in (*net.shared_blocks, *net.u_heads, *net.v_heads):
        for scale in (block.attn_scale, block.mlp_scale):
            torch.nn.init.normal_(scale, 0.5, 0.25)
    for layer in (net.u_final_layer, net.v_final_layer):
        torch.nn.init.normal_(layer.linear.weight, std=layer.linear.in_features ** -0.5)
    table("random weights,")
    net.load_state_dict(start)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, betas=(0.9, 0.95), weight_decay=0)
    for k in range(int(steps)):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value, logs = loss(1000 + k, 128 if device.type == "cuda" else int(batch))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    print("loss_u", logs["loss_u"].item(), "loss_v", logs["loss_v"].item())
    table(f"after {steps} steps,")


def judge(path="out/last.pt", omega=2.0, steps=1, n=500):
    """Prints how many of n drawn digits look most like a real one of their class, and more."""
    net, _ = sample.load(path)
    drawn = np.concatenate(list(sample.generate(
        net, range(n), range(10), seed=1, omega=float(omega), steps=int(steps))))[:, :1]
    asked, (real, labels) = np.arange(n) % 10, train.digits(20_000, seed=99)

    def normalised(images):
        flat = images.reshape(len(images), -1).astype(np.float32)
        flat -= flat.mean(1, keepdims=True)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    likeness = normalised(drawn) @ normalised(real).T
    among = normalised(drawn) @ normalised(drawn).T - 2 * np.eye(n)
    right = (labels[likeness.argmax(1)] == asked).mean()
    print(f"nearest real digit of the class asked for: {right:.1%} of {n}; "
          f"mean likeness {likeness.max(1).mean():.3f}, the two most alike {among.max():.3f}; "
          f"white pixels {(drawn >= 250).mean():.1%} (real: {(real >= 250).mean():.1%})")

    def features(images):  # place (2), size, slant, ink, of what is brighter than dark grey
        ink = np.where(images[:, 0] < 64, 1e-9, images[:, 0])
        row, column = np.indices(ink.shape[1:]) + 0.5
        mean = lambda f: (ink * f).sum((1, 2), keepdims=True) / ink.sum((1, 2), keepdims=True)
        dy, dx = row - mean(row), column - mean(column)
        found = mean(row), mean(column), mean(dy**2 + dx**2) ** 0.5, mean(dy * dx) / mean(dy**2)
        return np.stack([*(f[:, 0, 0] for f in found), ink.mean((1, 2))], 1)

    spread = [np.mean([features(images[y == c]).std(0) for c in range(10)], 0)
              for images, y in ((drawn, asked), (real, labels))]
    names = "row", "column", "size", "slant", "ink"
    print("spread within a class, drawn / real:",
          ", ".join(f"{k} {r:.2f}" for k, r in zip(names, spread[0] / spread[1])))


if __name__ == "__main__":
    command, *rest = sys.argv[1:] or [""]
    if command.startswith(("literal", "ours")):
        print(json.dumps(one_step(command, rest[0], int(rest[1]))))
    elif command == "judge":
        judge(*rest)
    elif command == "bench":
        benchmark(*rest)
    elif command == "precision":
        precision(*rest)
    else:
        print(__doc__)
