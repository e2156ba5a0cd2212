"""Compares products with 4-bit weights on a CPU: fused in C++, and XLA's of a dequantized weight.

    python -m scripts.bench.frozen_product [--dtypes float32 bfloat16] [--rows 512 2048] [--pairs 15]

The weights are those of SmolLM2-135M, random, in NF4 with double quantization. Both ways take turns in one process,
forward and backward. A rate counts 2 M N K operations; the ratio is the median over neighbouring products, with its
95 % interval. XLA_FLAGS=--xla_cpu_max_isa=AVX2 hides AVX-512 from the loops, but not from the library that multiplies
bfloat16 matrices in XLA.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from pallas_kernels.dense_matmul import dot
from pallas_kernels.formats.layouts import repack
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.native.library import problem, variant
from pallas_kernels.nf4_matmul import cpu
from qlora_jax.quant import quantize_numpy
from scripts.bench.support.interleave import ratio_interval

SHAPES = [(576, 576), (1536, 576), (576, 1536)]  # N, K


def ways(weights: QTensor, backward: bool) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Returns y = x w^T, or x = y w, computed in both ways."""

    def dequantized(a: jax.Array) -> jax.Array:
        return dot(a, cpu.dequantize_layer(weights, None, a.dtype), (1, 0 if backward else 1), a.dtype)

    fused = functools.partial(cpu.backward if backward else cpu.forward, weights=weights, layer=None)
    return {"fused": jax.jit(fused), "XLA": jax.jit(dequantized)}


def measure(functions: dict[str, Callable], a: jax.Array, pairs: int) -> dict[str, list[float]]:
    """Returns seconds of each function, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(pairs + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            jax.block_until_ready(function(a))
            if turn:  # the first turn compiles
                seconds[name].append(time.perf_counter() - began)
    return seconds


def main() -> None:
    """Prints a line per dtype, number of rows, shape and direction."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--pairs", type=int, default=15)
    args = parser.parse_args()
    if reason := problem():
        raise SystemExit(f"C++ loops: {reason}")
    print(f"loops: {variant()}")
    for dtype in args.dtypes:
        for rows in args.rows:
            for shape in SHAPES:
                for backward in (False, True):
                    report(dtype, rows, shape, backward, args.pairs)


def report(dtype: str, rows: int, shape: tuple[int, int], backward: bool, pairs: int) -> None:
    """Measures one product and prints its rates and their ratio."""
    n, k = shape
    rng = np.random.default_rng(0)
    weights = jax.tree.map(
        jax.numpy.asarray, repack(quantize_numpy(rng.standard_normal(shape, np.float32)), "row_planar")
    )
    a = jax.numpy.asarray(rng.standard_normal((rows, n if backward else k)), dtype)
    seconds = measure(ways(weights, backward), a, pairs)
    rates = {name: 2e-9 * rows * n * k / statistics.median(taken) for name, taken in seconds.items()}
    ratios = [xla / fused for xla, fused in zip(seconds["XLA"], seconds["fused"], strict=True)]
    middle, (low, high) = statistics.median(ratios), ratio_interval(ratios)
    name = f"{dtype} {rows} rows, {n} x {k}, {'dx' if backward else 'y'}"
    print(f"{name}: fused {rates['fused']:.0f}, XLA {rates['XLA']:.0f} GFLOP/s, {middle:.2f}x [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main()
