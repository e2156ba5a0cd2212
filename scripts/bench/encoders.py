"""Times the encoders of export formats inside jit: python -m scripts.bench.encoders [--names NAME ...]

Prints the best time of each, and the processor time per weight, which other programs on the machine disturb less.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.quant.encoders import ENCODERS

SHAPES = ((576, 1536), (2048, 2048))
REPEATS = 25


def best(name: str, shape: tuple[int, int]) -> tuple[float, float]:
    """Returns (seconds, seconds of the processor) of one encoding."""
    weight = jnp.asarray(np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32))
    encode = jax.jit(ENCODERS[name])
    jax.block_until_ready(encode(weight))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter(), time.process_time()
        jax.block_until_ready(encode(weight))
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return min(wall for wall, _ in times), min(processor for _, processor in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=[*ENCODERS], choices=ENCODERS)
    print("| format | weight | ms | GB/s of f32 | processor ns per weight |\n|---|---|---|---|---|")
    for name in parser.parse_args().names:
        for shape in SHAPES:
            wall, processor = best(name, shape)
            weights = shape[0] * shape[1]
            print(
                f"| {name} | {shape[0]} x {shape[1]} | {wall * 1e3:.2f} | {4 * weights / wall / 1e9:.1f} "
                f"| {processor / weights * 1e9:.2f} |"
            )


if __name__ == "__main__":
    main()
