"""What a training step adds to a process's memory on a CPU, to set beside its plan.

    python -m scripts.bench.plan_memory --model PATH [--seq 512] [--rank 16] [--remat names]

Resident memory once the step is compiled and no weight has been read is the baseline: Python, jax, and the programs.
Its peak over a few steps, less that, is the growth. Run it twice: with a cold compilation cache the compiler's own
memory counts. The last line is JSON, in bytes; `python -m qlora_jax.plan --card cpu` with the same settings says what
was to be expected.
"""

import argparse
import json
from pathlib import Path

from qlora_jax import allocator

if __name__ == "__main__":
    allocator.tune()  # starts again: before anything that takes long to import, as the product's commands do

import numpy as np

from qlora_jax import runtime
from scripts.bench.support.real_step import hold, random_batch
from scripts.bench.workers.train_step import step

STEPS = 4


def resident(field: str) -> int:
    """A number of bytes in this process's status: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def forget_the_peak() -> None:
    """VmHWM starts again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Measures one setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file or a Hugging Face folder")
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--remat", default="names")
    args = parser.parse_args()
    runtime.start()
    told: dict[str, int] = {}

    def now(name: str) -> None:
        runtime.give_memory_back()
        told[name] = resident("VmRSS")
        told[name + "_file"] = resident("RssFile")

    now("started")
    setting = {"rank": args.rank, "compute_dtype": "auto", "batch": (1, 1, args.seq), "remat": args.remat}
    held = hold(args.model, **setting, compiled=lambda: now("compiled"))
    now("loaded")
    forget_the_peak()
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        held, _ = step(held, random_batch(rng, held.config.vocab_size, 1, args.seq))
    told["peak"] = resident("VmHWM")
    print(json.dumps(told | {"growth": told["peak"] - told["compiled"]}))


if __name__ == "__main__":
    main()
