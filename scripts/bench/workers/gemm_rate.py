"""Measures the rate of matrix products on this machine, the upper bound of training speed.

    python scripts/bench/workers/gemm_rate.py --library jax --dtype bfloat16      # or torch, in the oracle's Python

For each line on standard input it times each shape several times, and prints one line of JSON with the best rates in
GFLOP/s. It runs in both Python environments, so it imports nothing of the project.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable

# (M, K, N) of [M, K] x [K, N]: a large square, and products of SmolLM2 and Qwen2-0.5B with 512 tokens.
SHAPES = ((2048, 2048, 2048), (512, 576, 1536), (512, 1536, 576), (512, 896, 4864), (512, 4864, 896))
REPEATS = 7
Product = Callable[[], object]


def jax_product(m: int, k: int, n: int, dtype: str) -> Product:
    """Returns a blocking product of constant operands."""
    import jax
    import jax.numpy as jnp

    a, b = jnp.full((m, k), 0.5, dtype), jnp.full((k, n), 0.25, dtype)
    product = jax.jit(jnp.matmul)
    return lambda: product(a, b).block_until_ready()


def torch_product(m: int, k: int, n: int, dtype: str) -> Product:
    """Returns the same product in torch."""
    import torch  # pyright: ignore[reportMissingImports]

    a, b = (torch.full(size, 0.5, dtype=getattr(torch, dtype)) for size in ((m, k), (k, n)))
    return lambda: a @ b


LIBRARIES = {"jax": jax_product, "torch": torch_product}


def seconds(product: Product) -> float:
    """Returns the seconds of one product."""
    began = time.perf_counter()
    product()
    return time.perf_counter() - began


def main() -> None:
    """Measures once per input line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), required=True)
    args = parser.parse_args()
    products = {shape: LIBRARIES[args.library](*shape, args.dtype) for shape in SHAPES}
    for product in products.values():
        product()  # compiles or selects a kernel
    for _ in sys.stdin:
        best = {shape: min(seconds(product) for _ in range(REPEATS)) for shape, product in products.items()}
        rates = {"x".join(map(str, (m, k, n))): 2e-9 * m * k * n / best[m, k, n] for m, k, n in SHAPES}
        print(json.dumps({"gflops": max(rates.values()), "by_shape": rates}), flush=True)


if __name__ == "__main__":
    main()
