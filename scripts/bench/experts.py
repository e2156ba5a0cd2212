"""Compares a training step of a mixture of experts with that of a dense model of equal active parameters.

    python -m scripts.bench.experts [--experts 8] [--per_token 2] [--layers 30] [--rows 4] [--length 512] [--pairs 9]

Both models have SmolLM2-135M's widths and vocabulary, random NF4 weights, and LoRA of rank 16 on attention; the dense
model's MLP is as wide as the experts that a token uses together. Steps (the gradients of one batch) take turns in one
process, in the order mixture, dense, then dense, mixture. The speed is the median of dense seconds over mixture
seconds, with its 95 % interval. Next to it are the bytes of each compiled program: weights and other arguments, and
temporaries, which include one dequantized expert.
"""

import argparse
import json
import os
import statistics
import time
from typing import Literal

from qlora_jax import allocator

if __name__ == "__main__":
    allocator.tune()  # restarts the process, so it comes before slow imports

import jax
import numpy as np

from pallas_kernels.aot.memory import read_memory
from pallas_kernels.synthetic_weights import synthetic_like
from qlora_jax import runtime
from qlora_jax.config import LoraArgs, ModelArgs
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelParts
from qlora_jax.models.precision import weight_format
from qlora_jax.objectives.router_losses import FILLED
from qlora_jax.training.compiled_programs import CompiledGradients
from qlora_jax.training.step_spec import StepSpec
from scripts.bench.support.interleave import Record, ratio_interval
from scripts.bench.support.progress import phase, phases
from scripts.bench.support.real_step import random_batch

WIDTHS = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
MLP = 1536
MIB = 2**20
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def configs(experts: int, per_token: int, layers: int) -> dict[str, ModelConfig]:
    """Returns the mixture, and the dense model with as many parameters as one token uses."""
    common = WIDTHS | {"num_hidden_layers": layers}
    mixture = {"model_type": "mixtral", "num_local_experts": experts, "num_experts_per_tok": per_token}
    return {
        "mixture": model_config(common | mixture | {"intermediate_size": MLP}),
        "dense": model_config(common | {"model_type": "llama", "intermediate_size": per_token * MLP}),
    }


class Model:
    """A model with random weights, and its compiled gradients."""

    def __init__(self, config: ModelConfig, batch: tuple[int, int, int], dtype: Literal["auto", "bfloat16", "float32"]):
        phase("compiling a model")
        weights = weight_format(ModelArgs(path="", compute_dtype=dtype), config)
        adapters = LoraArgs(rank=16, target_modules=ATTENTION)
        step = StepSpec(model=config, weights=weights, lora=adapters, batch=batch, remat="names")
        self.gradients = CompiledGradients(step)
        self.memory = read_memory(self.gradients.compiled(batch).memory_analysis()).device
        self.parts: ModelParts = synthetic_like(step.arrays.parts)
        accumulated, rows, length = batch
        filled = np.full((accumulated, rows, 1), length, np.int32)  # rows of a mixture say which positions count
        self.extra = {FILLED: filled} if config.experts else {}
        self.seconds: list[float] = []

    def run(self, batch: dict[str, np.ndarray]) -> None:
        """Computes the gradients of a batch."""
        began = time.perf_counter()
        jax.block_until_ready(self.gradients(self.parts, batch | self.extra, None))
        self.seconds.append(time.perf_counter() - began)


def measure(models: dict[str, Model], batches: list[dict[str, np.ndarray]]) -> Record:
    """Returns the figures of interleaved steps, one per batch; the first of each model is not counted."""
    names = list(models)
    for number in phases("pair", range(len(batches))):
        for name in names if number % 2 else names[::-1]:
            models[name].run(batches[number])
    seconds = {name: model.seconds[1:] for name, model in models.items()}
    ratios = [dense / mixture for mixture, dense in zip(seconds["mixture"], seconds["dense"], strict=True)]
    found: Record = {"speed": statistics.median(ratios), "interval": ratio_interval(ratios)}
    for name, model in models.items():
        found[name] = {
            "step_s": statistics.median(seconds[name]),
            "arguments_mib": model.memory.arguments / MIB,
            "temporaries_mib": model.memory.temporaries / MIB,
        }
    return found


def main() -> None:
    """Measures both models and prints them, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--per_token", type=int, default=2)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--compute_dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--pairs", type=int, default=9)
    args = parser.parse_args()
    runtime.start()
    shape = (1, args.rows, args.length)
    models = {
        name: Model(config, shape, args.compute_dtype)
        for name, config in configs(args.experts, args.per_token, args.layers).items()
    }
    rng = np.random.default_rng(0)
    batches = [random_batch(rng, WIDTHS["vocab_size"], args.rows, args.length) for _ in range(args.pairs + 1)]
    found = measure(models, batches)
    for name in models:
        print(
            f"{name:>8}: {found[name]['step_s']:.2f} s per step, {found[name]['arguments_mib']:.0f} MiB of weights and "
            f"batch, {found[name]['temporaries_mib']:.0f} MiB of temporaries"
        )
    low, high = found["interval"]
    print(f"the mixture trains at {found['speed']:.2f}x ({low:.2f} to {high:.2f}) the speed of the dense model")
    print(json.dumps({"benchmark": "experts", "cores": os.cpu_count(), "settings": vars(args), **found}))


if __name__ == "__main__":
    main()
