"""Layers, adapters and losses. The names for Flax models of your own resolve on first use, so importing costs nothing.

import qlora_jax as q
layer = q.nn.NF4Linear.from_linear(nnx.Linear(64, 128, rngs=rngs))
"""

import importlib

# public name -> the module that defines it
_PUBLIC = {
    "Branching": "pallas_kernels.attention.branching",
    "NF4Linear": "qlora_jax.nn.nf4_linear",
    "NF4LinearGeneral": "qlora_jax.nn.nf4_linear",
    "QuantRule": "qlora_jax.nn.model_quantization",
    "quantize_model": "qlora_jax.nn.model_quantization",
}

__all__ = list(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qlora_jax.nn' has no attribute {name!r}; its names: {', '.join(_PUBLIC)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
