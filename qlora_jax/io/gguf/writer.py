"""Writes a GGUF file: metadata, and tensors one at a time, as llama.cpp's converter would have them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType
from gguf.quants import quantize

from qlora_jax.io.gguf.architectures import Architecture
from qlora_jax.io.gguf.config_reader import architecture_of
from qlora_jax.io.gguf.header import TensorInfo, parse_header
from qlora_jax.io.gguf.reader import TABLES, Change, change_of, hugging_face_name

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
TYPES = {
    "float32": (F32, LlamaFileType.ALL_F32),
    "float16": (F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
TEMPLATE = "tokenizer.chat_template"
# What the writer sets itself, and what no longer holds of the file.
NOT_COPIED = {"general.architecture", "general.file_type", "general.quantization_version", "general.alignment"}
KINDS = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
}
ITEM_KINDS = KINDS | {int: GGUFValueType.INT32}  # of token types, the one array of integers


class Key(NamedTuple):
    """A key of metadata; `inner` is the kind of an array's items."""

    name: str
    value: Any
    kind: GGUFValueType
    inner: GGUFValueType | None = None


class Target(NamedTuple):
    """A tensor of the new file: its name and shape there, and what llama.cpp's converter does to it."""

    name: str
    shape: tuple[int, ...]
    change: Change


class Frame(NamedTuple):
    """A GGUF file without its weights.

    Fields:
      architecture: value of general.architecture.
      targets: by Hugging Face's name.
      tables: tensors of rotary factors, f32.
    """

    architecture: str
    keys: Sequence[Key]
    targets: Mapping[str, Target]
    tables: Mapping[str, np.ndarray]


def frame_like(path: Path, config: Mapping[str, Any], chat_template: str | None) -> Frame:
    """That of the file at `path`: its metadata, tokenizer and names.

    Args:
      config: of the model, as `open_gguf` gives it.
      chat_template: takes the place of the file's.
    """
    header = parse_header(path)
    architecture = architecture_of(path, header.metadata)
    tables = [info for info in header.tensors if info.name in TABLES]
    infos = [info for info in header.tensors if info.name not in TABLES]
    return Frame(
        architecture=architecture.name,
        keys=_keys_of(path, chat_template),
        targets={hugging_face_name(i.name, architecture): target_of(path, i, architecture, config) for i in infos},
        tables={i.name: np.fromfile(path, np.float32, i.nbytes // 4, offset=i.offset) for i in tables},
    )


def target_of(path: Path, info: TensorInfo, architecture: Architecture, config: Mapping[str, Any]) -> Target:
    """The tensor that `info` describes."""
    return Target(info.name, info.shape, change_of(path, info, architecture, config))


def write_gguf(path: Path, frame: Frame, names: Sequence[str], values: Iterable[np.ndarray], dtype: str) -> None:
    """The file of `frame`, its tensors taken from `values` one at a time.

    Matrices are stored as `dtype` says, or in float16 where their rows are no whole blocks of it, and vectors in
    float32, as llama.cpp has them.

    Args:
      names: Hugging Face's, of the values in their order.
      dtype: a key of TYPES.
    """
    wanted, file_type = TYPES[dtype]
    targets = [frame.targets[name] for name in names]
    kinds = [_kind(target.shape, wanted) for target in targets]
    writer = GGUFWriter(path, frame.architecture)
    for key in frame.keys:
        writer.add_key_value(*key)
    writer.add_file_type(file_type)
    for target, kind in zip(targets, kinds, strict=True):
        _announce(writer, target.name, target.shape, kind)
    for name, table in frame.tables.items():
        _announce(writer, name, table.shape, F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for target, kind, value in zip(targets, kinds, values, strict=True):
        there = np.ascontiguousarray(target.change.undone(value.reshape(target.shape)))
        writer.write_tensor_data(quantize(there, kind))
    for table in frame.tables.values():
        writer.write_tensor_data(np.asarray(table, np.float32))
    writer.close()


def keys_of(values: Mapping[str, Any]) -> list[Key]:
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


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
    block, nbytes = GGML_QUANT_SIZES[kind]
    in_bytes = (*shape[:-1], shape[-1] // block * nbytes)
    writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), int(np.prod(in_bytes)), raw_dtype=kind)
