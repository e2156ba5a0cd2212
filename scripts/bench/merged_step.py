"""Compares steps with rounded merged weights (`lora.merge_into`) with plain ones, in pairs.

    python -m scripts.bench.merged_step --model FILE.gguf [--formats q4_0 q4_k_m] [--batches 4x512 1x2048] [--pairs 15]

Prints XLA's count of a step's memory, and the medians over neighbouring pairs of gradients of random tokens: the ratio
of wall times, and that of processor times, which other programs on the machine disturb less. q4_k_m requires the extra
gguf-quantize.
"""

import argparse
import time

import jax
import numpy as np

from scripts.bench.support.interleave import median_ratio, ratio_interval
from scripts.bench.support.real_step import LoadedStep, load_step, random_batch

MIB = 2**20


def seconds(step: LoadedStep, batch: dict[str, np.ndarray]) -> tuple[float, float]:
    """Returns (wall time, processor time) of the gradients of a batch."""
    start = time.perf_counter(), time.process_time()
    jax.block_until_ready(step.gradients(step.parts, batch, None))
    return time.perf_counter() - start[0], time.process_time() - start[1]


def memory(step: LoadedStep) -> int:
    """Returns the bytes of arguments and temporaries."""
    found = step.gradients.compiled(step.gradients.step.batch).memory_analysis()
    assert found is not None
    return found.argument_size_in_bytes + found.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file, whose codes are the frozen base")
    parser.add_argument("--formats", nargs="+", default=["q4_0", "q4_k_m"])
    parser.add_argument("--batches", nargs="+", default=["4x512", "1x2048"], help="rows x tokens")
    parser.add_argument("--remat", default="names")
    parser.add_argument("--pairs", type=int, default=15)
    args = parser.parse_args()
    print(
        "| batch | format | s | of plain | interval | processor time of plain | MiB | of plain |\n" + "|---" * 8 + "|"
    )
    for rows, length in (map(int, batch.split("x")) for batch in args.batches):
        load = {"rank": 16, "compute_dtype": "bfloat16", "batch": (1, rows, length), "remat": args.remat}
        plain, *others = (
            load_step(args.model, quant_type="stored", merge_into=name, **load) for name in (None, *args.formats)
        )
        batch = random_batch(np.random.default_rng(0), plain.config.vocab_size, rows, length)
        for name, step in zip(args.formats, others, strict=True):
            times = [(seconds(step, batch), seconds(plain, batch)) for _ in range(args.pairs + 1)][1:]
            (ours, of_ours), (theirs, of_theirs) = np.moveaxis(np.array(times), 0, -1)
            low, high = ratio_interval(ours / theirs)
            ratio, processor = median_ratio([*ours], [*theirs]), median_ratio([*of_ours], [*of_theirs])
            print(
                f"| {rows} x {length} | {name} | {np.median(ours):.2f} | {ratio:.2f} | [{low:.2f}, {high:.2f}] "
                f"| {processor:.2f} | {memory(step) / MIB:,.0f} | {memory(step) / memory(plain):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
