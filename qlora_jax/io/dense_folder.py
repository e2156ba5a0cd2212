"""Writes the base as a run saw it, dequantized, as a Hugging Face folder; one tensor in memory at a time."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.io.safetensors import DTYPES, SINGLE
from qlora_jax.io.slots import Slot, slots_of
from qlora_jax.models.decoder import CausalLM
from qlora_jax.quant import dequantize

FILE_TYPES = {dtype: file_type for file_type, dtype in DTYPES.items()}


def write_dense_folder(folder: Path, model: CausalLM, config: dict[str, Any]) -> None:
    """config.json and model.safetensors: the base of a model for transformers, in the dtype that the model computes in.

    Args:
      model: without adapters.
      config: the model's config.json.
    """
    dtype = model.model.embed_tokens.weight[...].dtype
    slots = slots_of(model)
    write_safetensors(folder / SINGLE, slots, dtype)
    kept = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    _write_json(folder / "config.json", kept | {"torch_dtype": dtype.name})


def write_tokenizer(folder: Path, tokenizer: Tokenizer, stop: list[int]) -> None:
    """The tokenizer's files and generation_config.json; `stop` are the ids that end a reply."""
    _write_json(folder / "generation_config.json", {"eos_token_id": stop, "bos_token_id": tokenizer.bos_id})
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": tokenizer.add_bos_token}
    _write_json(folder / "tokenizer_config.json", named | dict(tokenizer.special_tokens))
    if tokenizer.chat_template is not None:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def write_safetensors(path: Path, slots: list[Slot], dtype: np.dtype) -> None:
    """Every tensor of the slots in `dtype`, dequantized as it is written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for slot in slots:
        size = math.prod(slot.shape) * dtype.itemsize
        for name in slot.names:
            header[name] = {"dtype": FILE_TYPES[dtype], "shape": slot.shape, "data_offsets": (end, end + size)}
            end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begins on a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for slot in slots:
            for tensor in _tensors(slot, dtype):
                file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


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
