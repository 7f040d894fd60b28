"""The network of improved MeanFlow: a DiT whose conditions are tokens (arXiv 2512.02012).

    sequence   8 class, 4 omega, 2 t_min, 2 t_max, 4 h ("time") tokens, then the patches by rows
    trunk      depth - head_depth blocks, shared
    branches   head_depth blocks each: the u-head (average velocity), the v-head (velocity)

The blocks are told h = t - r but not t: a noisy image shows its noise. Sampling needs no v-head."""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad


class Linear(nn.Linear):
    """W x + b. In a JVP, x carries a tangent dx and the result W dx; left to itself, PyTorch would
    also multiply x by the tangent of W, at full cost, although it is 0."""

    def forward(self, x):
        x, dx = forward_ad.unpack_dual(x)
        Wx = super().forward(x)
        return Wx if dx is None else forward_ad.make_dual(Wx, F.linear(dx, self.weight))


class RMSNorm(nn.RMSNorm):
    """x over its root mean square, times weight. PyTorch's own has no JVP if compiled for CUDA."""

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


def rotary_angles(n, head_dim, device):
    """cos and sin, float32 (n, head_dim / 2), of the angles index * 10000^(-2 k / head_dim)."""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.arange(n, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x, rotary):
    """Rotary embedding of x (..., n, head_dim): the pairs (0, 1), (2, 3), ... are rotated."""
    cos, sin = rotary
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # each (..., n, head_dim / 2)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv_proj = Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out_proj = Linear(hidden_size, hidden_size, bias=False)
        self.q_norm = RMSNorm(hidden_size // num_heads)
        self.k_norm = RMSNorm(hidden_size // num_heads)

    def forward(self, x, rotary):
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1))  # (B, n, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, n, head_dim)
        q = rotate(self.q_norm(q.float()), rotary).type_as(v)
        k = rotate(self.k_norm(k.float()), rotary).type_as(v)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(x.transpose(1, 2).flatten(-2))  # (B, n, hidden)


class SwiGLU(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        width = int(hidden_size * 8 / 3)
        self.w13 = Linear(hidden_size, 2 * width, bias=False)
        self.w2 = Linear(width, hidden_size, bias=False)

    def forward(self, x):
        w1x, w3x = self.w13(x).chunk(2, -1)  # each (B, n, width)
        return self.w2(F.silu(w1x) * w3x)


class Block(nn.Module):
    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.norm1 = RMSNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = RMSNorm(hidden_size)
        self.mlp = SwiGLU(hidden_size)
        self.attn_scale = nn.Parameter(torch.zeros(hidden_size))
        self.mlp_scale = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x, rotary):
        x = x + self.attn_scale * self.attn(self.norm1(x), rotary)
        return x + self.mlp_scale * self.mlp(self.norm2(x))


def run_block(block, x, dx, rotary):
    """The block's output and its tangent, for x and its tangent dx (None outside a JVP). A tangent
    goes in and out as a tensor of its own, because compiled code takes no dual tensors."""
    if dx is not None:
        x = forward_ad.make_dual(x, dx)
    return forward_ad.unpack_dual(block(x, rotary))


class ScalarEmbedder(nn.Module):
    """One number per sample (B,), unscaled -> (B, width): 128 cosines, 128 sines, an MLP."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(Linear(256, width), nn.SiLU(), Linear(width, width))

    def forward(self, scalar):
        index = torch.arange(128, device=scalar.device)
        angles = scalar[:, None] * torch.exp(-math.log(10000) / 128 * index)
        return self.mlp(torch.cat((angles.cos(), angles.sin()), -1))


def final_layer(hidden_size, out):
    return nn.Sequential(OrderedDict(norm=RMSNorm(hidden_size), linear=Linear(hidden_size, out)))


class DiT(nn.Module):
    """net(z, t, h, omega, t_min, t_max, y) -> (u, v); net.u and net.v run one branch alone.

    z, u, v (B, C, H, W), float32; t, h, omega, t_min, t_max (B,) float; y (B,) long, num_classes
    being "no class". predict: the last layers give "u" and v, or clean images "x" for both, as in
    pixel MeanFlow (arXiv 2601.22158): u = (z - x) / max(t, 0.05), v likewise. Raises ValueError."""

    def __init__(self, image_size, channels, num_classes, patch_size, hidden_size, depth,
                 num_heads, head_depth, predict="u"):
        super().__init__()
        if image_size not in range(patch_size, 4096, patch_size):
            raise ValueError(f"image size {image_size}: no multiple of patch {patch_size} < 4096")
        self.image_size, self.channels, self.num_classes = image_size, channels, num_classes
        self.predict, self.patch_size, self.head_dim = predict, patch_size, hidden_size // num_heads
        self.run_block = run_block  # or its compiled form

        def tokens(n):
            return nn.Parameter(torch.empty(n, hidden_size))

        def blocks(n):
            return nn.ModuleList(Block(hidden_size, num_heads) for _ in range(n))

        # each group of tokens is a learned sequence plus the embedding of its condition
        self.class_tokens, self.y_embedder = tokens(8), nn.Embedding(num_classes + 1, hidden_size)
        self.omega_tokens, self.omega_embedder = tokens(4), ScalarEmbedder(hidden_size)
        self.t_min_tokens, self.t_min_embedder = tokens(2), ScalarEmbedder(hidden_size)
        self.t_max_tokens, self.t_max_embedder = tokens(2), ScalarEmbedder(hidden_size)
        self.time_tokens, self.h_embedder = tokens(4), ScalarEmbedder(hidden_size)
        self.x_embedder = nn.Conv2d(channels, hidden_size, patch_size, patch_size)

        self.shared_blocks = blocks(depth - head_depth)
        self.u_heads, self.v_heads = blocks(head_depth), blocks(head_depth)
        self.u_final_layer = final_layer(hidden_size, patch_size**2 * channels)
        self.v_final_layer = final_layer(hidden_size, patch_size**2 * channels)
        self.initialise()

    def initialise(self):
        """The release's initial weights: blocks are the identity, and the last layers give 0."""
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                scale = 1 if "embedder" in name else (0 if "final" in name else 0.32)
                nn.init.normal_(module.weight, std=scale / math.sqrt(module.in_features))
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "tokens" in name or "y_embedder" in name:
                nn.init.normal_(p, std=1 / math.sqrt(p.shape[1]))
        nn.init.xavier_uniform_(self.x_embedder.weight.flatten(1))  # as for a Linear, in place

    def forward(self, z, t, h, omega, t_min, t_max, y):
        features = self._trunk(z, h, omega, t_min, t_max, y)
        return self._branch("u", features, z, t), self._branch("v", features, z, t)

    def u(self, z, t, h, omega, t_min, t_max, y):
        return self._branch("u", self._trunk(z, h, omega, t_min, t_max, y), z, t)

    def v(self, z, t, h, omega, t_min, t_max, y):
        return self._branch("v", self._trunk(z, h, omega, t_min, t_max, y), z, t)

    def velocity_from(self, x, z, t):
        """The velocity from the image x to z at time t (B,): (z - x) / max(t, 0.05)."""
        return (z - x) / t.clamp(min=0.05).view(-1, 1, 1, 1)  # smaller t would amplify errors

    def compile_blocks(self, **options):
        """torch.compile of run_block, whose code serves all blocks."""
        torch._dynamo.config.optimize_ddp = False  # or DDP would split the compiled blocks
        self.run_block = torch.compile(run_block, **options)

    def _trunk(self, z, h, omega, t_min, t_max, y):
        sequence = torch.cat((
            self.class_tokens + self.y_embedder(y)[:, None],  # (B, 8, hidden)
            self.omega_tokens + self.omega_embedder(1 - 1 / omega)[:, None],  # 0: unguided
            self.t_min_tokens + self.t_min_embedder(t_min)[:, None],
            self.t_max_tokens + self.t_max_embedder(t_max)[:, None],
            self.time_tokens + self.h_embedder(h)[:, None],
            self.x_embedder(z).flatten(2).transpose(1, 2),  # (B, patches, hidden)
        ), 1)
        return self._run(self.shared_blocks, sequence)

    def _run(self, blocks, x):
        x, dx = forward_ad.unpack_dual(x)
        rotary = rotary_angles(x.shape[1], self.head_dim, x.device)  # positions in the sequence
        for block in blocks:
            x, dx = self.run_block(block, x, dx, rotary)
        return x if dx is None else forward_ad.make_dual(x, dx)

    def _branch(self, name, features, z, t):
        blocks, final_layer = getattr(self, name + "_heads"), getattr(self, name + "_final_layer")
        if blocks is None:
            raise ValueError("these weights have no v-head: they can sample, not train")
        n, p = self.image_size // self.patch_size, self.patch_size
        patches = self._run(blocks, features)[:, -n * n:]
        out = final_layer(patches).float().unflatten(2, (p, p, -1)).unflatten(1, (n, n))
        out = torch.einsum("bhwpqc->bchpwq", out).flatten(4).flatten(2, 3)  # (B, C, H, W)
        return out if self.predict == "u" else self.velocity_from(out, z, t)


def from_state(state, image_size=32, predict="u"):
    """The DiT of this state_dict(), in float32. Raises KeyError, RuntimeError, ValueError."""
    groups = [name.split(".")[0] for name in state if name.endswith("norm1.weight")]  # of blocks
    shared, head_depth = groups.count("shared_blocks"), groups.count("u_heads")
    hidden_size, channels, patch_size, _ = state["x_embedder.weight"].shape
    num_classes = len(state["y_embedder.weight"]) - 1
    num_heads = hidden_size // len(state["u_heads.0.attn.q_norm.weight"])
    with torch.device("meta"):
        net = DiT(image_size, channels, num_classes, patch_size, hidden_size,
                  shared + head_depth, num_heads, head_depth, predict)
    if "v_heads" not in groups:
        net.v_heads = None
    net.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return net


RELEASED_NAMES = (("net.", ""), ("._flax_linear", ""), ("x_embedder.proj", "x_embedder"),
                  ("embedding_table._flax_embedding.", ""), ("cfg_t_start", "t_min"),
                  ("cfg_t_end", "t_max"))  # (theirs, ours)


def from_official(state_dict, image_size=32):
    """The DiT of the authors' released weights, mostly without v-head. Raises like from_state."""
    state = {}
    for name, value in state_dict.items():
        for theirs, ours in RELEASED_NAMES:
            name = name.replace(theirs, ours, 1)
        state[name] = value
    for whole, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("w13", ("w1", "w3"))):
        for first in [name for name in state if f".{parts[0]}." in name]:
            names = [first.replace(parts[0], part) for part in parts]
            state[first.replace(parts[0], whole)] = torch.cat([state.pop(name) for name in names])
    return from_state(state, image_size)


MODELS = {  # but for tiny, --model is SIZE/PATCH: B/2 is size B with patches of 2
    "tiny": dict(hidden_size=96, depth=4, num_heads=8, head_depth=1, patch_size=8),
    "S": dict(hidden_size=384, depth=12, num_heads=6, head_depth=8),
    "B": dict(hidden_size=768, depth=12, num_heads=12, head_depth=8),
    "M": dict(hidden_size=768, depth=24, num_heads=12, head_depth=8),
    "L": dict(hidden_size=1024, depth=32, num_heads=16, head_depth=8),
    "XL": dict(hidden_size=1024, depth=48, num_heads=16, head_depth=8),
}


def sizes(name):
    """The arguments of DiT that a name stands for. Raises ValueError."""
    size, _, patch_size = name.partition("/")
    if name == "tiny":
        return MODELS[name]
    if size not in ("S", "B", "M", "L", "XL") or patch_size not in map(str, range(1, 65)):
        raise ValueError(f"--model {name}: expected tiny or SIZE/PATCH, SIZE one of S, B, M, L, XL")
    return MODELS[size] | {"patch_size": int(patch_size)}
