"""QLoRA finetuning in JAX.

Names resolve when they are first used: `import qlora_jax` imports neither JAX nor anything else, so that a program may
set JAX_PLATFORMS or a memory fraction first.
"""

import importlib
from typing import Any

# public name -> the module that defines it
_PUBLIC = {
    "Config": "qlora_jax.config",
    "read_config": "qlora_jax.config",
    "write_config": "qlora_jax.config",
    "QTensor": "pallas_kernels.formats.qtensor",
    "nf4_matmul": "pallas_kernels.nf4_matmul",
    "quantize": "qlora_jax.quant",
    "dequantize": "qlora_jax.quant",
    "open_model": "qlora_jax.io.source",
    "load_tokenizer": "qlora_jax.data.tokenizer",
}

__all__ = list(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qlora_jax' has no attribute {name!r}; its names: {', '.join(_PUBLIC)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
