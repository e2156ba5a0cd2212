"""LayerNorm tuning in PEFT's format (LN_TUNING): trained norms, which replace those of the base.

Dimension key: L layers, D width of the norm.
"""

from collections.abc import Sequence

import numpy as np

from qlora_jax.io.peft.writer import PREFIX, target_suffixes
from qlora_jax.metadata import JsonObject
from qlora_jax.methods.method import FINAL_NORM, norm_widths
from qlora_jax.model_source import TensorEntry
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.partition import AdapterArrays
from qlora_jax.models.tensor_names import layer_name

PEFT_TYPE = "LN_TUNING"
LEAVES = {"gain": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"}  # our leaf -> PEFT's name


def norm_tensors(lora: AdapterArrays, model: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors of adapter_model.safetensors: weight [D], and bias [D] of a LayerNorm, of each norm of each layer.

    Args:
      lora: {"model.layers.input_layernorm": {"gain": [L, D]}, "model.norm": {"gain": [D]}} by Hugging Face's names.
    """
    return {
        name: np.ascontiguousarray(vector)
        for module, leaves in lora.items()
        for leaf, values in leaves.items()
        for name, vector in zip(
            _tensor_names(module, leaf, model), np.asarray(values).reshape(-1, values.shape[-1]), strict=True
        )
    }


def norm_config(lora: AdapterArrays, model: ModelConfig, base: str) -> JsonObject:
    """The adapter_config.json from which PEFT builds the trained norms.

    Args:
      lora: as of `norm_tensors`.
      base: where PEFT finds the base model: a path or a name.
    """
    return {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": norm_suffixes(list(lora), model),
        "exclude_modules": None,
        "modules_to_save": None,
    }


def norm_suffixes(names: Sequence[str], model: ModelConfig) -> list[str]:
    """The target_modules that select these norms, by Hugging Face's names, and no others."""
    return target_suffixes(names, list(norm_widths(model)))


def read_norms(
    entries: Sequence[TensorEntry], model: ModelConfig
) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Reads the norms of an adapter: (arrays in f32 as of `norm_tensors`, all problems that make them unusable)."""
    left = {entry.name: entry for entry in entries}
    leaves = list(LEAVES) if model.norm == "layer" else ["gain"]
    lora: dict[str, dict[str, np.ndarray]] = {}
    problems: list[str] = []
    for module, width in norm_widths(model).items():
        named = {leaf: _tensor_names(module, leaf, model) for leaf in leaves}
        found = {name: left.pop(name) for names in named.values() for name in names if name in left}
        if not found:
            continue
        wrong = _problems([name for names in named.values() for name in names], found, width)
        problems += wrong
        lora[module] = {} if wrong else {leaf: _stack(module, names, found) for leaf, names in named.items()}
    problems += [f"{name}: not a norm of the model, or unexpected in an adapter of this method" for name in left]
    return lora, problems or ([] if lora else ["it has no tensor of an adapter"])


def our_norm_names(model: ModelConfig) -> dict[str, str]:
    """{Hugging Face name: our name} of each norm."""
    names = (*(f"model.layers.{name}" for name in model.norm_widths()), FINAL_NORM)
    return {model.hugging_face_name(name): name for name in names}


def _tensor_names(module: str, leaf: str, model: ModelConfig) -> list[str]:
    """PEFT's names of a norm's leaf, of each layer; of the final norm, one."""
    layers = model.num_layers if ".layers." in module else 1
    return [f"{PREFIX}{layer_name(module, layer)}.{LEAVES[leaf]}" for layer in range(layers)]


def _problems(names: Sequence[str], found: dict[str, TensorEntry], width: int) -> list[str]:
    missing = [f"{name} is missing: all layers of a norm must train" for name in names if name not in found]
    return missing or [
        f"{name}: shape {list(entry.shape)}, expected {[width]}"
        for name, entry in found.items()
        if entry.shape != (width,)
    ]


def _stack(module: str, names: Sequence[str], found: dict[str, TensorEntry]) -> np.ndarray:
    vectors = [np.asarray(found[name].read(), np.float32) for name in names]
    return np.stack(vectors) if ".layers." in module else vectors[0]
