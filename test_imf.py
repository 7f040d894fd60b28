"""What improved MeanFlow is and what this code promises, in the order in which one learns it.

    pytest -q test_imf.py"""

import hashlib, json, os, pickle, re, shutil, signal, subprocess, sys, time, types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import fid, imf, model, sample, train

HERE = Path(__file__).resolve().parent
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = dict(patch_size=2, hidden_size=32, depth=3, num_heads=2, head_depth=2)
torch.set_num_threads(1)  # the networks here are small, and sums have one order


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
    for normal, mean in ((torch.cat((d.t, d.r))[matching.logical_not().repeat(2)].logit(), -0.4),
                         (d.noise, 0)):
        assert abs(normal.mean() - mean) < 0.02 and abs(normal.std() - 1) < 0.02
    assert (d.t_min[matching] == 0).all() and (d.t_max[matching] == 1).all()
    assert abs(d.drop.float().mean() - 0.1) < 0.005 and not d.drop[~matching].any()
    # omega has density omega^-beta, so its logarithm, itself or its reciprocal is uniform
    for uniform, low, high in ((d.omega.log(), 0, np.log(8)), (draw(beta=0.0).omega, 1, 8),
                               (1 / draw(beta=2.0).omega, 1 / 8, 1),
                               (d.t_min[~matching], 0, 0.5), (d.t_max[~matching], 0.5, 1)):
        position = (uniform - low) / (high - low)
        assert position.min() > -1e-6 and position.max() < 1 + 1e-6
        assert abs(position.mean() - 0.5) < 0.01 and abs(position.var() - 1 / 12) < 2e-3


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
        target = e - x if net.predict == "u" else (z - x) / col(t.clamp(min=0.05))
        v_g = target + col(1 - 1 / inside) * (v_c - v_u)
    y = torch.where(drop, null, y)
    v_g = torch.where(col(drop), target, v_g)
    dz = {"v-head": v_c, "boundary": u_at_r_equal_t, "conditional": v_g}[tangent]
    u, du_dt, v = torch.func.jvp(
        lambda z, t, r: net(z, t, t - r, omega, t_min, t_max, y), (z, t, r), (dz, one, zero),
        has_aux=True)
    V = u + col(t - r) * du_dt.detach()
    s_u, s_v = ((p - v_g).square().sum((1, 2, 3)) for p in (V, v))
    return (s_u / (s_u + norm_eps).detach() + s_v / (s_v + norm_eps).detach()).mean()


@pytest.mark.parametrize("tangent", imf.TANGENTS)
@pytest.mark.parametrize("n, norm_eps, predict", [
    (1, 0.01, "u"), (2, 0.01, "u"), (7, 0.01, "u"), (16, 1e3, "u"), (16, 0.01, "x")])
def test_the_loss_and_every_gradient_equal_the_literal_port(tangent, n, norm_eps, predict):
    """What we leave out counts for nothing, whether velocities or images are predicted."""
    net = network(predict=predict)
    x, y, draws = data(net, n)
    loss, logs = imf.imf_loss(net, x, y, draws, tangent, norm_eps)
    ours = gradients(net, loss)
    with sdpa_kernel(SDPBackend.MATH):
        expected = literal_loss(net, x, y, draws, tangent, norm_eps)
        theirs = gradients(net, expected)
    assert_close(loss, expected, rtol=1e-6, atol=0)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert (abs(loss - 2) < 0.1) == (norm_eps == 0.01)
    assert logs["loss_u"] > 0.1 and logs["loss_v"] > 0.1


def wave(*shape, phase=0.0):
    """Numbers between -1 and 1 by a formula, the same on every machine."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.7 * index**2 + phase).float().view(shape)


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
    close(u[2, 1, 3, :4], [0.0164385, -0.7174770, -1.3773320, -1.5020025])
    close(v[1, 0, 5, 2:6], [-0.7827917, -0.7860061, 1.5450122, -1.1002761])
    net.predict = "x"  # the same output taken for an image; a small t must not amplify errors
    for t in (0.01, 0.05, 0.3):
        u_x = net.u(x, torch.full((4,), t), *conditions(y, draws)[1:])
        assert_close(u_x, (x - u) / max(t, 0.05))
    net.predict = "u"
    found = imf.sample(net, e, y, 2, omega=3.0, t_min=0.2, t_max=0.7)
    close(found[3, 0, 4, :4], [-2.9563589, -1.4840200, -1.3704481, -1.1334302])
    for tangent, loss_u, loss, norm in (("v-head", 3.2621970, 1.5055785, 1.9280184),
                                        ("boundary", 2.9611771, 1.4969738, 2.0563388),
                                        ("conditional", 2.0309792, 1.4468141, 2.0253770)):
        value, logs = imf.imf_loss(net, x, y, draws, tangent, norm_eps=100.0)
        close(torch.stack((logs["loss_u"], logs["loss_v"])), [loss_u, 2.0851574])
        close(torch.stack((value.detach(), gradients(net, value).norm())), [loss, norm])


@pytest.mark.parametrize("predict", ["u", "x"])
@pytest.mark.parametrize("seed", range(4))
def test_jvp_matches_finite_differences(seed, predict):
    """du/dt is how fast u changes when z moves along dz, and t and h = t - r by 1."""
    net = network(predict=predict)
    z, y, d = data(net, seed=seed)
    dz, t = torch.randn_like(z), d.t.clamp(0.1)  # t = 0.05 is a kink
    du_dt = imf.total_derivative(net, torch.arange(8), dz, z, t, d.r, *d[3:6], y)

    def moved(s):
        return net.u(z + s * dz, t + s, t - d.r + s, *d[3:6], y)

    eps = 2e-3  # in float32; of fourth order, to stay far below the tolerance
    near, far = moved(eps) - moved(-eps), moved(2 * eps) - moved(-2 * eps)
    difference = (8 * near - far) / (12 * eps)
    assert (du_dt - difference).norm() < 1e-3 * difference.norm()


@pytest.mark.parametrize("name, to_sample, to_train", [
    ("B/2", 88.9, 145.6), ("M/2", 173.9, 230.6), ("L/2", 409.1, 509.8), ("XL/2", 610.4, 711.1)])
def test_the_networks_have_as_many_million_parameters_as_the_paper_says(name, to_sample, to_train):
    """Depth, widths and heads are the paper's."""
    with torch.device("meta"):
        net = model.DiT(32, 4, 1000, **model.MODELS[name])
    every, v_head = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (net, net.v_heads))
    assert (round(every - v_head, 1), round(every, 1)) == (to_sample, to_train)


def test_initialisation():
    """Every block begins as the identity and u, v as zero; weights have the release's scales."""
    torch.manual_seed(0)
    net = model.DiT(16, 3, 10, 4, 384, 2, 6, 1)
    block, last = net.u_heads[0], net.v_final_layer.linear
    assert not any(p.any() for p in (block.attn_scale, block.mlp_scale, *last.parameters()))
    for linear in (block.attn.qkv_proj, block.attn.out_proj, block.mlp.w13, block.mlp.w2):
        assert abs(linear.weight.std() * linear.in_features**0.5 - 0.32) < 0.01
    assert abs(net.h_embedder.mlp[0].weight.std() - 1 / 16) < 2e-3
    assert abs(net.y_embedder.weight.std() - 384**-0.5) < 5e-3
    bound = (6 / (4 * 4 * 3 + 384)) ** 0.5  # Xavier-uniform
    assert 0.99 * bound < net.x_embedder.weight.abs().max() <= bound


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


def test_released_weights_load_by_name_and_are_guided_as_the_authors_advise(tmp_path):
    """The authors' files need no flag, and give what these weights give."""
    net = network(32, 4)
    x, y, d = data(net, 2)
    u, v = net(x, *conditions(y, d))
    assert torch.equal(net.u(x, *conditions(y, d)), u)
    assert torch.equal(net.v(x, *conditions(y, d)), v)
    for v_head in (True, False):
        state = released(net, v_head)
        torch.save(dict(reversed(state.items())), tmp_path / "iMF.pth")
        same, info = sample.load(tmp_path / "iMF.pth")
        assert info["vae"] == "stabilityai/sd-vae-ft-mse" and same.image_size == 32
        assert torch.equal(same.u(x, *conditions(y, d)), u)
        assert not v_head or torch.equal(same.v(x, *conditions(y, d)), v)
    with pytest.raises(ValueError, match="no v-head"):
        same.v(x, *conditions(y, d))
    state.pop("net.shared_blocks.0.attn.k_proj._flax_linear.weight")
    with pytest.raises(KeyError, match="k_proj"):
        model.from_official(state)
    for depth, steps, expected in ((12, 1, (8, 0.4, 0.65)), (24, 1, (10.5, 0.4, 0.6)),
                                   (32, 2, (10.5, 0.4, 0.6)), (48, 1, (8, 0.42, 0.62)),
                                   (48, 2, (4, 0.36, 0.64)), (5, 1, (3, 0, 1))):
        assert (*sample.recommended(network(depth=depth), "vae", steps).values(),) == expected


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
    ours = arithmetic(lambda: imf.imf_loss(net, x, y, draws)[0].backward())
    monkeypatch.setattr(model.Linear, "forward", torch.nn.Linear.forward)  # as a port has it
    draws = [values.to("meta") for values in draws]
    assert ours < 0.56 * arithmetic(lambda: literal_loss(net, x, y, draws).backward())


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no compiler")
def test_a_compiled_step_equals_the_eager_one_and_is_compiled_once():
    """Compiled code has silently dropped tangents before; and one graph serves all batches, within
    DistributedDataParallel too, which must not split it."""
    net, store = network(), torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel = DistributedDataParallel(net)

    def steps():
        for seed in range(4):  # the guided samples are never as many as the step before
            loss, logs = imf.imf_loss(parallel, *data(net, 10, seed))
            yield loss.detach(), logs["loss_u"], gradients(net, loss)

    eager = list(steps())
    net.grad_checkpoint = True
    assert all(torch.equal(again[2], once[2]) for again, once in zip(steps(), eager))
    net.grad_checkpoint = False
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    net.compile(fullgraph=True)
    for ours, expected in zip(steps(), eager):
        assert all((a - b).norm() < 1e-5 * b.norm() for a, b in zip(ours, expected))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # training pass, v, JVP
    torch.distributed.destroy_process_group()


# ---- Samples and data ----


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
        words = (program.__name__ + ".py: ", *map(str, refused)) if refused else ()
        assert all(word in err.strip().split("\n")[-1] for word in words), (argv, err)
        return out
    return run


@pytest.fixture
def small(monkeypatch):
    """`--model tiny` made smaller still, and fewer digits."""
    monkeypatch.setitem(model.MODELS, "tiny", SMALL)
    monkeypatch.setattr(train, "digits", lambda n, digits=train.digits: digits(100))


def test_an_image_depends_on_its_own_seed_alone():
    """Image i is the same however many are sampled, in whatever order, beside whichever others."""
    net = network(channels=1)

    def images(numbers, seed=0):
        return np.concatenate(list(sample.generate(net, numbers, [0], seed)))

    whole = images(range(20))
    assert len(np.unique(np.concatenate((whole, images(range(20), 1))), axis=0)) == 40
    for some in (range(3), range(1, 20, 2), [7, 4], range(19, -1, -1)):
        assert np.array_equal(images(some), whole[list(some)])
    net.u = lambda z, *_: z - torch.tensor([-1.5, -1, 0, 1]).repeat(2)  # black is -1, white 1
    assert images([0])[0, 0, 0, :4].tolist() == [0, 0, 128, 255]


def test_sample_writes_a_sheet_a_folder_or_an_npz(small, tmp_path, run):
    """The three outputs hold the same images; an .npz is training data, in grey or in colour."""
    path = checkpoint(tmp_path / "last.pt", network(channels=3))
    argv = [path, "--num", 6, "--classes", 3, 1, "--interval", 0.2, 0.8, "--seed", 5, "--omega"]
    for name in ("a.npz", "a.png", "new.folder"):
        run(sample, *argv, 1, 4, "--out", tmp_path / name)
    run(sample, *argv, 4, "--out", tmp_path / "b.npz")
    run(sample, path, "--precision", "bf16")
    assert Image.open(tmp_path / "samples.png").width == 800 and len(os.listdir(tmp_path)) == 6
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

    found, classes, _ = train.npz_data(tmp_path / "a.npz")
    assert np.array_equal(found, images.transpose(0, 3, 1, 2)) and np.array_equal(classes, labels)
    np.savez(tmp_path / "grey.npz", images[..., 0], labels)
    argv = ["--steps", 1, "--batch-size", 4, "--out", tmp_path / "out"]
    run(train, "--data", tmp_path / "grey.npz", *argv)
    net, _ = sample.load(tmp_path / "out/last.pt")
    assert (net.image_size, net.channels, net.num_classes, net.predict) == (8, 1, 4, "x")


def test_every_image_of_an_epoch_comes_once_in_an_order_of_its_own():
    """A batch follows from (seed, step) and parts are its slices: so runs resume and divide."""
    args = types.SimpleNamespace(batch_size=5, seed=7, t_mean=-0.4, t_std=1.0, accum=2)
    images, labels = train.digits(10)
    images = torch.from_numpy(images)
    steps = [train.batch(images, labels, args, k) for k in range(4)]
    x = torch.cat([step[0] for step in steps]).flatten(1)
    assert len(x[:10].unique(dim=0)) == len(x[10:].unique(dim=0)) == 10
    assert x.min() >= -1 and 0.9 < x.max() <= 1 and not torch.equal(x[:10], x[10:])
    assert not torch.equal(steps[0][2].noise, steps[1][2].noise)
    for rank in (0, 1):  # of two processes, in two parts each
        parts = train.own_parts(images, labels, args, rank, 2, 1)
        for share, (x, y, draws) in zip((rank, rank + 2), parts, strict=True):
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
    for name in ("notes.txt", ".hidden.png"):
        (path.parent / name).write_text("not an image")
    return tmp_path / "flowers"


def encoded(data, **others):
    """(images, labels, cache) of a folder, as train.py encodes it, beside the folder."""
    args = dict(data=data, cache=None, image_size=16, flip=False, vae="none") | others
    images, labels, name = train.folder_data(types.SimpleNamespace(**args))
    cache = data.with_name(f"{data.name}-{args['image_size']}px") / name
    return torch.stack(list(images)), labels.tolist(), cache


def test_a_folder_is_decoded_once_and_again_when_it_changes(flowers, tmp_path, monkeypatch):
    """Missing chunks of a cache are made again, damaged ones named, and the whole is enough."""
    monkeypatch.setattr(train, "CHUNK", 4)
    first, labels, cache = encoded(flowers)
    assert first.dtype == torch.uint8 and labels == [0, 0, 1, 1, 1, 2]
    rose = Image.open(flowers / "rose/0.jpg").convert("RGB")  # 41 x 95; cropped as in ADM:
    rose = rose.resize((20, 47), Image.BOX).resize((16, 38), Image.BICUBIC).crop((0, 11, 16, 27))
    assert np.array_equal(first[5].permute(1, 2, 0), rose)
    last, seen, decode = cache / "000000004.pt", [], train.centre_crop
    content = last.read_bytes()
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(train, "centre_crop", lambda *args: seen.append(0) or decode(*args))
    for missing in (0, 2):
        assert torch.equal(encoded(flowers)[0], first) and len(seen) == missing
        last.unlink()
    encoded(flowers)
    assert last.read_bytes() == content

    moved = shutil.copytree(cache, tmp_path / cache.name)
    shutil.rmtree(cache.parent)
    assert torch.equal(torch.stack(list(train.cached_data(moved)[0])), first)
    for damage, word in ((lambda path: os.truncate(path, 1000), last.name),
                         (os.unlink, "incomplete")):
        damage(moved / last.name)
        with pytest.raises(ValueError, match=word):
            train.cached_data(moved)
    both, twice, other = encoded(flowers, flip=True)
    assert torch.equal(both[:4], first[:4]) and torch.equal(both[4:8], first[:4].flip(3))
    assert twice == [0, 0, 1, 1, 0, 0, 1, 1, 1, 2, 1, 2]
    shutil.copy(flowers / "aster/0.png", flowers / "iris/one-more.png")
    changed, _, another = encoded(flowers)
    assert len(changed) == 7 and len({cache, other, another}) == 3


def save_vae(folder, latent_channels, levels):
    """A VAE of 25,000 random parameters; the paper's has 4 channels and 4 levels."""
    import diffusers
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8,) * levels, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, norm_num_groups=4,
        latent_channels=latent_channels).save_pretrained(folder)
    return str(folder)


def test_latents_are_drawn_from_the_posterior_and_normalised(small, flowers, tmp_path, run):
    """Stored are mean and standard deviation; a batch draws from them; decoding undoes it all."""
    name, out = save_vae(tmp_path / "vae", 4, 4), tmp_path / "out"
    run(train, "--data", flowers, "--image-size", 32, "--vae", name, "--batch-size", 4,
        "--steps", 2, "--out", out)
    net, info = sample.load(out / "last.pt")
    assert (net.image_size, net.channels, net.num_classes, net.predict) == (4, 4, 3, "u")
    assert info["vae"] == name and Image.open(out / "step-000002.png").width == 10 * 68

    [cache] = (tmp_path / "flowers-32px").iterdir()
    coded, labels, _ = train.cached_data(cache)
    latents, vae = torch.stack(list(coded)), sample.load_vae(name)
    pixels, *_ = encoded(flowers, image_size=32)
    assert latents.shape == (6, 8, 4, 4) and latents.dtype == torch.float16
    posterior = vae.encode(pixels / 127.5 - 1).latent_dist
    assert_close(latents, torch.cat((posterior.mean, posterior.std), 1).half())
    args = types.SimpleNamespace(batch_size=12000, seed=1, t_mean=-0.4, t_std=1.0)
    x, y, _ = train.batch(latents, labels, args, 0)
    mean, std = latents[5].float().chunk(2)  # of the only image of class 2
    z = x[y == 2] * sample.LATENT_STD + sample.LATENT_MEAN
    assert len(z) == 2000 and (z.mean(0) - mean).abs().max() < 0.15 * std.max()
    assert (z.var(0) / std**2 - 1).abs().max() < 0.15
    constants = torch.stack((sample.LATENT_MEAN, sample.LATENT_STD)).flatten().tolist()
    assert constants == pytest.approx([0.86488, -0.27787343, 0.21616915, 0.3738409,
                                       4.85503674, 5.31922414, 3.93725398, 3.9870003])

    net.u = lambda noise, *_: noise - x[:8]
    [decoded] = sample.generate(net, range(8), [0], vae=vae)
    z = x[:8] * sample.LATENT_STD + sample.LATENT_MEAN
    expected = (vae.decode(z).sample * 127.5 + 127.5).round().clamp(0, 255)
    assert np.mean(decoded != expected.numpy()) < 0.01  # a sum may be rounded otherwise
    with pytest.raises(ValueError, match="4 channels of latents at 1/8"):
        sample.load_vae(save_vae(tmp_path / "other", 16, 1))


# ---- Training ----


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
    optimizers = train.make_optimizers(net, types.SimpleNamespace(lr=0.02, muon_lr=muon_lr))
    group = optimizers["optimizer"].param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0)
    matrix, other = net.u_heads[0].mlp.w13.weight, net.u_final_layer.linear.weight
    before = matrix.detach().clone(), other.detach().clone()
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    train.update(net, ema, optimizers.values(), (0.01, 0.025), 0.75)
    first, second = (b - p.detach() for b, p in zip(before, (matrix, other)))
    assert_close(second, 0.01 * other.grad.sign(), rtol=1e-3, atol=1e-6)
    average = ema.u_final_layer.linear.weight
    assert_close(average, 0.75 * before[1] + 0.25 * other.detach())
    assert not any(p.requires_grad for p in ema.parameters())  # or a graph would grow every step
    if not muon_lr:
        assert_close(first, 0.01 * matrix.grad.sign(), rtol=1e-3, atol=1e-6)
        return
    values = torch.linalg.svdvals(first / 0.025) / (matrix.shape[0] / matrix.shape[1]) ** 0.5
    assert 0.5 < values.min() and values.max() < 1.3
    product = first.T @ matrix.grad  # symmetric: the same singular vectors
    assert (product - product.T).norm() < 1e-3 * product.norm()


def records(out):
    return [json.loads(line) for line in open(out / "log.jsonl") if line.endswith("}\n")]


def state_of(out):
    """All tensors and numbers of the last checkpoint in a folder."""
    saved = torch.load(out / "last.pt", weights_only=True)
    return {name: value for name, value in saved.items() if name != "settings"}


def test_stopped_anyhow_a_run_continues_to_the_same_bits(flowers, tmp_path, run):
    """Ctrl-C saves and ends, kill -9 loses the steps since the last checkpoint, and the log may end
    in half a line: in the end weights and log are those of a run that nobody stopped."""
    argv = ["--data", flowers, "--batch-size", "4", "--save-every", "1", "--log-every", "1",
            "--keep-every", "4", "--cooldown", "0", "--steps"]
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    run(train, *argv, 8, "--out", whole)
    run(train, *argv, 1, "--out", out)
    for wait, how, status in ((3, signal.SIGINT, 130), (5, signal.SIGKILL, -9)):  # wait: records
        process = subprocess.Popen([sys.executable, HERE / "train.py", *argv, "8", "--out", out],
                                   stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
        while process.poll() is None and len(records(out)) < wait:
            time.sleep(0.01)
        process.send_signal(how)
        assert "Traceback" not in process.communicate()[1]
        assert process.returncode in (status, 0)
    with open(out / "log.jsonl", "a") as log:  # a step after the checkpoint, and half of one
        log.write('{"step": 9, "loss_u": 7}\n{"step": 10, "lo')
    run(train, *argv, 8, "--out", out)
    assert_close(state_of(whole), state_of(out), rtol=0, atol=0)
    losses = [[record["loss_u"] for record in records(folder)] for folder in (whole, out)]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    done = os.stat(out / "last.pt")
    run(train, *argv, 8, "--out", out)
    assert os.stat(out / "last.pt") == done  # a finished run is left as it is
    assert sample.load(out / "ema-000004.pt")[1]["step"] == 4


def test_steps_without_a_finite_gradient_are_skipped(small, tmp_path, run, monkeypatch):
    """A NaN never reaches the weights, and the log shows it as null."""
    calls, loss = [], imf.imf_loss

    def broken(*args):
        calls.append(0)  # the first call counts the operations
        value, logs = loss(*args)
        return value * (float("nan") if len(calls) in (3, 4, 6) else 1), logs

    monkeypatch.setattr(imf, "imf_loss", broken)
    run(train, "--out", tmp_path, "--batch-size", 4, "--log-every", 1, "--steps", 5)
    assert [r["grad_norm"] is None for r in records(tmp_path)] == [False, True, True, False, True]
    net, _ = sample.load(tmp_path / "last.pt")
    assert all(p.isfinite().all() for p in net.parameters())


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
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 4 and torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1
    for other in (["--lr", 1], ["--seed", 1], ["--tangent", "boundary"], ["--ema", 0.5],
                  ["--warmup", 7], ["--cooldown", 0], ["--model", "B/2"], ["--batch-size", 5],
                  ["--steps", 1]):
        run(train, *argv, *other, refused=other[:1])
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def torchrun(n, script, *argv):
    """Runs a script in n processes on the CPU: (exit status, standard error)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={n}", "--", HERE / script, *map(str, argv)]
    done = subprocess.run(command, text=True, capture_output=True, env=ONE_THREAD)
    return done.returncode, done.stderr


def test_any_number_of_processes_and_parts_gives_the_same(flowers, tmp_path, run):
    """Up to rounding the weights, to the byte cache and images: machines need not be alike."""
    argv = ["--data", flowers, "--image-size", 16, "--steps", 5, "--batch-size", 8, "--out"]
    for n in (1, 2):
        cache = tmp_path / f"cache{n}"
        assert torchrun(n, "train.py", *argv, tmp_path / f"run{n}", "--cache", cache)[0] == 0
    run(train, *argv, tmp_path / "plain", "--cache", tmp_path / "cache1")
    run(train, *argv, tmp_path / "parts", "--accum", 2)
    plain, *others = (torch.cat([p.flatten() for p in state_of(tmp_path / name)["net"].values()])
                      for name in ("plain", "parts", "run1", "run2"))
    assert all((other - plain).norm() < 1e-6 * plain.norm() for other in others)
    [first], [second] = (list((tmp_path / f"cache{n}").glob("*/000000000.pt")) for n in (1, 2))
    assert first.read_bytes() == second.read_bytes()

    argv = [tmp_path / "plain/last.pt", "--num", 9, "--out"]
    assert torchrun(2, "sample.py", *argv, tmp_path / "two.npz")[0] == 0
    run(sample, *argv, tmp_path / "one.npz")
    assert np.array_equal(*(np.load(tmp_path / f"{n}.npz")["arr_0"] for n in ("one", "two")))
    status, err = torchrun(2, "train.py", "--data", tmp_path / "nowhere", "--out", tmp_path)
    assert status != 0 and "nowhere" in err  # a process that fails ends the others, and says why


# ---- The scores ----


def pictures(n, size, seed=0):
    """Smooth random images, uint8 (n, size, size, 3)."""
    small = np.random.default_rng(seed).integers(256, size=(n, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(i).resize((size, size), 2)) for i in small])


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
    assert hashlib.sha256(shapes).hexdigest()[:16] == "61093f3898ff55ee"  # the published file's
    normal = np.random.default_rng(0).standard_normal
    bias = state.pop("fc.bias").fill_(1)  # no score uses it
    for name, value in state.items():
        scale = 0.2 if name == "fc.weight" else 0.1
        if name.endswith("conv.weight"):
            scale = (2 / value[0].numel()) ** 0.5
        value.copy_(scale * torch.from_numpy(normal(value.shape, np.float32)))
        value += name.endswith(("bn.weight", "var"))
    torch.save(state | {"fc.bias": bias}, path)
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


def gaussian(rng, n, dim=48):
    return torch.from_numpy(rng.standard_normal((n, dim)) @ rng.standard_normal((dim, dim)))


@pytest.mark.parametrize("n", [30, 200])  # fewer and more than the 48 dimensions
def test_fid_is_the_formula_of_the_paper_and_zero_for_a_set_with_itself(n):
    """The Frechet distance of two Gaussians, with singular covariances too."""
    rng = np.random.default_rng(1)
    x = gaussian(rng, n)
    (mu1, sigma1), (mu2, sigma2) = a, b = fid.moments(x), fid.moments(1.3 * gaussian(rng, 300))
    np.testing.assert_allclose(sigma1, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)
    product = np.linalg.eigvals(sigma1.numpy() @ sigma2.numpy()).astype(complex)
    expected = ((mu1 - mu2) ** 2).sum() + (sigma1 + sigma2).trace() - 2 * (product**0.5).real.sum()
    assert fid.frechet_distance(*a, *b) == pytest.approx(expected.item(), rel=1e-5)
    assert fid.frechet_distance(*b, *a) == pytest.approx(expected.item(), rel=1e-5)
    assert 0 <= fid.frechet_distance(*a, *a) < 1e-8 * sigma1.trace()
    assert np.isnan(fid.frechet_distance(mu1 * np.nan, sigma1, mu1, sigma1))


def test_inception_score_precision_and_recall_are_their_definitions():
    """exp of the mean divergence of p(y|x) from p(y), averaged over splits; and the fraction of one
    set within reach of the other's third neighbours."""
    rng = np.random.default_rng(3)
    logits = gaussian(rng, 100, 7)
    parts = logits.softmax(1).numpy().reshape(5, 20, 7)
    expected = [np.exp((p * np.log(p / p.mean(0))).sum(1).mean()) for p in parts]
    assert fid.inception_score(logits, 5) == pytest.approx((np.mean(expected), np.std(expected)))
    assert fid.inception_score(torch.eye(10).repeat(10, 1) * 1000) == pytest.approx((10, 0))

    def within(a, b):  # some b has it no farther than b's third neighbour
        reach = torch.cdist(b, b).sort(1).values[:, 3]
        return (torch.cdist(a, b) <= reach).any(1).double().mean().item()

    x, y = gaussian(rng, 1100, 6), gaussian(rng, 1200, 6) + 1
    assert fid.precision_recall(x, y) == pytest.approx((within(x, y), within(y, x)))
    assert fid.precision_recall(x, x) == (1, 1) and fid.precision_recall(x, x + 1000) == (0, 0)


def test_folder_npz_statistics_and_checkpoint_score_the_same(weights, tmp_path, run, monkeypatch):
    """However the images come, the scores are those of the set."""
    def scores(*argv):
        words = run(fid, *argv).split()
        return dict(zip(words[::2], map(float, words[1::2])))

    inception = fid.Inception(weights)
    monkeypatch.setattr(fid, "Inception", lambda path: inception)
    monkeypatch.chdir(tmp_path)
    os.makedirs("a/deep/er")
    for i, image in enumerate(pictures(6, 24)):
        Image.fromarray(image).save(f"a/deep/er/{i}.png" if i < 3 else f"a/{i}.png")
    other = pictures(5, 20, seed=1)
    np.savez_compressed("a.npz", pictures(6, 24))
    np.savez("b.npz", other, np.arange(5))
    mu, sigma = fid.moments(inception(other.transpose(0, 3, 1, 2))[0])
    np.savez("ref.npz", ref_mu=mu, ref_sigma=sigma)  # the authors' names
    folder = scores("a", "b.npz", "--save", "saved.npz")
    assert list(folder) == ["fid", "precision", "recall", "is", "is_std"]
    assert scores("a.npz", "b.npz") == pytest.approx(folder, rel=1e-6)
    argv = [checkpoint("last.pt", network(channels=3)), "--num", 6, "--omega", 2]
    run(sample, *argv, "--out", "c.npz")
    assert scores(*argv, "--save", "d.npz") == pytest.approx(scores("c.npz"), rel=1e-4)
    monkeypatch.setattr(fid, "Inception", None)  # two statistics need no network
    assert scores("saved.npz", "ref.npz") == {"fid": pytest.approx(folder["fid"], rel=1e-6)}


class Hostile:
    """Unpickled, it would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


HOSTILE = np.array([Hostile()] * 12, object)
PICTURES, LABELS = pictures(12, 8), np.arange(12) % 3

# commands; what the message must name is the last word, or what follows "->"
REFUSED = {
    sample: """missing.pt; zero.pt; text.pt; cut.pt; pickle.pt; hostile.pt; list.pt; odd.pt;
        good.npz; empty; last.pt --out last.pt/x.png -> last.pt; last.pt --out flat;
        last.pt --out x.jpg; last.pt --device abacus; last.pt --classes 5 -> --classes;
        last.pt --vae some -> --vae; last.pt --omega nan -> --omega; last.pt --num x -> --num;
        last.pt --interval 2 3 -> --interval; last.pt --steps 0 -> --steps;
        last.pt --sead 1 -> --sead""",
    train: """--data nowhere; --data empty; --data flat; --data text.pt; --data missing.npz;
        --data half -> half/rose/b.png; --data deep -> deep/a/b.png; --data cut.npz;
        --data fine --image-size 15; --data unsafe.npz; --data float.npz; --data alone.npz;
        --data negative.npz; --data halves.npz; --data huge.npz; --data few.npz;
        --data oblong.npz; --data odd.npz -> multiple of 2; --image-size 64 -> --data;
        --out text.pt; --out broken; --model XXL; --lr nan -> --lr; --steps 0 -> --steps;
        --batch-size 8 --accum 3 -> --batch-size""",
    fid: """good.npz missing; empty good.npz -> empty; text.pt good.npz -> text.pt;
        good.npz float.npz; good.npz unsafe.npz; good.npz one.npz; good.npz nan.npz;
        good.npz small.npz; good.npz pickled.npz; good.npz --inception other.pth;
        good.npz --inception hostile.pth; good.npz --inception nan.pth -> not finite;
        good.npz --save text.pt/x.npz -> text.pt"""}


def write_what_is_refused(weights):
    """Files of this folder: damaged, foreign and hostile ones, beside a few good ones."""
    whole = checkpoint(Path("last.pt"), network(channels=1)).read_bytes()
    checkpoint(Path("odd.pt"), network(channels=1), image_size=9)
    for folder in ("empty", "broken", "flat", "fine/rose", "half/rose", "deep/a"):
        os.makedirs(folder)
    for name in ("flat/a.png", "fine/rose/a.png", "half/rose/a.png"):
        Image.fromarray(PICTURES[0]).save(name)
    Image.fromarray(np.full((9, 9), np.uint16(0x8000))).save("deep/a/b.png")
    for name, content in {
            "zero.pt": b"", "text.pt": b"not a checkpoint", "cut.pt": whole[:len(whole) // 2],
            "pickle.pt": pickle.dumps({"ema": Hostile()}), "broken/last.pt": b"text",
            "cut.npz": b"PK" + bytes(300), "half/rose/b.png": b"\x89PNG\r\n\x1a\n"}.items():
        Path(name).write_bytes(content)
    for name, arrays in {
            "good": (PICTURES, LABELS), "float": (PICTURES / 255, LABELS), "alone": (PICTURES,),
            "unsafe": (HOSTILE, HOSTILE), "one": (PICTURES[:1],), "few": (PICTURES, LABELS[:5]),
            "negative": (PICTURES, LABELS - 1), "halves": (PICTURES, LABELS / 2),
            "huge": (PICTURES, LABELS + 99), "oblong": (PICTURES[:, :6], LABELS),
            "odd": (PICTURES[:, :7, :7], LABELS)}.items():
        np.savez(f"{name}.npz", *arrays)
    mu, sigma, state = np.zeros(2048), np.eye(2048), torch.load(weights)
    np.savez("nan.npz", mu=mu, sigma=sigma * np.nan)
    np.savez("pickled.npz", mu=HOSTILE, sigma=mu)
    np.savez("small.npz", mu=mu[:9], sigma=sigma[:9, :9])
    for name, content in {
            "hostile.pt": {"ema": Hostile(), "settings": {}, "step": 1}, "list.pt": [1, 2],
            "other.pth": {"fc.weight": torch.ones(2)}, "hostile.pth": {"fc.weight": Hostile()},
            "nan.pth": state | {"fc.weight": state["fc.weight"] * np.nan}}.items():
        torch.save(content, name)


def test_bad_input_is_refused_in_one_line(small, weights, run, tmp_path, monkeypatch):
    """What is wrong is named, with status 2; nothing is written and no code in a file is run."""
    load, inception = fid.Inception, fid.Inception(weights)
    monkeypatch.setattr(fid, "Inception", lambda path: load(path) if path else inception)
    monkeypatch.chdir(tmp_path)
    write_what_is_refused(weights)
    before = sorted(tmp_path.rglob("*"))
    for program, lines in REFUSED.items():
        for line in lines.split(";"):
            command, _, named = line.partition("->")
            argv = command.split()
            run(program, *argv, refused=[named.strip() or argv[-1]])
            for decoded in tmp_path.glob("*-*px"):  # what was decoded stays
                shutil.rmtree(decoded)
            assert sorted(tmp_path.rglob("*")) == before, line
