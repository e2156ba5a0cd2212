"""Measures how much memory a training step adds to a process on a CPU, to compare with its memory plan.

    python -m scripts.bench.plan_memory --model PATH [--seq 512] [--rank 16] [--remat names]

The baseline is resident memory after compiling the step, before any weight is read: Python, jax, and the programs. The
growth is the peak over a few steps minus the baseline. Run it twice: with a cold compilation cache, the compiler's
memory counts too. The last line is JSON, in bytes. `qlora-jax plan --card cpu` with the same settings prints the plan.
"""

import argparse
import json
from pathlib import Path

from qlora_jax import allocator

if __name__ == "__main__":
    allocator.tune()  # restarts the process, so it comes before slow imports

import numpy as np

from qlora_jax import runtime
from scripts.bench.support.progress import phases
from scripts.bench.support.real_step import load_step, random_batch
from scripts.bench.workers.train_step import step

STEPS = 4


def resident(field: str) -> int:
    """Returns a field of this process's status in bytes: VmRSS is the memory now, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def reset_peak() -> None:
    """Resets VmHWM to the memory that is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Measures one configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file or a Hugging Face folder")
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--remat", default="names")
    args = parser.parse_args()
    runtime.start()
    measured: dict[str, int] = {}

    def record(name: str) -> None:
        runtime.give_memory_back()
        measured[name] = resident("VmRSS")
        measured[name + "_file"] = resident("RssFile")

    record("started")
    setting = {"rank": args.rank, "compute_dtype": "auto", "batch": (1, 1, args.seq), "remat": args.remat}
    loaded = load_step(args.model, **setting, compiled=lambda: record("compiled"))
    record("loaded")
    reset_peak()
    rng = np.random.default_rng(0)
    for _ in phases("step", range(STEPS)):
        loaded, _ = step(loaded, random_batch(rng, loaded.config.vocab_size, 1, args.seq))
    measured["peak"] = resident("VmHWM")
    print(json.dumps(measured | {"growth": measured["peak"] - measured["compiled"]}))


if __name__ == "__main__":
    main()
