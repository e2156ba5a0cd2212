"""QLoRA finetuning in JAX.

Names resolve when they are first used: `import qlora_jax` imports neither JAX nor anything else, so that a program may
set JAX_PLATFORMS or a memory fraction first.
"""

import importlib
from typing import Any

# public name -> the module that defines it
_PUBLIC = {
    "open_base_or_run": "qlora_jax.io.pretrained",
    "load_base": "qlora_jax.io.pretrained",
    "adapted": "qlora_jax.io.pretrained",
    "LoraArgs": "qlora_jax.config",
    "add_lora": "qlora_jax.models.add_adapters",
    "partition": "qlora_jax.models.partition",
    "combine": "qlora_jax.models.partition",
    "token_nll": "qlora_jax.nn.loss",
    "quantize": "qlora_jax.quant",
    "dequantize": "qlora_jax.quant",
    "QTensor": "pallas_kernels.formats.qtensor",
    "nf4_matmul": "pallas_kernels.nf4_matmul",
}

__all__ = list(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qlora_jax' has no attribute {name!r}; its names: {', '.join(_PUBLIC)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
