"""Writes the base as a run saw it, dequantized, as a Hugging Face folder; one tensor in memory at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.io.safetensors import SINGLE
from qlora_jax.io.safetensors_writer import Planned, write_safetensors
from qlora_jax.io.slots import Slot, slots_of
from qlora_jax.models.decoder import CausalLM
from qlora_jax.quant import dequantize


def write_dense_folder(folder: Path, model: CausalLM, config: dict[str, Any]) -> None:
    """config.json and model.safetensors: the base of a model for transformers, in the dtype that the model computes in.

    Args:
      model: without adapters.
      config: the model's config.json.
    """
    dtype = model.model.embed_tokens.weight[...].dtype
    slots = slots_of(model)
    planned = [Planned(name, dtype, slot.shape) for slot in slots for name in slot.names]
    write_safetensors(folder / SINGLE, planned, (tensor for slot in slots for tensor in _tensors(slot, dtype)))
    write_config(folder, config, {"torch_dtype": dtype.name})


def write_config(folder: Path, config: dict[str, Any], changes: dict[str, Any]) -> None:
    """config.json: `config` without what it says of how weights are stored, and `changes`."""
    kept = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype", "quantization_config")}
    _write_json(folder / "config.json", kept | changes)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, stop: list[int]) -> None:
    """The tokenizer's files and generation_config.json; `stop` are the ids that end a reply."""
    _write_json(folder / "generation_config.json", {"eos_token_id": stop, "bos_token_id": tokenizer.bos_id})
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": tokenizer.add_bos_token}
    _write_json(folder / "tokenizer_config.json", named | dict(tokenizer.special_tokens))
    if tokenizer.chat_template is not None:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def _tensors(slot: Slot, dtype: np.dtype) -> Iterator[np.ndarray]:
    if not slot.stacked:
        yield np.asarray(slot.leaf, dtype)
        return
    for layer in range(len(slot.names)):
        leaf = _layer(slot.leaf, np.int32(layer))
        yield np.asarray(dequantize(leaf, dtype) if isinstance(leaf, QTensor) else leaf, dtype)


@jax.jit
def _layer(stack: Any, layer: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stack)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
