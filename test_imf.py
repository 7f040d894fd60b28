"""What improved MeanFlow is and what this code promises, in the order in which one learns it."""

import collections, contextlib, hashlib, json, os, re, shutil, signal, subprocess, sys, time, types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import fid, imf, model, sample, train
from results.bench import literal_loss  # the definition, as one would port it

HERE = Path(__file__).resolve().parent
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # CPUs give the same bits twice
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


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def test_exact_average_velocity_satisfies_the_identity_and_maps_noise_to_data():
    """For a known flow u + (t - r) du/dt = v, and one step of u loses nothing against many."""
    def moments(t):  # of z_t, where the data are N(0.5, 0.2^2)
        return (1 - t) * 0.5, ((1 - t) ** 2 * 0.2**2 + t**2) ** 0.5

    def exact_u(z, r, t):  # along the flow, (z - mean) / std stays the same
        (mean, std), (mean_r, std_r) = moments(t), moments(r)
        return (z - mean_r - std_r / std * (z - mean)) / (t - r)

    t, r, z = torch.tensor([[0.9, 0.6, 1.0], [0.2, 0.5, 0.0], [-0.3, 1.2, 0.7]]).double()
    mean, std = moments(t)
    v = -0.5 + (t - (1 - t) * 0.2**2) / std**2 * (z - mean)
    u, du_dt = torch.func.jvp(exact_u, (z, r, t), (v, 0 * r, 1 + 0 * t))
    assert_close(u + (t - r) * du_dt, v)
    net = types.SimpleNamespace(u=lambda z, t, h, *_: exact_u(z, t[0] - h[0], t[0]))
    for steps in (1, 2, 5):
        x = imf.sample(net, torch.randn(200_000).double(), torch.zeros(200_000), steps)
        assert abs(x.mean() - 0.5) < 2e-3 and abs(x.std() - 0.2) < 2e-3


def test_draws_have_the_stated_distributions():
    """Times, guidance and dropped classes are those of the release: they decide what is learned."""
    d = imf.draw(torch.empty(100_000, 1), torch.Generator().manual_seed(0))
    matching = torch.arange(100_000) < 50_000
    assert torch.equal(d.r == d.t, matching) and (d.r[~matching] < d.t[~matching]).all()
    assert (d.t_min[matching] == 0).all() and (d.t_max[matching] == 1).all()
    assert abs(d.drop.float().mean() - 0.1) < 0.005 and not d.drop[~matching].any()
    for normal, mean in ((torch.stack((d.t, d.r))[:, ~matching].logit(), -0.4), (d.noise, 0)):
        assert abs(normal.mean() - mean) < 0.02 and abs(normal.std() - 1) < 0.02
    for uniform, low, high in ((d.omega.log(), 0, np.log(8)),  # omega's density is 1 / omega
                               (d.t_min[~matching], 0, 0.5), (d.t_max[~matching], 0.5, 1)):
        position = (uniform - low) / (high - low)
        assert position.min() > -1e-6 and position.max() < 1 + 1e-6
        assert abs(position.mean() - 0.5) < 0.01 and abs(position.var() - 1 / 12) < 2e-3


@pytest.mark.parametrize("tangent", imf.TANGENTS)
@pytest.mark.parametrize("n, norm_eps, predict", [
    (1, 0.01, "u"), (2, 0.01, "u"), (7, 0.01, "u"), (16, 1e3, "u"), (16, 0.01, "x")])
def test_the_loss_and_every_gradient_equal_the_literal_port(tangent, n, norm_eps, predict):
    """What we leave out counts for nothing, whether velocities or images are predicted."""
    net = network(predict=predict)
    x, y, draws = data(net, n)
    if n == 2:  # flow matching alone: no sample has r < t for the slices to begin with
        draws = draws._replace(r=draws.t, t_min=torch.zeros(n), t_max=torch.ones(n))
    draws.t[0], draws.r[0] = (0.02, 0.02) if predict == "x" else (draws.t[0], draws.r[0])
    loss, logs = imf.imf_loss(net, x, y, draws, tangent, norm_eps)
    ours = gradients(net, loss)
    with sdpa_kernel(SDPBackend.MATH):
        expected = literal_loss(net, x, y, draws, tangent, norm_eps)
        theirs = gradients(net, expected)
    assert_close(loss, expected, rtol=1e-6, atol=0)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_golden_values_of_network_loss_and_sample():
    """Frozen from a version that equals the authors' release on their own weights (u, v to 3e-7,
    every gradient to 1.2e-6): any other constant, sign or embedding gives other numbers."""
    def wave(*shape, phase=0.0):  # from -1 to 1, the same on every machine
        index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        return torch.sin(0.7 * index**2 + phase).float().view(shape)

    def close(value, *expected):
        assert_close(value, torch.tensor(expected), rtol=2e-5, atol=2e-5)

    net = model.DiT(8, 2, 5, **SMALL)
    for i, (name, p) in enumerate(sorted(net.named_parameters())):
        p.data = 0.3 * wave(*p.shape, phase=i) + ("norm" in name)
    x, e, y = wave(4, 2, 8, 8), 1.3 * wave(4, 2, 8, 8, phase=0.5), torch.tensor([0, 1, 2, 4])
    t, r, omega, t_min, t_max, drop = torch.tensor([
        [0.7, 0.3, 0.9, 0.5], [0.7, 0.3, 0.2, 0.1], [3, 1.5, 6, 2],
        [0, 0, 0.1, 0.4], [1, 1, 0.95, 0.8], [1, 0, 0, 0]])
    u, v = net(x, t, t - r, omega, t_min, t_max, y)
    close(u[2, 1, 3, :4], 0.0164385, -0.7174770, -1.3773320, -1.5020025)
    close(v[1, 0, 5, 2:6], -0.7827917, -0.7860061, 1.5450122, -1.1002761)
    net.predict = "x"  # the same output taken for an image; a small t must not amplify errors
    for small in (0.01, 0.05, 0.3):
        u_x = net.u(x, torch.full((4,), small), t - r, omega, t_min, t_max, y)
        assert_close(u_x, (x - u) / max(small, 0.05))
    net.predict = "u"
    found = imf.sample(net, e, y, 2, omega=3.0, t_min=0.2, t_max=0.7)
    close(found[3, 0, 4, :4], -2.9563589, -1.4840200, -1.3704481, -1.1334302)
    draws = imf.Draws(e, t, r, omega, t_min, t_max, drop.bool())
    for tangent, loss_u, loss, norm in (("v-head", 3.2621970, 1.5055785, 1.9280184),
                                        ("boundary", 2.9611771, 1.4969738, 2.0563388),
                                        ("conditional", 2.0309792, 1.4468141, 2.0253770)):
        value, logs = imf.imf_loss(net, x, y, draws, tangent, norm_eps=100.0)
        found = *logs.values(), value.detach(), gradients(net, value).norm()
        close(torch.stack(found), loss_u, 2.0851574, loss, norm)


@pytest.mark.parametrize("predict", ["u", "x"])
@pytest.mark.parametrize("seed", range(4))
def test_jvp_matches_finite_differences(seed, predict):
    """du/dt is how fast u changes when z moves along dz, and t and h = t - r by 1."""
    net = network(predict=predict)
    z, y, d = data(net, seed=seed)
    dz, t = torch.randn_like(z), d.t.clamp(0.1)  # t = 0.05 is a kink
    du_dt = imf.total_derivative(net.u, dz, z, t, t - d.r, *d[3:6], y)

    def moved(s):  # by s and by -s
        ahead, behind = (net.u(z + k * dz, t + k, t - d.r + k, *d[3:6], y) for k in (s, -s))
        return ahead - behind

    difference = (8 * moved(2e-3) - moved(4e-3)) / 24e-3  # of fourth order
    assert (du_dt - difference).norm() < 1e-3 * difference.norm()


def test_sizes_and_initial_weights_are_those_of_paper_and_release():
    """Million parameters, to sample and to train; blocks begin as the identity, u and v as zero."""
    for name, to_sample, to_train in (("B/2", 88.9, 145.6), ("M/2", 173.9, 230.6),
                                      ("L/2", 409.1, 509.8), ("XL/2", 610.4, 711.1)):
        with torch.device("meta"):
            net = model.DiT(32, 4, 1000, **model.sizes(name))
        every, v_head = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (net, net.v_heads))
        assert (round(every - v_head, 1), round(every, 1)) == (to_sample, to_train)
    torch.manual_seed(0)
    net = model.DiT(16, 3, 10, 4, 384, 2, 6, 1)
    block, last = net.u_heads[0], net.v_final_layer.linear
    assert not any(p.any() for p in (block.attn_scale, block.mlp_scale, *last.parameters()))
    inner = block.attn.qkv_proj, block.attn.out_proj, block.mlp.w13, block.mlp.w2
    for weight, std in (*((linear.weight, 0.32 * linear.in_features**-0.5) for linear in inner),
                        (net.h_embedder.mlp[0].weight, 1 / 16), (net.y_embedder.weight, 384**-0.5),
                        (net.x_embedder.weight, (2 / (4 * 4 * 3 + 384)) ** 0.5)):
        assert abs(weight.std() / std - 1) < 0.04
    assert net.x_embedder.weight.abs().max() < 1.8 * net.x_embedder.weight.std()  # uniform


def test_released_weights_load_by_name_and_are_guided_as_the_authors_advise(tmp_path):
    """The authors' files need no flag, and give what these weights give."""
    net, state = network(32, 4), {}
    renamed = {"t_min_emb": "cfg_t_start_emb", "t_max_emb": "cfg_t_end_emb",
               "x_embedder": "x_embedder.proj",
               "y_embedder": "y_embedder.embedding_table._flax_embedding"}
    parted = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "w13": ("w1", "w3")}
    for name, value in reversed(net.state_dict().items()):
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        name = "net." + re.sub(r"(mlp\.[02]|_proj|w13|w2|linear)\.", r"\1._flax_linear.", name)
        whole = next((whole for whole in parted if whole in name), name)
        parts = parted.get(whole, [whole])
        if "v_heads" not in name:
            state |= zip((name.replace(whole, part) for part in parts), value.chunk(len(parts)))
    torch.save(state, tmp_path / "iMF.pth")
    same, info = sample.load(tmp_path / "iMF.pth")
    z, y, d = data(net, 2)
    conditions = d.t, d.t - d.r, *d[3:6], y
    assert torch.equal(same.u(z, *conditions), net(z, *conditions)[0])
    assert info["vae"] == "stabilityai/sd-vae-ft-mse"
    with pytest.raises(ValueError, match="no v-head"):
        same.v(z, *conditions)
    state.pop("net.shared_blocks.0.attn.k_proj._flax_linear.weight")
    with pytest.raises(KeyError, match="k_proj"):
        model.from_official(state)
    for depth, expected in ((12, (8, 0.4, 0.65)), (24, (10.5, 0.4, 0.6)), (48, (8, 0.42, 0.62))):
        assert (*sample.recommended(network(depth=depth), "vae").values(),) == expected
    assert (*sample.recommended(net, None).values(),) == (3, 0.4, 0.75)  # ours, for pixels


def test_a_step_stays_on_one_device_and_needs_little_more_than_half_of_the_arithmetic(monkeypatch):
    """Of the literal port, counted. On "meta", as on a GPU, tensors of two devices do not mix."""
    net = network(16, 4, 10, patch_size=2, hidden_size=96, depth=12, num_heads=2, head_depth=8)
    x, y, draws = data(net, 32)
    net, x, y = net.to("meta"), x.to("meta"), y.to("meta")  # shapes are enough
    monkeypatch.setattr(torch, "rms_norm", None)  # compiled, CUDA's cannot take a JVP (torch 2.11)

    def arithmetic(loss, draws):  # the fused CPU kernel would be invisible to the counter
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count:
            loss(net, x, y, draws).backward()
        return count.get_total_flops()

    ours = arithmetic(lambda *args: imf.imf_loss(*args)[0], draws)  # draws are made on the CPU
    assert imf.sample(net, x, y, 2).device == torch.device("meta")
    monkeypatch.setattr(model.Linear, "forward", torch.nn.Linear.forward)  # as a port has it
    assert ours < 0.58 * arithmetic(literal_loss, [values.to("meta") for values in draws])


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no compiler")
def test_a_compiled_step_equals_the_eager_one_and_is_compiled_once():
    """With all tangents, one graph for all batches; DistributedDataParallel must not split it."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    net = network()
    parallel = torch.nn.parallel.DistributedDataParallel(net)

    def steps():
        for seed in range(4):
            loss, logs = imf.imf_loss(parallel, *data(net, 10, seed))
            yield loss.detach(), logs["loss_u"], gradients(net, loss)

    eager = list(steps())
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    net.compile_blocks(fullgraph=True)
    for ours, expected in zip(steps(), eager):
        assert all((a - b).norm() < 1e-5 * b.norm() for a, b in zip(ours, expected))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # training pass, v, JVP
    time.sleep(1)  # gloo's thread must let go of its last work first, or torch 2.13 may hang
    torch.distributed.destroy_process_group()


def checkpoint(path, net, names):
    """A checkpoint such as train.py writes, as far as sample.py reads it."""
    settings = {"image_size": 8, "predict": "u", "vae": "none", "classes": names}
    torch.save({"ema": net.state_dict(), "settings": settings, "step": 1}, path)


def pictures(n, size, seed=0):
    """Smooth random images, uint8 (n, size, size, 3)."""
    small = np.random.default_rng(seed).integers(256, size=(n, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(i).resize((size, size), 2)) for i in small])


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a command line in tmp_path and returns what it printed; or the words of its refusal."""
    def run(program, *argv, refused=()):
        monkeypatch.setattr(sys, "argv", [program.__name__ + ".py", *map(str, argv)])
        with pytest.raises(SystemExit, match="2") if refused else contextlib.nullcontext():
            sample.run(program.main)
        out, err = capsys.readouterr()
        words = [program.__name__ + ".py: ", *refused] if refused else []
        assert all(word in err.strip().split("\n")[-1] for word in words), (argv, err)
        return out

    monkeypatch.setattr(train, "digits", lambda n, digits=train.digits: digits(100))
    monkeypatch.chdir(tmp_path)
    return run


def test_the_noise_of_an_image_depends_on_its_own_seed_alone():
    """Image i is the same (to a grey level) however many are sampled, beside whichever others."""
    net = network(channels=1)

    def images(numbers, seed=0):
        return np.concatenate(list(sample.generate(net, numbers, [0], seed))).astype(int)

    whole = images(range(20))
    assert len(np.unique(np.concatenate((whole, images(range(20), 1))), axis=0)) == 40
    assert abs(images([7, 4, 19]) - whole[[7, 4, 19]]).max() <= 1
    net.u = lambda z, *_: z - torch.tensor([-1.5, -1, 0, 1]).repeat(2)  # black is -1, white 1
    assert images([0])[0, 0, 0, :4].tolist() == [0, 0, 128, 255]


def test_sample_writes_a_sheet_a_folder_or_an_npz(run):
    """The three outputs hold the same images; an .npz is training data, in grey or in colour."""
    checkpoint("last.pt", network(channels=3), list("abcde"))
    for name in ("a.npz", "a.png", "folder"):
        assert "3 d, 1 b\n" in run(sample, "last.pt", "--num", 6, "--classes", 3, 1, "--omega",
                                   1, 4, "--interval", 0.2, 0.8, "--out", name)
    images, labels = np.load("a.npz").values()
    assert labels.tolist() == [3, 1] * 6
    sheet = np.asarray(Image.open("a.png"))
    for i, image in enumerate(images):
        top, left = i // 6 * 80 + 8, i % 6 * 80 + 8  # each pixel 8 x 8, with a border of one
        assert np.array_equal(sheet[top:top + 64:8, left:left + 64:8], image)
        assert np.array_equal(Image.open(f"folder/{i:06d}.png"), image)
    run(sample, "last.pt")
    assert sheet.shape == (160, 480, 3) and Image.open("samples.png").size == (800, 800)
    run(sample, "last.pt", "--num", 3, "--out", "few.npz")  # spread over all classes
    assert np.load("few.npz")["arr_1"].tolist() == [0, 1, 3]
    np.savez("grey.npz", arr_0=images[..., 0], arr_1=labels // 2, names=["one", "two"])
    assert "12 images of 2 classes: 0 one, 1 two" in run(
        train, "--data", "grey.npz", "--steps", 1, "--batch-size", 4)
    net, info = sample.load("out/last.pt")
    assert (net.channels, net.predict, info["classes"]) == (1, "x", ["one", "two"])


def test_every_image_of_an_epoch_comes_once_in_an_order_of_its_own():
    """A batch follows from (seed, step), and processes take slices: so runs resume and divide."""
    images, labels = train.digits(10)
    args = types.SimpleNamespace(batch_size=5, seed=7, t_mean=-0.4, t_std=1.0, one_step=0.25)
    steps = [train.batch(images, labels, args, k) for k in range(4)]
    x = torch.cat([step[0] for step in steps]).flatten(1)
    assert len(x[:10].unique(dim=0)) == len(x[10:].unique(dim=0)) == 10
    assert x.min() >= -1 and 0.9 < x.max() <= 1 and not torch.equal(x[:10], x[10:])
    assert not torch.equal(steps[0][2].noise, steps[1][2].noise) and steps[0][2].r[4] == 0
    x, y, draws = train.batch(images, labels, args, 1, 1, 2)  # of process 1 of 2
    for part, whole in zip((x, y, *draws), (*steps[1][:2], *steps[1][2])):
        assert torch.equal(part, whole[1::2])


@pytest.fixture
def flowers(tmp_path):
    """A folder of three classes, of all sizes and modes, with files that are not images."""
    modes = {"aster/0.png": "RGB", "aster/1.JFIF": "L", "iris/0.png": "RGBA", "iris/1.png": "P",
             "iris/deep/2.png": "1", "rose/0.jpg": "CMYK"}
    for i, (name, mode) in enumerate(modes.items()):
        path = tmp_path / "flowers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures(1, 95, i)[0, :20 + 15 * i, :41]).convert(mode).save(path)
    for name in ("notes.txt", ".hidden.png", "../readme.txt"):
        (path.parent / name).write_text("not an image")
    return tmp_path / "flowers"


def decoded(folder, size=16):
    """(images, labels, about) of a folder, as train.py decodes it, beside the folder."""
    args = types.SimpleNamespace(data=str(folder), image_size=size, vae="none")
    return train.decoded_data(train.prepare(args, None, 0, 1))


def test_a_folder_is_decoded_once_and_a_damaged_or_changed_one_is_refused(flowers, monkeypatch):
    """What was decoded stays, knows what it was made of, and is enough to train from."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(np, "save", lambda *_: 1 / 0)  # an interruption: none of it is whole
        decoded(flowers)
    damaged = [flowers / "aster/2.png", flowers / "rose/1.jpg"]
    for path in damaged:
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match="aster/2.png.*rose/1.jpg"):
        decoded(flowers)
    for path in damaged:
        path.unlink()
    images, labels, about = decoded(flowers)
    assert len(os.listdir(f"{flowers}-16px")) == 3  # nothing is left of what was refused
    assert labels.tolist() == [0, 0, 1, 1, 1, 2] and about["classes"] == ["aster", "iris", "rose"]
    rose = Image.open(flowers / "rose/0.jpg").convert("RGB")  # 41 x 95; cropped as in ADM:
    rose = rose.resize((20, 47), Image.BOX).resize((16, 38), Image.BICUBIC).crop((0, 11, 16, 27))
    assert np.array_equal(images[5].transpose(1, 2, 0), rose)
    monkeypatch.setattr(train, "centre_crop", None)  # nothing is decoded again
    assert np.array_equal(decoded(flowers)[0], images)
    moves = ("aster/0.png", "x"), ("iris/0.png", "aster/0.png"), ("x", "iris/0.png")
    for change in (lambda: [os.rename(flowers / one, flowers / other) for one, other in moves],
                   lambda: shutil.copy2(flowers / "rose/0.jpg", flowers / "iris/one-more.jpg")):
        change()
        with pytest.raises(ValueError, match="flowers-16px"):
            decoded(flowers)


def test_transparent_pictures_lie_on_white_and_turned_ones_stand_upright(tmp_path):
    """A black drawing on a clear ground must not become a black square."""
    clear, exif = Image.new("RGBA", (4, 2), (0, 0, 0, 0)), Image.Exif()
    clear.putpixel((0, 0), (9, 8, 7, 255))
    exif[0x0112] = 6  # the top is on the right
    clear.save(tmp_path / "clear.png", exif=exif)
    image = sample.open_image(tmp_path / "clear.png")
    assert sorted(image.getcolors()) == [(1, (9, 8, 7)), (7, (255, 255, 255))]


def test_latents_are_drawn_from_the_posterior_and_normalised(flowers, run, monkeypatch):
    """Stored are mean and standard deviation; a batch draws from them; decoding undoes it all."""
    import diffusers
    monkeypatch.setitem(model.MODELS, "tiny", SMALL)
    torch.manual_seed(0)
    diffusers.AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4,
                            down_block_types=("DownEncoderBlock2D",) * 4,
                            up_block_types=("UpDecoderBlock2D",) * 4).save_pretrained("vae")
    run(train, *"--data flowers --image-size 32 --vae vae --batch-size 4 --steps 2".split())
    net, info = sample.load("out/last.pt")
    assert (net.image_size, net.channels, net.predict, info["vae"]) == (4, 4, "u", "vae")
    latents, labels, _ = train.decoded_data("flowers-32px-latents")
    vae = sample.load_vae("vae")
    posterior = vae.encode(torch.tensor(decoded(flowers, 32)[0]) / 127.5 - 1).latent_dist
    assert_close(torch.tensor(latents), torch.cat((posterior.mean, posterior.std), 1).half())
    mean, std = torch.tensor([[0.86488, -0.27787343, 0.21616915, 0.3738409],
                              [4.85503674, 5.31922414, 3.93725398, 3.9870003]]).view(2, 4, 1, 1)
    args = types.SimpleNamespace(batch_size=12000, seed=7, t_mean=-0.4, t_std=1.0, one_step=0.25)
    x, y, _ = train.batch(latents, labels, args, 0)
    z = x * std + mean
    error = (z[y == 2] - posterior.mean[5]) / posterior.std[5]  # class 2 is one image
    assert len(error) == 2000 and torch.stack((error.mean(0), error.var(0) - 1)).abs().max() < 0.15
    net.u = lambda noise, *_: noise - x[:8]
    [found] = sample.generate(net, range(8), [0], vae=vae)
    expected = vae.decode(z[:8]).sample * 127.5 + 127.5
    assert np.mean(found != expected.round().clamp(0, 255).numpy()) < 0.01  # rounding


def test_an_update_is_adamw_of_the_release_and_its_average():
    """The learning rate rises over the warm-up, and falls to 0 over the last fraction of steps."""
    args = types.SimpleNamespace(seed=0, model="tiny", vae="none", predict="x", lr=0.01,
                                 compile=False, warmup=4, steps=20, cooldown=0.5)
    net, ema, optimizer = train.build(args, np.empty((1, 1, 8, 8)), "ab", "cpu")
    assert optimizer.defaults["betas"] == (0.9, 0.95) and optimizer.defaults["weight_decay"] == 0
    p, average = net.x_embedder.weight, ema.x_embedder.weight
    before = p.detach().clone()
    p.grad = torch.randn_like(p)
    optimizer.step()
    train.update_ema(ema, net, 0.75)
    assert_close(before - p.detach(), 0.01 * p.grad.sign(), rtol=1e-3, atol=1e-6)
    assert_close(average, 0.75 * before + 0.25 * p.detach())
    assert not any(q.requires_grad for q in ema.parameters())  # or a graph would grow every step
    rates = [train.learning_rate(k, args) / 0.01 for k in (0, 1, 3, 9, 10, 15, 19)]
    assert rates == pytest.approx([0.25, 0.5, 1, 1, 1, 0.5, 0.1])
    assert train.learning_rate(19, types.SimpleNamespace(**vars(args) | {"cooldown": 0})) == 0.01


def records(out):
    return [json.loads(line) for log in Path(out).glob("log.jsonl") for line in open(log)]


def test_killed_anywhere_a_run_continues_to_the_same_bits(flowers, run):
    """Neither Ctrl-C, which ends with one line, nor kill -9 can be told from the weights."""
    argv = ("--data flowers --batch-size 4 --save-every 1 --log-every 1 --keep-every 4 --steps 8 "
            "--out").split()
    run(train, *argv, "whole")
    for wait, how in ((2, signal.SIGINT), (5, signal.SIGKILL)):  # wait: records
        process = subprocess.Popen([sys.executable, HERE / "train.py", *argv, "stopped"],
                                   stderr=subprocess.PIPE, text=True)
        while process.poll() is None and len(records("stopped")) < wait:
            time.sleep(0.01)
        process.send_signal(how)
        assert "Traceback" not in process.communicate()[1]
        assert process.returncode in (2, -9, 0)
    assert re.search("stopped: step [1-8] of 8", run(train, *argv, "stopped"))
    for name in ("net", "ema", "optimizer", "step"):
        ours, theirs = (sample.load_file(f"{out}/last.pt")[name] for out in ("stopped", "whole"))
        assert_close(ours, theirs, rtol=0, atol=0)
    losses = [{r["step"]: r["loss_u"] for r in records(out)} for out in ("whole", "stopped")]
    assert losses[0] == losses[1] and len(losses[0]) == 8  # what was done twice is the same twice
    assert sample.load("stopped/ema-000004.pt")[1]["step"] == 4


def test_steps_without_a_finite_gradient_are_skipped_and_many_end_the_run(run, monkeypatch):
    """A NaN never reaches the weights, and the log counts it; last.pt outlives a diverged run."""
    steps, broken, loss = iter(range(1, 999)), {2, 3, 6, *range(8, 200)}, imf.imf_loss

    def sometimes_nan(*args):
        value, logs = loss(*args)
        return value * (float("nan") if next(steps) in broken else 1), logs

    monkeypatch.setattr(imf, "imf_loss", sometimes_nan)
    run(train, *"--batch-size 4 --log-every 3 --save-every 50 --steps 200".split(),
        refused=["no finite gradient in 100 steps", "last.pt"])
    log = records("out")[:4]
    assert [record["skipped"] for record in log] == [2, 1, 2, 3]
    assert log[0]["loss_u"] > 0 and log[3]["loss_u"] is None
    assert all(p.isfinite().all() for p in sample.load("out/last.pt")[0].parameters())


def test_a_full_disk_or_another_run_keeps_the_last_checkpoint(run, monkeypatch):
    """A checkpoint appears whole or not at all, and two trainings are never mixed by mistake."""
    def full(saved, path, save=torch.save):
        if saved["step"] == 1:
            return save(saved, path)
        Path(path).write_bytes(b"half of it")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    argv = "--batch-size 4 --save-every 1 --steps 2".split()
    run(train, *argv, refused=["cannot write", "last.pt", "disk full"])
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    assert len(before) == 3 and sample.load_file("out/last.pt")["step"] == 1
    np.savez("d.npz", train.digits(100)[0][:, 0], train.digits(100)[1])
    for other in "seed 1,tangent boundary,predict u,model S/8,batch-size 2,data d.npz".split(","):
        flag, value = f"--{other}".split()
        run(train, *argv, flag, value, refused=[flag[2:].replace("-", "_") + " was", "other --out"])
    assert before == {path: path.read_bytes() for path in Path("out").iterdir()}


def test_any_number_of_processes_and_parts_gives_the_same(flowers, run):
    """Up to rounding the weights and images; to the byte what was decoded."""
    def by_two(script, *argv):  # processes
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node=2", "--", HERE / script, *map(str, argv)]
        return subprocess.run(command, text=True, capture_output=True)

    argv = "--data flowers --image-size 16 --steps 5 --batch-size 8 --out".split()
    assert by_two("train.py", *argv, "two").returncode == 0
    os.rename("flowers-16px", "decoded-by-two")
    assert re.search("1 files that.*\n.* 1 files beside", run(train, *argv, "one"))
    run(train, *argv, "parts", "--accum", 2)
    assert np.array_equal(np.load("decoded-by-two/images.npy"), decoded("flowers")[0])
    nets = [sample.load_file(f"{name}/last.pt")["net"] for name in ("one", "parts", "two")]
    one, *others = (torch.cat([p.flatten() for p in net.values()]) for net in nets)
    assert all((other - one).norm() < 1e-6 * one.norm() for other in others)
    argv = ["one/last.pt", "--num", 9, "--out"]
    assert by_two("sample.py", *argv, "two.npz").returncode == 0
    run(sample, *argv, "one.npz")
    one, two = (np.load(f"{name}.npz")["arr_0"].astype(int) for name in ("one", "two"))
    assert abs(one - two).max() <= 1
    failed = by_two("train.py", "--data", "nowhere")  # one process ends the others, and says why
    assert failed.returncode != 0 and "nowhere" in failed.stderr


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights under the names of the published file, lively enough to tell images apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "load_file", lambda path: collections.defaultdict(int))
        patch.setattr(fid.Inception, "load_state_dict", lambda *_, **__: None)
        named = fid.Inception("file").state_dict()
    state = {fid.published(name): value for name, value in named.items() if value.ndim}
    shapes = repr(sorted((name, tuple(value.shape)) for name, value in state.items())).encode()
    assert hashlib.sha256(shapes).hexdigest()[:16] == "61093f3898ff55ee"  # the published file's
    normal = np.random.default_rng(0).standard_normal
    for name, value in state.items():
        scale = 0.2 if name == "fc.weight" else 0.1
        if name.endswith("conv.weight"):
            scale = (2 / value[0].numel()) ** 0.5
        value.copy_(scale * torch.from_numpy(normal(value.shape, np.float32)))
        value += name.endswith(("bn.weight", "var"))
    torch.save(state, path := tmp_path_factory.mktemp("inception") / "weights.pth")
    return path


def test_the_inception_is_that_of_torch_fidelity(weights):
    """Four of each, as torch-fidelity 0.4.0 computes them with these weights and images."""
    for size, features, logits in (
            (32, [0.365731, 0.039498, 1.231857, 0.474546], [0.4017, -14.0730, 5.1209, -1.4260]),
            (256, [0.377276, 0.038352, 1.2402, 0.458161], [0.3454, -14.0328, 5.1145, -1.5483]),
            (299, [0.378247, 0.03827, 1.240301, 0.458069], [0.3433, -14.0373, 5.1098, -1.5549])):
        found = fid.Inception(weights)(pictures(2, size).transpose(0, 3, 1, 2))
        assert found[0][1, [0, 700, 1400, 2047]].tolist() == pytest.approx(features, abs=5e-6)
        assert found[1][1, [0, 300, 600, 1007]].tolist() == pytest.approx(logits, abs=1e-4)


def test_the_scores_are_the_formulas_of_their_papers():
    """FID, with singular covariances too; the Inception Score over splits; precision, recall."""
    rng = np.random.default_rng(1)

    def gaussian(n, dim):
        return torch.from_numpy(rng.standard_normal((n, dim)) @ rng.standard_normal((dim, dim)))

    for n in (30, 200):  # fewer and more than the dimensions
        x, y = gaussian(n, 48), 1.3 * gaussian(300, 48)
        (mu1, sigma1), (mu2, sigma2) = a, b = fid.moments(x), fid.moments(y)
        np.testing.assert_allclose(sigma1, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)
        root = np.linalg.eigvals(sigma1.numpy() @ sigma2.numpy()).astype(complex) ** 0.5
        expected = ((mu1 - mu2) ** 2).sum() + (sigma1 + sigma2).trace() - 2 * root.real.sum()
        assert fid.frechet_distance(*a, *b) == pytest.approx(expected.item(), rel=1e-5)
        assert 0 <= fid.frechet_distance(*a, *a) < 1e-8 * sigma1.trace()
    logits = gaussian(100, 7)
    parts = logits.softmax(1).numpy().reshape(5, 20, 7)
    expected = [np.exp((p * np.log(p / p.mean(0))).sum(1).mean()) for p in parts]
    assert fid.inception_score(logits, 5) == pytest.approx((np.mean(expected), np.std(expected)))

    def within(a, b):  # some b has it no farther than b's third neighbour
        reach = torch.cdist(b, b).sort(1).values[:, 3]
        return (torch.cdist(a, b) <= reach).any(1).double().mean().item()

    x, y = gaussian(1100, 6), gaussian(1200, 6) + 1
    assert fid.precision_recall(x, y) == pytest.approx((within(x, y), within(y, x)))


def test_folder_npz_decoded_folder_and_statistics_score_the_same(weights, run, monkeypatch):
    """However the images come, the scores are those of the set."""
    def scores(*argv):
        words = " ".join(re.findall("^(?:fid|is|prec).*", run(fid, *argv), re.M)).split()
        return dict(zip(words[::2], map(float, words[1::2])))

    inception = fid.Inception(weights)
    monkeypatch.setattr(fid, "Inception", lambda path: inception)
    images, other = pictures(6, 24), pictures(5, 20, seed=1)
    os.makedirs("a/deep")
    for i, image in enumerate(images):
        Image.fromarray(image).save(f"a/deep/{i}.png")
    decoded("a", 24)
    mu, sigma = fid.moments(inception(other.transpose(0, 3, 1, 2))[0])
    np.savez_compressed("a.npz", images)
    np.savez("b.npz", other, np.arange(5))
    np.savez("ref.npz", ref_mu=mu, ref_sigma=sigma)  # the authors' names
    np.savez("adm.npz", arr_0=other, mu=mu, sigma=sigma)
    folder = scores("a", "b.npz", "--save", "saved")
    for a, b in (("a.npz", "b.npz"), ("a", "adm.npz"), ("a-24px", "b.npz")):
        assert scores(a, b) == pytest.approx(folder, rel=1e-6)
    assert "which FID notices" in run(fid, "a.npz", "b.npz")
    monkeypatch.setattr(fid, "Inception", None)  # two statistics need no network
    assert scores("saved.npz", "ref.npz") == {"fid": pytest.approx(folder["fid"], rel=1e-6)}


REFUSED = {  # commands; the message must name the last word, or what follows "->"
    sample: """missing.pt; cut.pt; hostile.pt; list.pt; good.npz; last.pt --out flat; last.pt --out
        x.jpg; last.pt --classes 5 -> 0 0, 1 1; last.pt --omega nan -> --omega; last.pt --interval
        2 3 -> --interval; last.pt --sead 1 -> --sead; last.pt --device abacus -> --device""",
    train: """--data nowhere; --data flat; --data hole -> hole/iris; --data missing.npz; --data
        hostile.npz; --data float.npz; --data one.npz; --data from1.npz --steps 1 -> 0 to K - 1;
        --data gap.npz --steps 1 -> 0 to K - 1; --data oblong.npz; --data good.npz --image-size 64
        -> --image-size; --data fine --image-size 15 -> --image-size; --out broken -> last.pt;
        --model XXL; --model B/0; --lr nan -> --lr; --steps 0 -> --steps; --ema 2 -> --ema; --t-mean
        nan -> --t-mean; --data fine --vae no -> hub; --batch-size 8 --accum 3 -> --batch-size""",
    fid: """good.npz missing; hole/iris good.npz -> hole/iris; stats.npz -> alone; good.npz --save
        good; good.npz one.npz --inception weights.pth -> two pictures; good.npz --inception
        list.pt; good.npz deep --inception weights.pth -> 8 bits"""}


def test_bad_input_is_refused_in_one_line(weights, run, tmp_path, monkeypatch):
    """What is wrong is named, with status 2; nothing is written and no code in a file is run."""
    class Hostile:
        def __reduce__(self):  # unpickled, it makes a folder
            return os.mkdir, ("owned",)

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    images, labels = pictures(12, 8), np.arange(12) % 3
    for folder in ("broken", "deep", "fine/rose", "flat", "hole/iris", "hole/rose"):
        os.makedirs(folder)
    for folder in ("fine/rose", "flat", "hole/rose"):
        Image.fromarray(images[0]).save(f"{folder}/a.png")
    Image.fromarray(np.full((9, 9), np.uint16(0x8000))).save("deep/a.png")
    shutil.copy(weights, "weights.pth")
    checkpoint("last.pt", network(channels=1), list("01234"))
    Path("cut.pt").write_bytes(Path("last.pt").read_bytes()[:50_000])
    Path("broken/last.pt").write_text("not a checkpoint")
    torch.save({"ema": Hostile(), "settings": {}, "step": 1}, "hostile.pt")
    torch.save([1, 2], "list.pt")
    for name, *arrays in (
            ("good", images, labels), ("float", images / 255, labels), ("one", images[:1]),
            ("hostile", np.array([Hostile()] * 12), labels), ("from1", images, labels + 1),
            ("gap", images, labels * 2), ("oblong", images[:, :6], labels)):
        np.savez(name, *arrays)
    np.savez("stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    before = sorted(tmp_path.rglob("*"))
    for program, lines in REFUSED.items():
        for line in lines.split(";"):
            command, _, named = " ".join(line.split()).partition(" -> ")
            run(program, *command.split(), refused=[named or command.split()[-1]])
            assert sorted(tmp_path.rglob("*")) == before, line
