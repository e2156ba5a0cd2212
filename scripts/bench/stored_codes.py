"""Compares training on a GGUF file's own codes with training on the same file quantized to NF4.

    python -m scripts.bench.stored_codes [--model FILE] [--batch 1] [--seq 512] [--blocks 6] [--steps 4]

Two processes take turns of a block of steps: LoRA of rank 16 on all linear layers, rows of random tokens, the file's
codes (`stored`) and NF4 with double quantization. The ratio is that of seconds per step, over neighbouring blocks, with
a 95 % interval by bootstrap over blocks. Memory is the peak of each process, and the bytes of the frozen base.
"""

import argparse
import sys

from scripts.bench.support.environment import compilation_caches
from scripts.bench.support.interleave import Turns, WorkerGroup, block_medians, median_of, ratio_interval
from scripts.fetch_smollm2 import fetch_smollm2

WORKER = [sys.executable, "-m", "scripts.bench.workers.train_step"]
QUANT_TYPES = ("stored", "nf4")


def measure(model: str, batch: int, seq: int, blocks: int, steps: int) -> dict[str, Turns]:
    """Returns the turns of both processes.

    Raises:
      RuntimeError: a process failed.
    """
    arguments = ["--model", model, "--batch", str(batch), "--seq", str(seq), "--quant_type"]
    with compilation_caches(keep=True) as environment, WorkerGroup(environment) as workers:
        for quant_type in QUANT_TYPES:
            workers.start(quant_type, [*WORKER, *arguments, quant_type], steps)
        turns = workers.run(blocks)
        if workers.failures:
            raise RuntimeError("; ".join(f"{name}: {failure}" for name, failure in workers.failures.items()))
    return turns


def report(turns: dict[str, Turns]) -> str:
    """Returns a line per process, and the ratio."""
    lines = [
        f"{name:<8}{median_of(each, 'seconds'):>8.3f} s per step, base {median_of(each, 'base_mib'):,.0f} MiB, "
        f"peak {median_of(each, 'peak_rss_mib'):,.0f} MiB, loss {each[-1][-1]['loss']:.4f}"
        for name, each in turns.items()
    ]
    stored, nf4 = (block_medians(turns[name], "seconds") for name in QUANT_TYPES)
    ratios = [a / b for a, b in zip(stored, nf4, strict=True)]
    low, high = ratio_interval(ratios)
    return "\n".join([*lines, f"seconds, stored / nf4: {sorted(ratios)[len(ratios) // 2]:.3f} [{low:.3f}, {high:.3f}]"])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a GGUF file (default: SmolLM2-135M-Instruct in Q4_1)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4, help="steps per turn that count")
    args = parser.parse_args()
    print(report(measure(args.model or str(fetch_smollm2()), args.batch, args.seq, args.blocks, args.steps)))


if __name__ == "__main__":
    main()
