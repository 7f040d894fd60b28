"""How long the data keep a training waiting.

    python -m results.loading [--files N] [--seconds S ...]            default: 20000; 0.3 1.4

First a folder of N small pictures (16 x 16, ten classes, made in a temporary folder): the time until
its data are there, when they must be decoded and when they are in the cache. Then a batch of 1,024
latents from 20,000 in memory: the time to make it on one thread, and how long a consumer that only
sleeps S seconds a step waits for the next one, which is made meanwhile (median and highest of 12)."""

import argparse
import statistics
import tempfile
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import sample
import train


def timed(function, *args):
    """(seconds, result) of a call."""
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def write_pictures(folder, n):
    images = np.random.default_rng(0).integers(256, size=(100, 16, 16, 3), dtype=np.uint8)
    for c in range(10):
        Path(folder, str(c)).mkdir(parents=True)
    for i in range(n):
        Image.fromarray(images[i % 100]).save(Path(folder, str(i % 10), f"{i}.png"))


def measure_folder(n):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "pictures")
        write_pictures(folder, n)
        args = types.SimpleNamespace(data=str(folder), cache=None, image_size=16, flip=False,
                                     vae="none")
        for start in ("decoded", "from the cache"):
            seconds, _ = timed(train.folder_data, args)
            print(f"{n} pictures, {start}: {seconds:.2f} s")


def measure_batches(pauses, n=20_000, batch_size=1024):
    latents = torch.rand(n, 8, 32, 32).half()
    labels = np.arange(n) % 1000
    args = types.SimpleNamespace(batch_size=batch_size, accum=1, seed=0, t_mean=-0.4, t_std=1.0)
    torch.set_num_threads(1)
    make = [timed(train.own_parts, latents, labels, args, 0, 1, k)[0] for k in range(12)]
    print(f"a batch of {batch_size} latents: {statistics.median(make):.3f} s "
          f"({min(make):.3f} to {max(make):.3f})")
    for pause in pauses:
        waits = []
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(train.own_parts, latents, labels, args, 0, 1, 0)
            for k in range(1, 13):
                time.sleep(pause)
                seconds, _ = timed(ahead.result)
                waits.append(1000 * seconds)
                ahead = pool.submit(train.own_parts, latents, labels, args, 0, 1, k)
        print(f"waiting for it in a step of {pause} s: {statistics.median(waits):.2f} ms, "
              f"at most {max(waits):.2f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=sample.COUNT, default=20_000)
    parser.add_argument("--seconds", type=sample.number(float, 0), nargs="*", default=[0.3, 1.4])
    args = parser.parse_args()
    measure_folder(args.files)
    measure_batches(args.seconds)


if __name__ == "__main__":
    sample.run(main)
