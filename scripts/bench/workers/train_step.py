"""Our side of bench/train.py: a training step for each line on standard input, a JSON line for each step.

python -m scripts.bench.workers.train_step --model PATH [--batch 1] [--seq 512] [--rank 16] [--remat names]
"""

import argparse
import json
import sys
import time

from qlora_jax import allocator

if __name__ == "__main__":
    allocator.tune()  # starts again: before anything that takes long to import, as the product's commands do

import jax
import numpy as np

from qlora_jax import runtime
from qlora_jax.training.step import update
from scripts.bench.support.real_step import Held, hold, random_batch


def main() -> None:
    """Loads, then steps as long as it is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file or a Hugging Face folder")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--remat", default="names")
    parser.add_argument("--compute-dtype", default="auto")
    args = parser.parse_args()
    runtime.start()
    shape = (1, args.batch, args.seq)
    held = hold(args.model, rank=args.rank, compute_dtype=args.compute_dtype, batch=shape, remat=args.remat)
    rng = np.random.default_rng(0)
    for _ in sys.stdin:
        batch = random_batch(rng, held.config.vocab_size, args.batch, args.seq)
        began = time.perf_counter()
        held, loss = step(held, batch)
        print(json.dumps({"seconds": time.perf_counter() - began, "loss": loss}), flush=True)


def step(held: Held, batch: dict[str, np.ndarray]) -> tuple[Held, float]:
    """One optimizer step; its gradients are freed before the next one, as in a run."""
    grads, loss = held.gradients(held.parts, batch, None)
    lora, state, norm = update(held.optimizer, held.parts.lora, held.state, grads)
    nll, _ = jax.device_get((loss.nll, norm))
    return held._replace(parts=held.parts.with_lora(lora), state=state), float(nll) / batch["weights"].sum().item()


if __name__ == "__main__":
    main()
