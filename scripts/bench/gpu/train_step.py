"""Measures a training step of Llama-3-8B's shape on random weights, for run.py.

    python -m scripts.bench.gpu.train_step --remat full [--length 2048] [--trace] [--rehearse]

A separate process makes the peak memory that of the step. Weights are made on the device, so nothing is fetched. Prints
one line of JSON. --trace adds the milliseconds and FLOP of each part of the model, from a trace of one more step. Set
XLA_FLAGS=--xla_gpu_enable_command_buffer= with it: a captured graph of kernels does not tell which operations it runs.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable

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
from scripts.bench.profile.parts import OPTIMIZER, operations_of
from scripts.bench.profile.parts import measure as by_operation
from scripts.bench.profile.train_step import Seconds, part_rows, traced
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


def measure(config: ModelConfig, batch: tuple[int, int, int], remat: str, *, trace: bool) -> Record:
    """Returns seconds of a step (gradients and update), operations, and bytes as compiled and as measured.

    Args:
      trace: also return the parts of one more step, as `parts_of`.
    """
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
    lora, optimizer, loss = parts.lora, step.arrays.optimizer, math.nan
    state = optimizer.init(lora)
    filled = memory("peak_bytes_in_use")
    rows = random_batch(np.random.default_rng(0), config.vocab_size, *batch[1:])

    def one_step() -> Seconds:
        nonlocal lora, state, loss
        began = time.perf_counter()
        grads, losses = compiled(parts.with_lora(lora), rows, None, None)
        lora, state, _ = jax.block_until_ready(update(optimizer, lora, state, grads))
        loss = float(losses.total) / float(losses.count)
        return {"step": time.perf_counter() - began}

    seconds = [one_step()["step"] for _ in range(WARM_UP + STEPS)]
    bytes_seen = {"filled_bytes": filled, "peak_bytes": memory("peak_bytes_in_use")}
    found |= {"step_s": statistics.median(seconds[WARM_UP:]), "loss": loss, **bytes_seen}
    if not trace:
        return found
    texts = {"gradients": compiled.as_text(), OPTIMIZER: update.lower(optimizer, lora, state, lora).compile().as_text()}
    return found | {"parts": parts_of(one_step, {name: text or "" for name, text in texts.items()}, counted)}


def parts_of(step: Callable[[], Seconds], texts: dict[str, str], counted: StepShape) -> list[Record]:
    """Returns the milliseconds and FLOP of each part of a traced step; the last is the time in which nothing ran."""
    took, events = traced(step)
    rows = by_operation([events], {name: operations_of(text) for name, text in texts.items()})
    lines = part_rows(rows, counted, 1e3 * took["step"])
    return [{"part": line["part"], "ms": line["ms"], "flop": sum(line["flop"].values())} for line in lines]


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
    parser.add_argument("--trace", action="store_true", help="also measure the parts of a step")
    parser.add_argument("--rehearse", action="store_true", help="use a tiny model")
    args = parser.parse_args()
    runtime.start()
    if not args.rehearse and jax.default_backend() != "gpu":
        raise SystemExit(
            f"bench.gpu.train_step: no GPU (jax uses {jax.default_backend()}). Use one, or pass --rehearse."
        )
    print(json.dumps(measure(*setting(args.length, args.rehearse), args.remat, trace=args.trace)))


if __name__ == "__main__":
    main()
