"""Our worker of bench/train.py: one training step per line on standard input, one line of JSON per step.

python -m scripts.bench.workers.train_step --model PATH [--batch 1] [--seq 512] [--rank 16] [--remat names]
"""

import argparse
import json
import sys
import time

from qlora_jax import allocator

if __name__ == "__main__":
    allocator.tune()  # restarts the process, so it comes before slow imports

import jax
import numpy as np

from qlora_jax import runtime
from qlora_jax.training.step import update
from scripts.bench.support.real_step import LoadedStep, load_step, random_batch


def main() -> None:
    """Loads the model, then takes one step per input line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file or a Hugging Face folder")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--remat", default="names")
    parser.add_argument("--compute_dtype", default="auto")
    parser.add_argument("--quant_type", default="nf4")
    args = parser.parse_args()
    runtime.start()
    shape = (1, args.batch, args.seq)
    settings = {name: getattr(args, name) for name in ("rank", "compute_dtype", "remat", "quant_type")}
    loaded = load_step(args.model, **settings, batch=shape)
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.parts.base))
    rng = np.random.default_rng(0)
    for _ in sys.stdin:
        batch = random_batch(rng, loaded.config.vocab_size, args.batch, args.seq)
        began = time.perf_counter()
        loaded, loss = step(loaded, batch)
        print(json.dumps({"seconds": time.perf_counter() - began, "loss": loss, "base_mib": base / 2**20}), flush=True)


def step(loaded: LoadedStep, batch: dict[str, np.ndarray]) -> tuple[LoadedStep, float]:
    """Takes one optimizer step and returns the new state and the loss; gradients are freed, as in a run."""
    grads, loss = loaded.gradients(loaded.parts, batch, None)
    lora, state, norm = update(loaded.optimizer, loaded.parts.lora, loaded.state, grads)
    total, _ = jax.device_get((loss.total, norm))
    mean = float(total) / batch["weights"].sum().item()
    return loaded._replace(parts=loaded.parts.with_lora(lora), state=state), mean


if __name__ == "__main__":
    main()
