"""Compute dtype and weight format for a device."""

import re
from pathlib import Path

import jax

from qlora_jax.config import ModelArgs
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.keep_16bit import keep_in_16_bits

# Linux names of processor flags for fast bfloat16 products: x86 AVX-512 and AMX, then ARM.
BF16_FLAGS = re.compile(r"\b(avx512_bf16|amx_bf16|bf16)\b")


def platform() -> str:
    """Returns JAX's default platform: `cpu`, `gpu` or `tpu`."""
    return jax.default_backend()


def compute_dtype(asked: str, on: str | None = None) -> str:
    """Resolves `auto` to bfloat16 on accelerators and on CPUs with instructions for it, and to float32 on other CPUs.

    Args:
      asked: `auto`, `bfloat16` or `float32`.
      on: the platform; None: JAX's default.
    """
    if asked != "auto":
        return asked
    return "bfloat16" if (on or platform()) != "cpu" or _cpu_has_bf16() else "float32"


def _cpu_has_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and BF16_FLAGS.search(cpuinfo.read_text(encoding="utf-8", errors="replace")) is not None


def weight_format(args: ModelArgs, config: ModelConfig, on: str | None = None) -> WeightFormat:
    """Returns the configured quantization of a model, with layout and dtype for a platform (None: JAX's default).

    Raises:
      ValueError: `model.keep_16bit` names a layer that the model does not have, or `model.experts` is offload and it
        has no experts.
    """
    if args.experts == "offload" and config.experts is None:
        raise ValueError("model.experts: found 'offload', but the model has no routed experts. Remove this setting")
    weights = WeightFormat(
        quant_type=None if args.quant_type == "none" else args.quant_type,
        block_size=args.block_size,
        double_quant=args.double_quant,
        platform=on or platform(),
        dtype=compute_dtype(args.compute_dtype, on),
        experts_on_host=args.experts == "offload",
    )
    return weights if weights.quant_type is None else keep_in_16_bits(weights, args.keep_16bit, config)
