"""Our side of bench_train.py: a training step for each line on standard input, a JSON line for each step.

python scripts/bench_step.py --model PATH [--batch 1] [--seq 512] [--rank 16] [--remat names]
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
from real_step import hold, random_batch

from qlora_jax import runtime
from qlora_jax.training.step import gradients, update


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
    held = hold(args.model, rank=args.rank, compute_dtype=args.compute_dtype)
    lora, state, base = held.lora, held.state, held.base
    compiled = None
    rng = np.random.default_rng(0)
    for _ in sys.stdin:
        batch = random_batch(rng, held.config.vocab_size, args.batch, args.seq)
        began = time.perf_counter()
        if compiled is None:
            compiled = gradients.lower(held.graphdef, lora, base, batch, None, remat=args.remat).compile()
            runtime.give_memory_back()
        grads, loss = compiled(lora, base, batch, None)
        lora, state, norm = update(held.optimizer, lora, state, grads)
        nll, _ = jax.device_get((loss.nll, norm))
        record = {"seconds": time.perf_counter() - began, "loss": float(nll) / batch["weights"].sum().item()}
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
