"""The time of one update of the blocks' matrices of `tiny`: our Muon beside torch's own.

    python -m results.muon
    ONEDNN_MAX_CPU_ISA=AVX2 python -m results.muon      as on a CPU without bfloat16 instructions

Printed is the median of 20 updates each, which take turns (lowest to highest)."""

import statistics
import time
import types

import torch

import model
import sample
import train


def main():
    net = model.DiT(32, 1, 10, **model.MODELS["tiny"])
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    ours = train.make_optimizers(net, types.SimpleNamespace(lr=0.01, muon_lr=0.05))["muon"]
    matrices = ours.param_groups[0]["params"]
    optimizers = {"ours": ours, "torch": torch.optim.Muon(matrices, lr=0.05, weight_decay=0.0)}
    times = {name: [] for name in optimizers}
    for _ in range(21):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            times[name].append(1000 * (time.perf_counter() - start))
    for name, values in times.items():
        values = values[1:]  # the first one allocates
        print(f"{name}: {statistics.median(values):.1f} ms for {len(matrices)} matrices "
              f"({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    sample.run(main)
