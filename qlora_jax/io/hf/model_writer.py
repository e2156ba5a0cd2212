"""Writes a base as a run saw it, dequantized, with adapters merged or without, as a Hugging Face folder.

One tensor is in memory at a time.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.io.hf.reader import INDEX, SINGLE
from qlora_jax.io.hf.shard_writer import SHARD, Planned, index_of, split, write_safetensors
from qlora_jax.io.model_source import TensorEntry
from qlora_jax.io.tensor_map import Slot
from qlora_jax.nn.linear import Adapter
from qlora_jax.nn.mixed_stack import MixedStack
from qlora_jax.nn.norm import TrainableNorm
from qlora_jax.quant import dequantize

EMPTY: Mapping[str, TensorEntry] = {}
Merging = Adapter | TrainableNorm  # what makes the tensors of a module others


def write_dense_folder(
    folder: Path,
    slots: Sequence[Slot],
    config: dict[str, Any],
    *,
    computed: np.dtype,
    dtype: np.dtype,
    adapters: Mapping[str, Merging],
    original: Mapping[str, TensorEntry] = EMPTY,
) -> None:
    """config.json and safetensors files: a model for transformers, in `dtype`.

    A weight or bias with an adapter is what the adapter makes of it: dequantized as training saw it, merged in f32, and
    rounded once.

    Args:
      slots: of the model without adapters.
      config: the model's config.json.
      computed: the dtype that training computed in, and saw 4-bit weights in.
      adapters: by the name of the first layer's module, `model.layers.0.self_attn.q_proj`.
      original: tensors that take the place of the dequantized ones, by name.
    """
    planned = [Planned(name, dtype, slot.shape) for slot in slots for name in slot.names]
    values = (np.asarray(tensor, dtype) for tensor in dense_tensors(slots, computed, adapters, original))
    shards = split(planned)
    names = [SINGLE] if len(shards) == 1 else [SHARD.format(i + 1, len(shards)) for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, itertools.islice(values, len(shard)))
    if len(shards) > 1:
        _write_json(folder / INDEX, index_of(dict(zip(names, shards, strict=True))))
    write_config(folder, config, {"torch_dtype": dtype.name})


def dense_tensors(
    slots: Sequence[Slot],
    computed: np.dtype,
    adapters: Mapping[str, Merging],
    original: Mapping[str, TensorEntry] = EMPTY,
) -> Iterator[jax.Array]:
    """The tensors of the slots' names, in their order; those with an adapter in f32."""
    for slot in slots:
        module, _, leaf = slot.names[0].rpartition(".")
        merged = _merged_by(adapters.get(module), leaf)
        for layer, name in enumerate(slot.names):
            dense = jnp.asarray(original[name].read()) if name in original else _dense(slot, layer, computed)
            yield merged(layer, dense)


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


Merged = Callable[[int, jax.Array], jax.Array]  # what becomes of one layer's tensor


def _merged_by(adapter: Merging | None, leaf: str) -> Merged:
    if adapter is None:
        return lambda layer, dense: dense
    if leaf == "bias":
        return lambda layer, dense: adapter.select_layer(layer).merge_bias(dense)
    return lambda layer, dense: adapter.select_layer(layer).merge(dense)


def _dense(slot: Slot, layer: int, computed: np.dtype) -> jax.Array:
    if not slot.stacked:
        return slot.leaf
    leaf = _layer(*_part(slot.leaf, layer))
    return dequantize(leaf, computed) if isinstance(leaf, QTensor) else leaf


def _part(stack: Any, layer: int) -> tuple[Any, np.int32]:
    """(the stack that holds the layer, its index there)."""
    part, index = stack.locate(layer) if isinstance(stack, MixedStack) else (None, layer)
    return (stack if part is None else getattr(stack, part)), np.int32(index)


@jax.jit
def _layer(stack: Any, layer: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stack)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
