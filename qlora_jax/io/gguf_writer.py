"""Writes a GGUF file like another one: its metadata, tokenizer and names, with other weights."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType
from gguf.quants import quantize

from qlora_jax.io.gguf import TABLES, Change, change_of, hugging_face_name
from qlora_jax.io.gguf_config import architecture_of
from qlora_jax.io.gguf_header import TensorInfo, parse_header

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
TYPES = {
    "float32": (F32, LlamaFileType.ALL_F32),
    "float16": (F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
# What the writer sets itself, and what no longer holds of the file.
NOT_COPIED = {"general.architecture", "general.file_type", "general.quantization_version", "general.alignment"}


class Target(NamedTuple):
    """A tensor of the new file: its name there, how it is stored, and what llama.cpp's converter does to it."""

    name: str
    kind: GGMLQuantizationType
    change: Change


def write_gguf(
    path: Path, like: Path, config: Mapping[str, Any], names: Sequence[str], values: Iterable[np.ndarray], dtype: str
) -> None:
    """A GGUF file with the metadata of the file `like`, its tensors taken from `values` one at a time.

    Matrices are stored as `dtype` says, or in float16 where their rows are no whole blocks of it, and vectors in
    float32, as llama.cpp has them. Tables of rotary frequencies are copied.

    Args:
      config: of the model, as `open_gguf` gives it.
      names: Hugging Face's, of the values in their order.
      dtype: a key of TYPES.
    """
    header = parse_header(like)
    infos = {info.name: info for info in header.tensors}
    kind, file_type = TYPES[dtype]
    architecture = architecture_of(like, header.metadata)
    known = {hugging_face_name(name, architecture): info for name, info in infos.items()}
    targets = [
        Target(known[n].name, _kind(known[n], kind), change_of(like, known[n], architecture, config)) for n in names
    ]
    tables = [infos[name] for name in sorted(TABLES & infos.keys())]
    writer = GGUFWriter(path, architecture.name)
    _copy_keys(writer, like)
    writer.add_file_type(file_type)
    shapes = [infos[target.name].shape for target in targets]
    for target, shape in zip(targets, shapes, strict=True):
        _announce(writer, target.name, shape, target.kind)
    for info in tables:
        _announce(writer, info.name, info.shape, F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for target, shape, value in zip(targets, shapes, values, strict=True):
        writer.write_tensor_data(
            quantize(np.ascontiguousarray(target.change.undone(value.reshape(shape))), target.kind)
        )
    for info in tables:
        writer.write_tensor_data(np.fromfile(like, np.float32, info.nbytes // 4, offset=info.offset))
    writer.close()


def _kind(info: TensorInfo, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(info.shape) == 1:
        return F32
    return F16 if info.shape[-1] % GGML_QUANT_SIZES[wanted][0] else wanted


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
    block, nbytes = GGML_QUANT_SIZES[kind]
    in_bytes = (*shape[:-1], shape[-1] // block * nbytes)
    writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), int(np.prod(in_bytes)), raw_dtype=kind)


def _copy_keys(writer: GGUFWriter, like: Path) -> None:
    for field in GGUFReader(like).fields.values():
        if field.name.startswith("GGUF.") or field.name in NOT_COPIED:
            continue
        kind, *rest = field.types
        inner = rest[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, inner)
