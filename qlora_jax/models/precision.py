"""In which dtype a device computes, and how the frozen weights are held for it."""

import re
from pathlib import Path

import jax

from qlora_jax.config import ModelArgs
from qlora_jax.models.config import WeightFormat

# Processor flags (as Linux tells them) of fast bfloat16 products: x86 AVX-512 and AMX, then ARM.
BF16_FLAGS = re.compile(r"\b(avx512_bf16|amx_bf16|bf16)\b")


def platform() -> str:
    """What jax computes on: `cpu`, `gpu` or `tpu`."""
    return jax.default_backend()


def compute_dtype(asked: str, on: str | None = None) -> str:
    """`asked`, or for `auto`: bfloat16 on accelerators and on CPUs with instructions for it, float32 otherwise.

    Args:
      on: the platform; None: what jax computes on.
    """
    if asked != "auto":
        return asked
    return "bfloat16" if (on or platform()) != "cpu" or _cpu_has_bf16() else "float32"


def _cpu_has_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and BF16_FLAGS.search(cpuinfo.read_text(encoding="utf-8", errors="replace")) is not None


def weight_format(args: ModelArgs, on: str | None = None) -> WeightFormat:
    """The settings' quantization, in the layout and the dtype that suit a platform (None: what jax computes on)."""
    return WeightFormat(
        quant_type=None if args.quant_type == "none" else args.quant_type,
        block_size=args.block_size,
        double_quant=args.double_quant,
        platform=on or platform(),
        dtype=compute_dtype(args.compute_dtype, on),
    )
