"""Measures how close initial adapters are to the 16-bit model: |W - Q(remainder) - s (A B)^T| / |W|.

    python -m scripts.bench.adapter_init --model MODEL [--rank 16] [--every 5]

Uses the weights of every fifth layer, in NF4 with double quantization. Prints the mean over weights, and the seconds
for all of them.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.config import LoraArgs, ModelArgs
from qlora_jax.io.loading.adapter_init import WeightDecomposer, adapted_tensors
from qlora_jax.io.open_model import open_model
from qlora_jax.models.families import model_config
from qlora_jax.models.precision import weight_format
from qlora_jax.quant import dequantize, quantize
from scripts.bench.support.progress import phases

INITS = {
    "default": {},
    "pissa": dict(init="pissa"),
    "pissa, svd_niter 4": dict(init="pissa", svd_niter=4),
    "loftq": dict(init="loftq"),
    "loftq, svd_niter 4": dict(init="loftq", svd_niter=4),
    "loftq, 4 iterations": dict(init="loftq", loftq_iterations=4),
}


def main() -> None:
    """Prints one line per initialization."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file or a Hugging Face folder")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--every", type=int, default=5, help="use one layer in N")
    args = parser.parse_args()
    source = open_model(args.model)
    config = model_config(source.config)
    weights = weight_format(ModelArgs(path=str(args.model)), config)
    for name in phases("initialization", INITS):
        spec = LoraArgs(rank=args.rank, **INITS[name])
        targets = {k: t for k, t in adapted_tensors(config, spec).items() if t.row % args.every == 0}
        decomposer = WeightDecomposer(config, weights, spec, jax.random.key(0))
        errors, seconds = [], 0.0
        for tensor, target in targets.items():
            weight = np.asarray(source.tensors[tensor].read(), np.float32)
            began = time.perf_counter()
            rest = weight if spec.init == "default" else decomposer(tensor, weight)
            seconds += time.perf_counter() - began
            begun = np.asarray(dequantize(quantize(rest), jnp.dtype("float32")))
            if spec.init != "default":
                factors = decomposer.initial_adapter().factors[target.name]
                begun = begun + target.scaling * (factors["lora_a"][target.row] @ factors["lora_b"][target.row]).T
            errors.append(np.linalg.norm(weight - begun) / np.linalg.norm(weight))
        print(f"{name:22} {np.mean(errors):.4f}  {seconds:6.1f} s for {len(targets)} weights", flush=True)


if __name__ == "__main__":
    main()
