"""Our worker of bench/classification.py: one step, or the scoring after a run's last one, per line on standard input.

python -m scripts.bench.workers.classification --job FILE [--compute_dtype auto]
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from qlora_jax import allocator

if __name__ == "__main__":
    allocator.tune()  # restarts the process, so it comes before slow imports

import jax
import numpy as np

from qlora_jax import runtime
from qlora_jax.config import OptimArgs
from qlora_jax.evaluation.heads.rows import sequence_outputs
from qlora_jax.models.partition import ModelParts
from qlora_jax.objectives.classification import Classification
from qlora_jax.optim import make_optimizer
from qlora_jax.training.step import gradients, update
from scripts.bench.support.classification_job import HEAD, load_base, read_batches, with_new_head
from scripts.bench.support.interleave import Record


def main() -> None:
    """Loads the model, then works once per input line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, required=True, help="a file of support/classification_job.py")
    parser.add_argument("--compute_dtype", default="auto")
    args = parser.parse_args()
    runtime.start()
    job = json.loads(args.job.read_text())
    _, base = load_base(job["model"], args.compute_dtype)
    for _, record in zip(sys.stdin, works(job, base), strict=False):
        print(json.dumps(record), flush=True)


def works(job: Record, base: ModelParts) -> Iterator[Record]:
    """Yields the record of each step of each run, and after its last step the outputs for the held-out texts."""
    optimizer = make_optimizer(OptimArgs(**job["optim"]), len(job["rates"]))
    objective = Classification(head=HEAD.spec())
    held_out = [np.array(ids, np.int32) for ids in job["held_out"]]
    for run in job["runs"]:
        parts = with_new_head(base, run["seed"])
        lora, state = parts.lora, optimizer.init(parts.lora)
        for batch in read_batches(run["batches"]):
            began = time.perf_counter()
            grads, loss = gradients(parts.with_lora(lora), batch, None, remat="names", objective=objective)
            lora, state, norm = update(optimizer, lora, state, grads)
            total, count, _ = jax.device_get((loss.total, loss.count, norm))
            yield {"seconds": time.perf_counter() - began, "loss": float(total / count)}
        began = time.perf_counter()
        outputs = sequence_outputs(parts.with_lora(lora), held_out)
        yield {"seconds": time.perf_counter() - began, "outputs": outputs.tolist()}


if __name__ == "__main__":
    main()
