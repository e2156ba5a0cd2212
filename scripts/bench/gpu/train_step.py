"""Measures a training step of Llama-3-8B's shape on random weights, for run.py.

    python -m scripts.bench.gpu.train_step --remat full [--length 2048] [--rehearse]

A separate process makes the peak memory that of the step. Weights are made on the device, so nothing is fetched. Prints
one line of JSON.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time

import jax
import numpy as np

from pallas_kernels.aot.memory import read_memory
from pallas_kernels.synthetic_weights import synthetic_like
from qlora_jax import runtime
from qlora_jax.config import LoraArgs
from qlora_jax.models.catalog import PUBLISHED
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.remat import REMAT_POLICIES
from qlora_jax.training.cost import flops, memory_use
from qlora_jax.training.cost.step_shape import StepShape
from qlora_jax.training.step import update
from qlora_jax.training.step_spec import StepSpec
from scripts.bench.gpu.matmuls import Record
from scripts.bench.support.real_step import random_batch

MODEL = "llama-3-8b"
TINY = {"num_layers": 2, "embed_dim": 256, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 256, "vocab_size": 512}
WARM_UP, STEPS = 2, 7


def setting(length: int, rehearse: bool) -> tuple[ModelConfig, tuple[int, int, int]]:
    """Returns the model's config and the batch shape (A, B, T)."""
    config = model_config(PUBLISHED[MODEL])
    if rehearse:
        return dataclasses.replace(config, **TINY), (1, 1, 64)
    return config, (1, 1, length)


def measure(config: ModelConfig, batch: tuple[int, int, int], remat: str) -> Record:
    """Returns seconds of a step (gradients and update), operations, and bytes as compiled and as measured."""
    weights = WeightFormat(platform="gpu")
    step = StepSpec(model=config, weights=weights, lora=LoraArgs(), batch=batch, remat=remat)
    program = step.gradients()
    compiled = program.function.lower(*program.args, **program.kwargs).compile()
    planned = read_memory(compiled.memory_analysis()).device_total
    counted = StepShape(model=config, weights=weights, lora=LoraArgs(), batch=batch, remat=remat)
    planned += memory_use.optimizer_bytes(counted)
    found = {"tokens": math.prod(batch), "flops": operations(counted), "planned_bytes": planned}
    limit = memory("bytes_limit")
    if limit is not None and planned > limit:
        return found | {"failure": f"needs {planned} bytes (available: {limit})"}
    parts = synthetic_like(step.arrays.parts)
    lora = parts.lora
    state = step.arrays.optimizer.init(lora)
    filled = memory("peak_bytes_in_use")
    rows = random_batch(np.random.default_rng(0), config.vocab_size, *batch[1:])
    seconds, loss = [], math.nan
    for _ in range(WARM_UP + STEPS):
        began = time.perf_counter()
        grads, losses = compiled(parts.with_lora(lora), rows, None)
        lora, state, _ = jax.block_until_ready(update(step.arrays.optimizer, lora, state, grads))
        seconds.append(time.perf_counter() - began)
        loss = float(losses.total) / float(losses.count)
    bytes_seen = {"filled_bytes": filled, "peak_bytes": memory("peak_bytes_in_use")}
    return found | {"step_s": statistics.median(seconds[WARM_UP:]), "loss": loss, **bytes_seen}


def operations(counted: StepShape) -> dict[str, int]:
    """Returns the operations of a step: those of the model, and recomputation."""
    parts = flops.flops(counted)
    again = sum(count for name, count in parts.items() if name.endswith("again"))
    return {"model": sum(parts.values()) - again, "again": again}


def memory(statistic: str) -> int | None:
    """Returns a statistic of the device's allocator; None if it has none (a CPU)."""
    return (jax.local_devices()[0].memory_stats() or {}).get(statistic)


def main() -> None:
    """Measures one remat policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--remat", choices=REMAT_POLICIES, required=True)
    parser.add_argument("--length", type=int, default=2048, help="tokens")
    parser.add_argument("--rehearse", action="store_true", help="use a tiny model")
    args = parser.parse_args()
    runtime.start()
    if not args.rehearse and jax.default_backend() != "gpu":
        raise SystemExit(
            f"bench.gpu.train_step: no GPU (jax uses {jax.default_backend()}). Use one, or pass --rehearse."
        )
    print(json.dumps(measure(*setting(args.length, args.rehearse), args.remat)))


if __name__ == "__main__":
    main()
