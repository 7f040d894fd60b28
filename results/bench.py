"""The cost of one training step, beside a literal port of the loss.

    python -m results.bench [MODEL [BATCH [RUNS [KIND ...]]]]         default: B/2 4 3, three kinds

A KIND is `literal` (the loss as one would port it, `literal_loss`, on nn.Linear) or
`ours`, with options behind it: "ours --compile", "ours bf16", "ours bf16 --compile". Every run is a
process of its own, and the kinds take turns. On CUDA all run in bf16.

Printed is a line per figure and kind: the median of the runs, then its ratio to the first kind in
the same run, as median (lowest to highest). `extra memory` is the peak of a step beyond weights and
gradients; without CUDA it is known on Linux alone. Random weights, latents of 32 x 32 x 4."""

import argparse, contextlib, copy, json, subprocess, sys, time

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import imf, model, sample, train

KINDS = "literal", "ours", "ours --compile", "ours bf16", "ours bf16 --compile"
PEAK = 989e12  # dense bf16 operations a second of an H100 or H200, by its datasheet


def literal_loss(net, x, y, draws, tangent="v-head", norm_eps=0.01):
    """The definition, as one would port it: three evaluations of the whole network for the
    guided target, then a JVP of the whole network over the whole batch that carries gradients."""
    e, t, r, omega, t_min, t_max, drop = draws
    zero, one, null = torch.zeros_like(t), torch.ones_like(t), torch.full_like(y, net.num_classes)
    z = (1 - imf.column(t)) * x + imf.column(t) * e
    with torch.no_grad():
        inside = torch.where((t_min <= t) & (t <= t_max), omega, 1)
        pair = net(torch.cat((z, z)), t.repeat(2), zero.repeat(2), torch.cat((omega, one)),
                   zero.repeat(2), one.repeat(2), torch.cat((y, null)))[1]
        v_u = pair[len(x):]
        u_at_r_equal_t, v_c = net(z, t, zero, inside, zero, one, y)
        target = e - x if net.predict == "u" else (z - x) / imf.column(t.clamp(min=0.05))
        v_g = target + imf.column(1 - 1 / inside) * (v_c - v_u)
    y = torch.where(drop, null, y)
    v_g = torch.where(imf.column(drop), target, v_g)
    dz = {"v-head": v_c, "boundary": u_at_r_equal_t, "conditional": v_g}[tangent]
    u, du_dt, v = torch.func.jvp(
        lambda z, t, r: net(z, t, t - r, omega, t_min, t_max, y), (z, t, r), (dz, one, zero),
        has_aux=True)
    V = u + imf.column(t - r) * du_dt.detach()
    s_u, s_v = ((p - v_g).square().sum((1, 2, 3)) for p in (V, v))
    return (s_u / (s_u + norm_eps).detach() + s_v / (s_v + norm_eps).detach()).mean()


def timed(function, calls):
    """The seconds of each of so many calls of function(k), k = 0, 1, ..."""
    times = []
    for k in range(calls):
        start = time.perf_counter()
        function(k)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


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
    with device:
        net = model.DiT(32, 4, 1000, **model.sizes(name))
    for p in net.parameters():
        torch.nn.init.normal_(p, p.mean().item() > 0.5, 0.02)
        p.grad = torch.zeros_like(p)
    if "--compile" in kind:
        net.compile_blocks()
    return net


def random_batch(net, batch_size, device):
    x = torch.randn(batch_size, net.channels, net.image_size, net.image_size, device=device)
    return x, torch.randint(net.num_classes, (batch_size,), device=device), imf.draw(x)


def written_attention(q, k, v):
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def become_a_port(device):
    """Takes our Linear away; on CUDA also PyTorch's attention: it has no second derivative."""
    model.Linear.forward = torch.nn.Linear.forward
    if device.type == "cuda":
        torch.nn.functional.scaled_dot_product_attention = written_attention


def measure_steps(step, kind, device):
    """Times, memory and arithmetic of step(k), the gradients of batch number k."""
    found = {}
    plain = sdpa_kernel(SDPBackend.MATH)  # the fused attention of the CPU is not counted
    with plain if kind == "literal" else contextlib.nullcontext():
        before = peak_memory(device)
        times = timed(step, 16 if device.type == "cuda" else 4)
        if before is not None:
            found["extra memory, GiB"] = peak_memory(device) - before
    found |= {"first step, s": times[0], "step, s": np.median(times[1:])}
    if "--compile" not in kind:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            step(0)
        found["operations"] = counter.get_total_flops()
    return found


def measure_the_rest(net, device):
    """The seconds of AdamW and the EMA; images a second in one step, without a VAE. Best of 4."""
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    noise, y, _ = random_batch(net, 64 if device.type == "cuda" else 8, device)

    def update(k):
        optimizer.step()
        train.update_ema(ema, net, 0.9999)

    return {"update, s": min(timed(update, 4)),
            "samples a second": len(y) / min(timed(lambda k: imf.sample(net, noise, y), 4))}


def one_run(kind, args):
    """All figures of one kind, measured in this process."""
    device, *_ = sample.join(args.device)
    literal, bf16 = kind == "literal", device.type == "cuda" or "bf16" in kind
    torch.manual_seed(args.seed)
    net = build(kind, args.model, device)
    if literal:
        become_a_port(device)
    batches = [random_batch(net, args.batch_size, device) for _ in range(5)]

    def step(k):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            batch = net, *batches[k % 5]
            loss = literal_loss(*batch) if literal else imf.imf_loss(*batch)[0]
        loss.backward()

    found = measure_steps(step, kind, device)
    return found if literal else found | measure_the_rest(net, device)


def report(results, args):
    """Prints the figures {kind: [figures of a run, ...]}."""
    first, *_ = results.values()
    for figure in dict.fromkeys(figure for runs in results.values() for figure in runs[0]):
        for kind, runs in results.items():
            if figure in runs[0]:
                line = f"{figure:18} {kind:20}{np.median([run[figure] for run in runs]):10.4g}"
                if figure in first[0]:
                    ratios = [run[figure] / other[figure] for run, other in zip(runs, first)]
                    line += f"{np.median(ratios):9.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
                print(line)
    if args.device == "cuda" and "ours" in results:
        operations = results["ours"][0]["operations"]
        for kind, runs in results.items():
            whole = np.median([run["step, s"] + run.get("update, s", 0) for run in runs])
            print(f"{kind}: {args.batch_size / whole:.1f} images/s, "
                  f"{operations / whole / PEAK:.1%} of the peak in bf16")


def main():
    parser = sample.command_line(__doc__)
    flag = parser.add_argument
    flag("model", nargs="?", default="B/2")
    flag("batch_size", nargs="?", type=sample.count, default=4, metavar="batch")
    flag("runs", nargs="?", type=sample.count, default=3)
    flag("kinds", nargs="*", default=KINDS[:3], metavar="kind")
    flag("--seed", type=int, default=0)
    flag("--one", action="store_true", help=argparse.SUPPRESS)  # a run, in a process of its own
    args = parser.parse_args()
    model.sizes(args.model)  # refuses a wrong name at once
    for kind in args.kinds:
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")
    if args.one:
        print(json.dumps(one_run(args.kinds[0], args)))
        return
    results = {kind: [] for kind in args.kinds}
    for _ in range(args.runs):
        for kind, runs in results.items():
            command = [sys.executable, "-m", "results.bench", args.model, str(args.batch_size),
                       "1", kind, "--one", "--device", args.device, "--seed", str(args.seed)]
            runs.append(json.loads(subprocess.check_output(command)))
    print(f"{args.model}, batch {args.batch_size}, {args.device}, {torch.get_num_threads()} "
          f"threads; median of {args.runs} runs, and over {args.kinds[0]}")
    report(results, args)


if __name__ == "__main__":
    sample.run(main)
