"""QLoRA finetuning in JAX.

Names resolve when they are first used: `import qlora_jax` imports neither JAX nor anything else, so that a program may
set JAX_PLATFORMS or a memory fraction first.
"""

import importlib
from typing import Any

# public name -> (the module that defines it, its name there)
_PUBLIC = {
    "open_pretrained": ("qlora_jax.io.pretrained", "open_pretrained"),
    "load_base": ("qlora_jax.io.pretrained", "load_base"),
    "apply_adapter": ("qlora_jax.io.pretrained", "apply_adapter"),
    "LoraArgs": ("qlora_jax.config", "LoraArgs"),
    "add_lora": ("qlora_jax.models.add_adapters", "add_lora"),
    "partition": ("qlora_jax.models.partition", "partition"),
    "combine": ("qlora_jax.models.partition", "combine"),
    "token_nll": ("qlora_jax.nn.loss", "token_nll"),
    "quantize_array": ("qlora_jax.quant", "quantize"),
    "dequantize_array": ("qlora_jax.quant", "dequantize"),
    "paged": ("qlora_jax.optim.paged", "paged"),
    "adamw_8bit": ("qlora_jax.optim.optimizers_8bit", "adamw_8bit"),
    "lion_8bit": ("qlora_jax.optim.optimizers_8bit", "lion_8bit"),
    "QTensor": ("pallas_kernels.formats.qtensor", "QTensor"),
    "nf4_matmul": ("pallas_kernels.nf4_matmul", "nf4_matmul"),
}

__all__ = list(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qlora_jax' has no attribute {name!r}; its names: {', '.join(_PUBLIC)}")
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
