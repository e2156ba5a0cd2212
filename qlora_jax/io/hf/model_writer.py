"""Writes the dequantized base of a run as a Hugging Face folder, with or without adapters merged into it.

One tensor is in memory at a time.

Dimension key: E experts, N out, K in.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.atomic_files import staged_file, write_bytes, write_text
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.io.hf.fused_experts import TRANSPOSED, name_in_files
from qlora_jax.io.hf.gpt_oss_experts import MODEL_TYPE
from qlora_jax.io.hf.merging import Mergeables, merge
from qlora_jax.io.hf.reader import CODE_TYPES, DTYPES, FLOAT_TYPES, HEADER_LENGTH_BYTES, INDEX, SINGLE, read_header
from qlora_jax.io.hf.tokenizer import GENERATION_CONFIG, PROCESSOR_FILES, TOKENIZER_FILES
from qlora_jax.io.read_back import StoredTensor, check_read_back
from qlora_jax.io.rounding import rounded
from qlora_jax.io.tensor_map import Slot
from qlora_jax.model_source import ModelSource, MultimodalParts, TensorEntry, map_bytes
from qlora_jax.models.config import FUSED_PROJECTIONS, WeightFormat
from qlora_jax.models.families.multimodal import TEXT_CONFIG, text_config
from qlora_jax.nn.frozen_weight import Part, dense_weight, ops_of
from qlora_jax.untrusted_json import JsonObject, read_json

TYPES = DTYPES | CODE_TYPES
FILE_TYPES = {dtype: file_type for file_type, dtype in TYPES.items()}


class TensorSpec(NamedTuple):
    """Name, dtype and shape of a tensor that will be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class CodesForm(NamedTuple):
    """A form of weights in codes in a folder, such as that of bitsandbytes.

    Attributes:
      specs: (name of the weight, its shape, format) -> its tensors in the file.
      quantize: (source, entry, leaf that describes the codes) -> the codes of a weight; None: they are always given.
      values: (codes of a weight, dtype of computation) -> the values of its tensors, in the order of `specs`.
      config: (format, modules in 16 bits) -> quantization_config.
    """

    specs: Callable[[str, tuple[int, ...], WeightFormat], Iterator[TensorSpec]]
    quantize: Callable[..., object] | None
    values: Callable[..., Iterator[np.ndarray]]
    config: Callable[[WeightFormat, list[str]], JsonObject]


SHARD = "model-{:05d}-of-{:05d}.safetensors"
SHARD_BYTES = 5 * 10**9  # per file, the limit of transformers


def split_into_shards(specs: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    """Distributes tensors over files in order; a tensor above the limit of a file gets a separate one."""
    shards: list[list[TensorSpec]] = [[]]
    for tensor in specs:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def shard_index(shards: Mapping[str, Sequence[TensorSpec]]) -> JsonObject:
    """The contents of model.safetensors.index.json: the file of each tensor."""
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
    file_of = {tensor.name: file for file, shard in shards.items() for tensor in shard}
    return {"metadata": {"total_size": total}, "weight_map": file_of}


def write_safetensors(path: Path, specs: Sequence[TensorSpec], values: Iterable[np.ndarray]) -> None:
    """Writes one file, and reads it back.

    Args:
      specs: its tensors.
      values: yields their arrays in the same order; one is in memory at a time.

    Raises:
      OSError: the file cannot be written, or its copy on the disk differs; names it.
    """
    header, written = _header(specs), dict[str, StoredTensor]()
    with staged_file(
        path,
        len(header) + sum(tensor.nbytes for tensor in specs),
        check=lambda stage: check_read_back(stage, header, written, _stored),
    ) as file:
        file.write(header)
        for tensor, value in zip(specs, values, strict=True):
            assert (value.dtype, value.size) == (tensor.dtype, math.prod(tensor.shape)), tensor
            stored = np.ascontiguousarray(value)
            file.write(stored.reshape(-1).view(np.uint8).data)
            written[tensor.name] = StoredTensor.of(FILE_TYPES[tensor.dtype], tensor.shape, stored)


def _header(specs: Sequence[TensorSpec]) -> bytes:
    """Returns the bytes before the first tensor; their number is a multiple of 8."""
    entries: JsonObject = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in specs:
        offsets = (end, end := end + tensor.nbytes)
        entries[tensor.name] = {"dtype": FILE_TYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text


def _stored(path: Path) -> dict[str, StoredTensor]:
    """Reads the tensors of a file."""
    return {
        entry.name: StoredTensor.of(entry.file_type, entry.shape, map_bytes(*entry.ranges_of(0, entry.rows)[0]))
        for entry in read_header(path, TYPES)
    }


# Joins the experts of a layer to the fused tensors of Hugging Face's files of gpt-oss and Qwen3-VL-MoE.
#
# gpt_oss_experts.py and fused_experts.py separate them. The weights of other models are written as they are.

EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<expert>\d+)\.(?P<part>\w+)\.(?P<leaf>weight|bias)")
FUSED_OF = {part: (fused, place) for fused, parts in FUSED_PROJECTIONS.items() for place, part in enumerate(parts)}


class Place(NamedTuple):
    """The place of one expert's weight or bias in a tensor of the file."""

    tensor: str
    expert: int
    part: int


def in_file_order(slots: Sequence[Slot], config: JsonObject) -> list[tuple[Slot, int]]:
    """Returns (slot, index of a name) of all tensors, those that a file joins one after another."""
    names = [(slot, index) for slot in slots for index in range(len(slot.names))]
    if not _is_joined(config):
        return names
    return sorted(names, key=lambda each: _place(each[0].names[each[1]]) or Place(each[0].names[each[1]], 0, 0))


def _is_joined(config: JsonObject) -> bool:
    return text_config(config).get("model_type") in (MODEL_TYPE, *TRANSPOSED)


def _takes_turns(config: JsonObject) -> bool:
    """True if outputs of gate and up take turns in a joined tensor; else those of gate are first."""
    return text_config(config).get("model_type") == MODEL_TYPE


def _place(name: str) -> Place | None:
    match = EXPERT.fullmatch(name)
    if match is None or match["part"] not in FUSED_OF:
        return None
    fused, part = FUSED_OF[match["part"]]
    return Place(f"{match['experts']}.{fused}{'_bias' * (match['leaf'] == 'bias')}", int(match["expert"]), part)


def joined_specs(specs: Sequence[TensorSpec], config: JsonObject) -> list[TensorSpec]:
    """Returns the tensors of the file.

    Args:
      specs: the model's tensors, in the order of `in_file_order`.
    """
    return [each[0] if tensor is None else _joined_spec(tensor, each) for tensor, each in _groups(specs, config)]


def _groups(specs: Sequence[TensorSpec], config: JsonObject) -> Iterator[tuple[str | None, list[TensorSpec]]]:
    """Yields (name of the joined tensor, its parts), or (None, [a tensor that is not joined])."""
    if not _is_joined(config):
        yield from ((None, [spec]) for spec in specs)
        return
    for name, each in itertools.groupby(specs, key=_name_in_file):
        parts = list(each)
        yield (None if name == parts[0].name else name), parts


def _name_in_file(spec: TensorSpec) -> str:
    place = _place(spec.name)
    return spec.name if place is None else place.tensor


def _joined_spec(name: str, specs: Sequence[TensorSpec]) -> TensorSpec:
    parts = len(FUSED_PROJECTIONS[name.rpartition(".")[2].removesuffix("_bias")])
    n, *k = specs[0].shape
    return TensorSpec(name, specs[0].dtype, (len(specs) // parts, *k, n * parts))


def joined_values(
    specs: Sequence[TensorSpec], values: Iterable[np.ndarray], config: JsonObject
) -> Iterator[np.ndarray]:
    """Yields the arrays of the file's tensors from those of the model's, one tensor at a time."""
    stream = iter(values)
    for tensor, parts in _groups(specs, config):
        if tensor is None:
            yield next(stream)
        else:
            yield _joined(stream, _joined_spec(tensor, parts), len(parts), _takes_turns(config))


def _joined(stream: Iterator[np.ndarray], spec: TensorSpec, arrays: int, turns: bool) -> np.ndarray:
    """Joins matrices [N, K] or biases [N] of all experts, gate and up, to [E, K, 2N] or [E, 2N].

    Args:
      stream: its next `arrays` arrays are joined; one of them is in memory at a time.
      turns: True if outputs of gate and up take turns.
    """
    joined = np.empty(spec.shape, spec.dtype)
    parts = arrays // spec.shape[0]
    rows = spec.shape[-1] // parts
    # transformers transposes the matrices of Qwen3-VL-MoE that it reads, except square ones.
    upright = not turns and spec.shape[1:] == (spec.shape[-1],) * 2
    for index, each in enumerate(itertools.islice(stream, arrays)):
        expert, part = divmod(index, parts)
        place = joined[expert].T if upright else joined[expert]
        place[..., slice(part, None, parts) if turns else slice(part * rows, (part + 1) * rows)] = each.T
    return joined


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
        return
    _write_json(folder / GENERATION_CONFIG, {"eos_token_id": [*stop], "bos_token_id": tokenizer.bos_id})
    write_text(folder / "tokenizer.json", tokenizer.to_json())
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": tokenizer.add_bos_token}
    _write_json(folder / "tokenizer_config.json", named | dict(tokenizer.special_tokens))
    if tokenizer.chat_template is not None:
        write_text(folder / "chat_template.jinja", tokenizer.chat_template)


def _dense(slot: Slot, index: int, compute_dtype: np.dtype) -> jax.Array:
    if not slot.stacked:
        return jnp.asarray(slot.leaf)
    place = slot.place(index)
    part, row = ops_of(slot.leaf).part(slot.leaf, place[0])
    return dense_weight(_layer(part, tuple(map(np.int32, (row, *place[1:])))), compute_dtype)


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
