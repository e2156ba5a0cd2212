"""Compares a training step on a mesh of one device with the step without a mesh, in one process, in turns.

    python -m scripts.bench.mesh_step [--model FILE] [--length 256] [--pairs 40]

Both compute the gradients of one micro-batch with the same parts. Prints the median seconds of each, and the median
ratio of neighbouring calls with its 95 % interval by bootstrap.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Literal

from qlora_jax import allocator

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    allocator.tune()  # restarts the process, so it comes before slow imports

import jax
import numpy as np

from qlora_jax.models.partition import place_parts
from qlora_jax.sharding import make_mesh
from qlora_jax.training.device_mesh import place_batch
from qlora_jax.training.step import gradients
from scripts.bench.support.interleave import ratio_interval
from scripts.bench.support.progress import phases
from scripts.bench.support.real_step import load_step, random_batch
from scripts.fetch_smollm2 import fetch_smollm2


def calls(path: str, length: int, compute_dtype: Literal["bfloat16", "float32"]) -> list[Callable[[], object]]:
    """Returns one call of the step without a mesh, and one on a mesh of one device."""
    loaded = load_step(path, rank=16, compute_dtype=compute_dtype, batch=(1, 1, length), remat="names")
    batch = random_batch(np.random.default_rng(0), loaded.config.vocab_size, 1, length)
    mesh = make_mesh(1, 1)
    placed, rows = place_parts(loaded.parts, mesh), place_batch(batch, mesh)
    return [
        functools.partial(gradients, loaded.parts, batch, None, remat="names"),
        functools.partial(gradients, placed, rows, None, remat="names", mesh=mesh),
    ]


def seconds(call: Callable[[], object]) -> float:
    """Returns the seconds of one call, with its results computed."""
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started


def main() -> None:
    """Measures and prints one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct, fetched")
    parser.add_argument("--length", type=int, default=256, help="tokens of the one row")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--compute_dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args()
    without, with_mesh = calls(args.model or str(fetch_smollm2()), args.length, args.compute_dtype)
    for call in (without, with_mesh) * 2:  # compiles, then warms up
        seconds(call)
    times: dict[Callable[[], object], list[float]] = {without: [], with_mesh: []}
    for pair in phases("pair", range(args.pairs)):
        for call in (without, with_mesh) if pair % 2 else (with_mesh, without):
            times[call].append(seconds(call))
    ratios = [b / a for a, b in zip(times[without], times[with_mesh], strict=True)]
    low, high = ratio_interval(ratios)
    medians = [statistics.median(times[call]) for call in (without, with_mesh)]
    print(f"no mesh {medians[0]:.4f} s, mesh of one device {medians[1]:.4f} s")
    print(f"ratio {statistics.median(ratios):.4f} [{low:.4f}, {high:.4f}] over {args.pairs} pairs")


if __name__ == "__main__":
    main()
