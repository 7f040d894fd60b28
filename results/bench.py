"""The cost of one training step, beside a literal port of the loss.

    python -m results.bench [MODEL [BATCH [RUNS [KIND ...]]]]         default: B/2 4 3, four kinds

A KIND is `literal` (the loss as one would port it, `literal_loss` in test_imf.py, on nn.Linear) or
`ours`, with options behind it: "ours --grad-checkpoint", "ours --compile", "ours bf16 --compile".
Every run is a process of its own, and the kinds take turns. On CUDA all run in bf16.

Printed is a line per figure and kind: the median of the runs, then its ratio to the first kind in
the same run, as median (lowest to highest). `extra memory` is the peak of a step beyond weights and
gradients; without CUDA it is known on Linux alone. Random weights, latents of 32 x 32 x 4."""

import argparse
import contextlib
import copy
import json
import subprocess
import sys
import time

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import imf
import model
import sample
import train
from test_imf import literal_loss

KINDS = ["literal", "ours", "ours --grad-checkpoint", "ours --compile"]
PEAK = 989e12  # dense bf16 operations a second of an H100 or H200, by its datasheet


def timed(function, seconds):
    """The function, which then appends the time of each call to the list `seconds`."""
    def synchronize():
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def call(*args):
        synchronize()
        start = time.perf_counter()
        result = function(*args)
        synchronize()
        seconds.append(time.perf_counter() - start)
        return result
    return call


def peak_memory(device):
    """The highest memory of this process until now in GiB, or None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform != "linux":
        return None
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def build(kind, name, device):
    """The network with random weights, nowhere zero, and gradients in place."""
    torch.manual_seed(0)
    with device:
        net = model.DiT(32, 4, 1000, **model.MODELS[name])
    for p in net.parameters():
        torch.nn.init.normal_(p, p.mean().item() > 0.5, 0.02)
        p.grad = torch.zeros_like(p)
    net.grad_checkpoint = "--grad-checkpoint" in kind
    if "--compile" in kind:
        net.compile()
    return net


def random_batch(net, batch_size, seed, device, move_draws):
    torch.manual_seed(seed)
    x = torch.randn(batch_size, net.channels, net.image_size, net.image_size)
    y = torch.randint(net.num_classes, (batch_size,))
    draws = imf.draw(x)
    if move_draws:
        draws = imf.Draws(*(values.to(device) for values in draws))
    return x.to(device), y.to(device), draws


def written_attention(q, k, v):
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def become_a_port(device):
    """Replaces what a port would not have: our Linear; on CUDA also the attention of PyTorch,
    which has no second derivative in bf16."""
    model.Linear.forward = torch.nn.Linear.forward
    if device.type == "cuda":
        torch.nn.functional.scaled_dot_product_attention = written_attention


def measure_steps(step, kind, device):
    """Times, memory and arithmetic of step(k), the gradients of batch number k."""
    seconds, found = [], {}
    attention = sdpa_kernel(SDPBackend.MATH) if kind == "literal" else contextlib.nullcontext()
    with attention:
        before = peak_memory(device)
        for k in range(17 if device.type == "cuda" else 4):
            timed(step, seconds)(k)
        if before is not None:
            found["extra memory, GiB"] = peak_memory(device) - before
    found["first step, s"] = seconds[0]
    found["step, s"] = np.median(seconds[2:])  # the second compiles for batches of any size
    if "--compile" not in kind:
        # the fused attention of the CPU is invisible to the counter
        math = contextlib.nullcontext() if device.type == "cuda" else sdpa_kernel(SDPBackend.MATH)
        with FlopCounterMode(display=False) as count, math:
            step(0)
        found["operations"] = count.get_total_flops()
    return found


def measure_stages(net, step, backward, device):
    """The seconds of a step's training pass, guidance and JVP, and of its backward pass, whose
    times step(k) appends to the list `backward`."""
    stages = {"training pass, s": "forward", "guidance, s": "v", "JVP, s": "u"}
    times = {stage: [] for stage in stages}
    for stage, branch in stages.items():
        setattr(net, branch, timed(getattr(net, branch), times[stage]))
    steps = 10 if device.type == "cuda" else 4
    backward.clear()
    for k in range(steps):
        step(k)
    for branch in stages.values():
        delattr(net, branch)

    # of the second half of the steps; guidance calls net.v twice a step
    found = {}
    for stage, seconds in (*times.items(), ("backward pass, s", backward)):
        half = seconds[len(seconds) // 2:]
        found[stage] = sum(half) / (steps // 2)
    return found


def measure_update(net):
    """The seconds of AdamW and of the EMA, best of four."""
    ema, times = copy.deepcopy(net).requires_grad_(False), []
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    for _ in range(4):
        timed(train.update, times)(net, ema, [optimizer], [1e-4], 0.9999)
    optimizer.zero_grad()
    return {"update, s": min(times)}


def measure_sampling(net, device):
    """Images a second in one step, without a VAE, best of five; float32, on CUDA TF32."""
    n, times = 64 if device.type == "cuda" else 8, []
    noise = torch.randn(n, net.channels, net.image_size, net.image_size, device=device)
    y = torch.zeros(n, dtype=torch.long, device=device)
    for _ in range(5):
        timed(imf.sample, times)(net, noise, y, 1, 2.0)
    return {"samples a second": n / min(times)}


def one_run(kind, name, batch_size):
    """All figures of one kind, measured in this process."""
    device, *_ = sample.join()
    net = build(kind, name, device)
    literal = kind == "literal"
    if literal:
        become_a_port(device)
    batches = [random_batch(net, batch_size, seed, device, literal) for seed in range(5)]
    bf16 = device.type == "cuda" or "bf16" in kind
    backward_seconds = []
    backward = timed(torch.Tensor.backward, backward_seconds)

    def step(k):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x, y, draws = batches[k % 5]
            if literal:
                loss = literal_loss(net, x, y, draws)
            else:
                loss, _ = imf.imf_loss(net, x, y, draws)
        backward(loss)

    found = measure_steps(step, kind, device)
    if not literal:
        found |= measure_stages(net, step, backward_seconds, device)
        found |= measure_update(net)
        found |= measure_sampling(net, device)
    return found


def ratio(results, figure, kind, other):
    """The ratio of two kinds in the same run, as text: median (lowest to highest)."""
    pairs = zip(results[kind], results[other])
    ratios = sorted(one[figure] / two[figure] for one, two in pairs)
    return f"{ratios[len(ratios) // 2]:8.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"


def report(results, batch_size):
    """Prints the figures {kind: [figures of a run, ...]}."""
    first = next(iter(results))
    figures = dict.fromkeys(figure for runs in results.values() for figure in runs[0])
    for figure in figures:
        for kind, runs in results.items():
            if figure not in runs[0]:
                continue
            values = sorted(run[figure] for run in runs)
            compared = ratio(results, figure, kind, first) if figure in results[first][0] else ""
            print(f"{figure:18} {kind:24}{values[len(values) // 2]:10.4g} {compared}")
    for kind in results:
        compiled = f"{kind} --compile"
        if compiled in results:
            print(f"{compiled} over {kind}, step:", ratio(results, "step, s", compiled, kind))
    if torch.cuda.is_available() and "ours" in results:
        operations = results["ours"][0]["operations"]  # what is computed twice does not count
        for kind, runs in results.items():
            if "update, s" in runs[0]:
                seconds = runs[0]["step, s"] + runs[0]["update, s"]
                print(f"{kind}: {batch_size / seconds:.1f} images/s, "
                      f"{operations / seconds / PEAK:.1%} of the peak in bf16")


def main():
    parser = sample.command_line(__doc__)
    flag = parser.add_argument
    flag("model", nargs="?", choices=model.MODELS, default="B/2")
    flag("batch_size", nargs="?", type=sample.number(int, 1), default=4, metavar="batch")
    flag("runs", nargs="?", type=sample.number(int, 1), default=3)
    flag("kinds", nargs="*", default=KINDS, metavar="kind")
    flag("--one", action="store_true", help=argparse.SUPPRESS)  # a run, in a process of its own
    args = parser.parse_args()
    for kind in args.kinds:
        if kind.split()[0] not in ("literal", "ours"):
            raise ValueError(f"{kind!r} is none of {KINDS}")
    if args.one:
        print(json.dumps(one_run(args.kinds[0], args.model, args.batch_size)))
        return
    results = {kind: [] for kind in args.kinds}
    for _ in range(args.runs):
        for kind, runs in results.items():
            command = [sys.executable, "-m", "results.bench", args.model, str(args.batch_size),
                       "1", kind, "--one"]
            runs.append(json.loads(subprocess.check_output(command)))
    device, *_ = sample.join()
    print(f"{args.model}, batch {args.batch_size}, {device}, {torch.get_num_threads()} threads; "
          f"median of {args.runs} runs, and over {args.kinds[0]}")
    report(results, args.batch_size)


if __name__ == "__main__":
    sample.run(main)
