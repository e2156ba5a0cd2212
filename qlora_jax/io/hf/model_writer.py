"""Writes the dequantized base of a run as a Hugging Face folder, with or without adapters merged into it.

One tensor is in memory at a time.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.atomic_files import write_bytes, write_text
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.io.hf.fused_experts import name_in_files
from qlora_jax.io.hf.fused_writer import in_file_order, joined_specs, joined_values
from qlora_jax.io.hf.merging import Mergeables, merge
from qlora_jax.io.hf.reader import FLOAT_TYPES, INDEX, SINGLE
from qlora_jax.io.hf.shard_writer import SHARD, TensorSpec, shard_index, split_into_shards, write_safetensors
from qlora_jax.io.hf.tokenizer import GENERATION_CONFIG, PROCESSOR_FILES, TOKENIZER_FILES
from qlora_jax.io.rounding import rounded
from qlora_jax.io.tensor_map import Leaf, Slot
from qlora_jax.metadata import JsonObject, read_json
from qlora_jax.model_source import ModelSource, MultimodalParts, TensorEntry
from qlora_jax.models.families.multimodal import TEXT_CONFIG
from qlora_jax.nn.mixed_stack import MixedStack, Part, dense_weight

SELECTION_BIAS = "e_score_correction_bias"
NO_ENTRIES: Mapping[str, TensorEntry] = {}


def write_dense_folder(
    folder: Path,
    slots: Sequence[Slot],
    config: JsonObject,
    *,
    compute_dtype: np.dtype,
    dtype: np.dtype,
    adapters: Mergeables,
    original: Mapping[str, TensorEntry] = NO_ENTRIES,
    multimodal: MultimodalParts | None = None,
) -> None:
    """Writes config.json and safetensors files: a model for transformers in `dtype`.

    A weight or bias with an adapter is dequantized as in training, merged in f32, and rounded once.
    A multimodal checkpoint keeps its tensors' names, and the tensors of its other parts unchanged.

    Args:
      slots: slots of the model without adapters.
      config: the model's config.json.
      compute_dtype: the dtype that training compute_dtype in, and dequantized 4-bit weights to.
      dtype: the dtype of the written tensors.
      adapters: as of `mergeables`.
      original: tensors that replace the dequantized ones, by Hugging Face's name.
      multimodal: the rest of the checkpoint, if the model is the text half of one.
    """
    names_in_file = {} if multimodal is None else multimodal.names
    order = in_file_order(slots, config)
    named = ((slot, slot.names[index]) for slot, index in order)
    text = [
        TensorSpec(name_in_files(config, names_in_file.get(name, name)), written_dtype(slot, dtype), slot.shape)
        for slot, name in named
    ]
    dense = (dense_tensor(slot, index, compute_dtype, adapters, original) for slot, index in order)
    written = (rounded(tensor.name, np.asarray(each), tensor.dtype) for tensor, each in zip(text, dense, strict=True))
    others, unchanged = other_tensors(multimodal, dtype)
    specs = [*joined_specs(text, config), *others]
    values = itertools.chain(joined_values(text, written, config), unchanged)
    shards = split_into_shards(specs)
    names = [SINGLE] if len(shards) == 1 else [SHARD.format(i + 1, len(shards)) for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, itertools.islice(values, len(shard)))
    if len(shards) > 1:
        _write_json(folder / INDEX, shard_index(dict(zip(names, shards, strict=True))))
    write_config(folder, config, {"torch_dtype": dtype.name})


def other_tensors(multimodal: MultimodalParts | None, dtype: np.dtype) -> tuple[list[TensorSpec], Iterator[np.ndarray]]:
    """Returns the tensors beside the text half (what describes them, their values), equal to those in the files.

    Only a tensor that the files have in codes is dequantized, to `dtype`.
    """
    entries = [] if multimodal is None else list(multimodal.others.values())
    kinds = [FLOAT_TYPES.get(entry.file_type, dtype) for entry in entries]
    specs = [TensorSpec(entry.name, kind, entry.shape) for entry, kind in zip(entries, kinds, strict=True)]
    values = (rounded(entry.name, entry.read(), kind) for entry, kind in zip(entries, kinds, strict=True))
    return specs, values


def written_dtype(slot: Slot, dtype: np.dtype) -> np.dtype:
    """Returns `dtype`, or f32 for a bias that decides between experts, which transformers keeps in f32."""
    return np.dtype(np.float32) if slot.path[-1] == SELECTION_BIAS else dtype


def dense_tensors(
    slots: Sequence[Slot],
    compute_dtype: np.dtype,
    adapters: Mergeables,
    original: Mapping[str, TensorEntry] = NO_ENTRIES,
) -> Iterator[jax.Array]:
    """Yields the dense tensor of each name of each slot in order; tensors with an adapter in f32."""
    for slot in slots:
        for index in range(len(slot.names)):
            yield dense_tensor(slot, index, compute_dtype, adapters, original)


def dense_tensor(
    slot: Slot, index: int, compute_dtype: np.dtype, adapters: Mergeables, original: Mapping[str, TensorEntry]
) -> jax.Array:
    """Returns the dense tensor at `index` in `slot.names`; in f32 if it has an adapter."""
    name = slot.names[index]
    dense = jnp.asarray(original[name].read()) if name in original else _dense(slot, index, compute_dtype)
    return merge(slot, index, dense, adapters)


def write_config(folder: Path, config: JsonObject, changes: JsonObject) -> None:
    """Writes config.json: `config` without its keys for dtype and quantization, updated by `changes`."""
    kept = {key: _without_dtype(value) if key == TEXT_CONFIG else value for key, value in config.items()}
    _write_json(folder / "config.json", _without_dtype(kept) | changes)


def _without_dtype(config: JsonObject) -> JsonObject:
    return {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype", "quantization_config")}


def write_tokenizer(folder: Path, tokenizer: Tokenizer, source: ModelSource, stop: Sequence[int]) -> None:
    """Writes the tokenizer's files and generation_config.json of a model that `source` became.

    The files of a multimodal model also describe its images, so they are copied. Only new tokens, another chat template
    and its end of a turn change them.

    Args:
      stop: ids that end a reply.
    """
    if source.multimodal is not None:
        _copy_tokenizer(folder, tokenizer, source, stop)
        return
    _write_json(folder / GENERATION_CONFIG, {"eos_token_id": [*stop], "bos_token_id": tokenizer.bos_id})
    write_text(folder / "tokenizer.json", tokenizer.to_json())
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": tokenizer.add_bos_token}
    _write_json(folder / "tokenizer_config.json", named | dict(tokenizer.special_tokens))
    if tokenizer.chat_template is not None:
        write_text(folder / "chat_template.jinja", tokenizer.chat_template)


def _copy_tokenizer(folder: Path, tokenizer: Tokenizer, source: ModelSource, stop: Sequence[int]) -> None:
    for name in (*TOKENIZER_FILES, *PROCESSOR_FILES):
        if (source.path / name).is_file():
            write_bytes(folder / name, (source.path / name).read_bytes())
    if tokenizer.new_ids:
        write_text(folder / "tokenizer.json", tokenizer.to_json())
    if tokenizer.chat_template not in (None, source.tokenizer["chat_template"]):
        write_text(folder / "chat_template.jinja", tokenizer.chat_template)
    if [*stop] != source.tokenizer["stop_token_ids"]:
        path = folder / GENERATION_CONFIG
        own = read_json(path, JsonObject) if path.exists() else {}
        _write_json(path, {**own, "eos_token_id": [*stop]})


def _dense(slot: Slot, index: int, compute_dtype: np.dtype) -> jax.Array:
    if not slot.stacked:
        return jnp.asarray(slot.leaf)
    return dense_weight(_layer(*_part(slot.leaf, slot.place(index))), compute_dtype)


def _part(stack: Leaf, place: tuple[int, ...]) -> tuple[Leaf, tuple[np.int32, ...]]:
    """(the stack that contains a layer, the place in it)."""
    if not isinstance(stack, MixedStack):
        return stack, tuple(map(np.int32, place))
    part, row = stack.locate(place[0])
    return stack.parts[part], tuple(map(np.int32, (row, *place[1:])))


@jax.jit
def _layer(stack: Part, place: tuple[jax.Array | np.int32, ...]) -> Part:
    """Returns one layer or expert, on the device even if the stack is in host memory."""

    def one(leaf: jax.Array) -> jax.Array:
        shape = leaf.shape[len(place) :]
        values = jax.lax.dynamic_slice(leaf, (*place, *(0 for _ in shape)), (*(1 for _ in place), *shape))
        return jax.device_put(values.reshape(shape), jax.memory.Space.Device)

    return jax.tree.map(one, stack)


def _write_json(path: Path, value: JsonObject) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
