"""Writes a GGUF file in the form of llama.cpp's converter: metadata, then tensors one at a time."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType
from gguf.quants import quantize

from qlora_jax.io.gguf.architectures import Architecture
from qlora_jax.io.gguf.config_reader import architecture_of
from qlora_jax.io.gguf.header import TensorInfo, parse_header
from qlora_jax.io.gguf.reader import TABLES, RowTransform, hugging_face_name, transform_of
from qlora_jax.io.model_source import JsonObject

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
TYPES = {
    "float32": (F32, LlamaFileType.ALL_F32),
    "float16": (F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
TEMPLATE = "tokenizer.chat_template"
# Keys that the writer sets, or that are not true of the new file.
NOT_COPIED = {"general.architecture", "general.file_type", "general.quantization_version", "general.alignment"}
KINDS = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
}
ITEM_KINDS = KINDS | {int: GGUFValueType.INT32}  # of token types, the only array of integers


class Key(NamedTuple):
    """One key of metadata; `inner` is the type of an array's items."""

    name: str
    value: object
    kind: GGUFValueType
    inner: GGUFValueType | None = None


class OutputTensor(NamedTuple):
    """A tensor of the new file: its name and shape in GGUF, and the transform whose inverse is applied."""

    name: str
    shape: tuple[int, ...]
    transform: RowTransform


class GgufSpec(NamedTuple):
    """Everything of a GGUF file except its weights.

    Attributes:
      architecture: value of general.architecture.
      keys: the metadata.
      tensors: the tensors by Hugging Face's name.
      tables: tensors of rotary factors, f32.
    """

    architecture: str
    keys: Sequence[Key]
    tensors: Mapping[str, OutputTensor]
    tables: Mapping[str, np.ndarray]


def spec_from_file(path: Path, config: JsonObject, chat_template: str | None) -> GgufSpec:
    """Copies metadata, tokenizer and tensor names of the file at `path`.

    Args:
      config: the model's config from `open_gguf`.
      chat_template: replaces the file's template; None leaves it.
    """
    header = parse_header(path)
    architecture = architecture_of(path, header.metadata)
    tables = [info for info in header.tensors if info.name in TABLES]
    infos = [info for info in header.tensors if info.name not in TABLES]
    return GgufSpec(
        architecture=architecture.name,
        keys=_keys_of(path, chat_template),
        tensors={hugging_face_name(i.name, architecture): output_tensor(path, i, architecture, config) for i in infos},
        tables={i.name: np.fromfile(path, np.float32, i.nbytes // 4, offset=i.offset) for i in tables},
    )


def output_tensor(path: Path, info: TensorInfo, architecture: Architecture, config: JsonObject) -> OutputTensor:
    """The tensor of a new file that corresponds to `info`."""
    return OutputTensor(info.name, info.shape, transform_of(path, info, architecture, config))


def write_gguf(path: Path, spec: GgufSpec, names: Sequence[str], values: Iterable[np.ndarray], dtype: str) -> None:
    """Writes a file, with one tensor in memory at a time.

    As in llama.cpp, matrices are stored in `dtype`, or in float16 if their rows cannot be divided into its blocks;
    vectors are stored in float32.

    Args:
      spec: the file without its weights.
      names: Hugging Face's names of `values`, in order.
      values: the tensors.
      dtype: a key of TYPES.
    """
    wanted, file_type = TYPES[dtype]
    tensors = [spec.tensors[name] for name in names]
    kinds = [_kind(tensor.shape, wanted) for tensor in tensors]
    writer = GGUFWriter(path, spec.architecture)
    for key in spec.keys:
        writer.add_key_value(*key)
    writer.add_file_type(file_type)
    for tensor, kind in zip(tensors, kinds, strict=True):
        _add_tensor_info(writer, tensor.name, tensor.shape, kind)
    for name, table in spec.tables.items():
        _add_tensor_info(writer, name, table.shape, F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, kind, value in zip(tensors, kinds, values, strict=True):
        stored = np.ascontiguousarray(tensor.transform.inverse(value.reshape(tensor.shape)))
        writer.write_tensor_data(quantize(stored, kind))
    for table in spec.tables.values():
        writer.write_tensor_data(np.asarray(table, np.float32))
    writer.close()


def typed_keys(values: Mapping[str, object]) -> list[Key]:
    """Values as keys of the kinds that llama.cpp expects; empty arrays are left out."""
    keys = []
    for name, value in values.items():
        if not isinstance(value, list):
            keys.append(Key(name, value, KINDS[type(value)]))
        elif value:
            keys.append(Key(name, value, GGUFValueType.ARRAY, ITEM_KINDS[type(value[0])]))
    return keys


def _keys_of(path: Path, chat_template: str | None) -> list[Key]:
    keys = {}
    for field in GGUFReader(path).fields.values():
        if field.name.startswith("GGUF.") or field.name in NOT_COPIED:
            continue
        kind, *rest = field.types
        keys[field.name] = Key(field.name, field.contents(), kind, rest[-1] if kind == GGUFValueType.ARRAY else None)
    if chat_template is not None:
        keys[TEMPLATE] = Key(TEMPLATE, chat_template, GGUFValueType.STRING)
    return list(keys.values())


def _kind(shape: tuple[int, ...], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) == 1:
        return F32
    return F16 if shape[-1] % GGML_QUANT_SIZES[wanted][0] else wanted


def _add_tensor_info(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
    block, nbytes = GGML_QUANT_SIZES[kind]
    in_bytes = (*shape[:-1], shape[-1] // block * nbytes)
    writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), int(np.prod(in_bytes)), raw_dtype=kind)
