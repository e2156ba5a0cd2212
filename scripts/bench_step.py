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

from qlora_jax import runtime
from qlora_jax.config import LoraArgs, ModelArgs, OptimArgs
from qlora_jax.io.loader import load_model
from qlora_jax.io.source import open_model
from qlora_jax.models.adapt import add_lora
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import partition
from qlora_jax.models.precision import weight_format
from qlora_jax.optim import make_optimizer
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
    source = open_model(args.model)
    held = weight_format(ModelArgs(path=args.model, compute_dtype=args.compute_dtype))
    model = load_model(source, model_config(source.config), held).model
    add_lora(model, LoraArgs(rank=args.rank), jax.random.key(0))
    graphdef, lora, base = partition(model)
    optimizer = make_optimizer(OptimArgs(max_grad_norm=1.0, warmup_ratio=0.0), 1000)
    state = optimizer.init(lora)
    compiled = None
    rng = np.random.default_rng(0)
    for _ in sys.stdin:
        ids = rng.integers(3, model.config.vocab_size, (1, args.batch, args.seq + 1)).astype(np.int32)
        began = time.perf_counter()
        ones = np.ones((1, args.batch, args.seq), np.float32)
        batch = {"inputs": ids[..., :-1], "targets": ids[..., 1:], "weights": ones}
        if compiled is None:
            compiled = gradients.lower(graphdef, lora, base, batch, None, remat=args.remat).compile()
            runtime.give_memory_back()
        grads, loss = compiled(lora, base, batch, None)
        lora, state, norm = update(optimizer, lora, state, grads)
        nll, _ = jax.device_get((loss.nll, norm))
        record = {"seconds": time.perf_counter() - began, "loss": float(nll) / ones.sum().item()}
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
