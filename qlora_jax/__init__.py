"""QLoRA finetuning in JAX (docs/python.md).

Names resolve on first use: `import qlora_jax` imports neither jax nor NumPy, so a program can set JAX_PLATFORMS or a
memory fraction first.
"""

import importlib
from typing import Any

# public name -> (the module that defines it, its name there; empty for the module itself)
_PUBLIC = {
    "load": ("qlora_jax.api.load", "load"),
    "add_adapter": ("qlora_jax.api.adapt", "add_adapter"),
    "LoRA": ("qlora_jax.config", "LoraArgs"),
    "register_method": ("qlora_jax.config.methods", "register_method"),
    "MethodDeclaration": ("qlora_jax.config.methods", "MethodDeclaration"),
    "register_objective": ("qlora_jax.objectives.function_objective", "register_objective"),
    "register_row_format": ("qlora_jax.data.formats.registry", "register_row_format"),
    "RowFormat": ("qlora_jax.data.formats.row_format", "RowFormat"),
    "register_export": ("qlora_jax.config.exports", "register_export"),
    "finetune": ("qlora_jax.api.finetune", "finetune"),
    "generate_text": ("qlora_jax.api.generate", "generate_text"),
    "Engine": ("qlora_jax.api.engine", "Engine"),
    "logits": ("qlora_jax.api.logits", "logits"),
    "classify": ("qlora_jax.api.predict", "classify"),
    "score": ("qlora_jax.api.predict", "score"),
    "embed": ("qlora_jax.api.predict", "embed"),
    "serve_models": ("qlora_jax.api.serve", "serve_models"),
    "evaluate_model": ("qlora_jax.api.evaluate", "evaluate_model"),
    "save_peft": ("qlora_jax.api.export", "save_peft"),
    "merge": ("qlora_jax.api.export", "merge"),
    "merge_adapters": ("qlora_jax.api.merge_adapters", "merge_adapters"),
    "save_quantized": ("qlora_jax.api.export", "save_quantized"),
    "make_plan": ("qlora_jax.api.plan", "make_plan"),
    "Config": ("qlora_jax.config", "Config"),
    "prepare_data": ("qlora_jax.api.data", "prepare_data"),
    "token_nll": ("qlora_jax.nn.lm_head.cross_entropy", "token_nll"),
    "paged": ("qlora_jax.optim.paged_transform", "paged"),
    "adamw_8bit": ("qlora_jax.optim.optimizers_8bit", "adamw_8bit"),
    "lion_8bit": ("qlora_jax.optim.optimizers_8bit", "lion_8bit"),
    "quantize_model": ("qlora_jax.nn", "quantize_model"),
    "QuantRule": ("qlora_jax.nn", "QuantRule"),
    "nn": ("qlora_jax.nn", ""),
    "quantize_array": ("qlora_jax.quant", "quantize"),
    "dequantize_array": ("qlora_jax.quant", "dequantize"),
    "QTensor": ("pallas_kernels.formats.qtensor", "QTensor"),
    "nf4_matmul": ("pallas_kernels.nf4_matmul", "nf4_matmul"),
}

__all__ = list(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:  # Any, so that type checkers accept calls of the names
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("qlora-jax")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qlora_jax' has no attribute {name!r}; its names: {', '.join(_PUBLIC)}")
    module, attribute = _PUBLIC[name]
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
