"""Writes a GGUF file in the form of llama.cpp's converter: metadata, then tensors one at a time."""

import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, cast

import numpy as np
from gguf import GGUFReader, GGUFWriter
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
    LlamaFileType,
)
from gguf.gguf_writer import WriterState
from gguf.quants import quantize

from pallas_kernels.formats.ggml_tensor import GgmlTensor
from qlora_jax.atomic_files import staged_file
from qlora_jax.config.exports import MIXTURES
from qlora_jax.io.gguf.architectures import Architecture
from qlora_jax.io.gguf.config_reader import DRAFT_LAYERS, architecture_of, number_of_layers
from qlora_jax.io.gguf.expert_stacks import ROUTERS, stack_name, stored_shape
from qlora_jax.io.gguf.header import TensorInfo, parse_header
from qlora_jax.io.gguf.reader import TABLES, RowTransform, hugging_face_name, transform_of, weights_of
from qlora_jax.io.read_back import StoredTensor, TensorDigest, check_read_back
from qlora_jax.io.rounding import check_range
from qlora_jax.model_source import map_bytes
from qlora_jax.untrusted_json import JsonObject

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
TYPES = {
    "float32": (F32, LlamaFileType.ALL_F32),
    "float16": (F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
# Matrices of a mixture whose type is not given have 16 bits.
MIXED = {name: (F16, LlamaFileType[f"MOSTLY_{name.upper()}"]) for name in MIXTURES}
TEMPLATE = "tokenizer.chat_template"
# Keys that the writer sets, or that are not true of the new file.
NO_TYPES: Mapping[str, str] = MappingProxyType({})
NOT_COPIED = {"general.architecture", "general.file_type", "general.quantization_version", "general.alignment"}
KINDS = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
}
ITEM_KINDS = KINDS | {int: GGUFValueType.INT32}  # as the gguf package writes arrays of integers


class Key(NamedTuple):
    """One key of metadata; `inner` is the type of an array's items."""

    name: str
    value: object
    kind: GGUFValueType
    inner: GGUFValueType | None = None


class OutputTensor(NamedTuple):
    """A tensor of the new file: its name and shape in GGUF, and the transform whose inverse is applied.

    An expert's tensor has the name that `split_experts` gives it; the experts of one projection follow each other.
    """

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
    # The file's layers that predict further tokens are left out, as by the reader.
    layers = {f"{architecture.name}.block_count": number_of_layers(architecture, header.metadata)}
    keys = [key._replace(value=layers.get(key.name, key.value)) for key in _keys_of(path, chat_template)]
    tables = [info for info in header.tensors if info.name in TABLES]
    infos = list(weights_of(header, architecture))
    return GgufSpec(
        architecture=architecture.name,
        keys=[key for key in keys if key.name != f"{architecture.name}.{DRAFT_LAYERS}"],
        tensors={hugging_face_name(i.name, architecture): output_tensor(path, i, architecture, config) for i in infos},
        tables={i.name: np.fromfile(path, np.float32, i.nbytes // 4, offset=i.offset) for i in tables},
    )


def output_tensor(path: Path, info: TensorInfo, architecture: Architecture, config: JsonObject) -> OutputTensor:
    """The tensor of a new file that corresponds to `info`."""
    transform = transform_of(path, info, architecture, config)
    return OutputTensor(info.name, stored_shape(info.name, info.shape), transform)


class _Row(NamedTuple):
    """One row of the tensor table.

    Attributes:
      pieces: number of tensors that are written into it: its experts, or 1.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    pieces: int = 1

    @property
    def shape_in_bytes(self) -> tuple[int, ...]:
        """The shape of the stored tensor as uint8."""
        block, nbytes = GGML_QUANT_SIZES[self.kind]
        return (*self.shape[:-1], self.shape[-1] // block * nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        return math.prod(self.shape_in_bytes)


def write_gguf(
    path: Path,
    spec: GgufSpec,
    names: Sequence[str],
    values: Iterable[np.ndarray | GgmlTensor],
    dtype: str,
    types: Mapping[str, str] = NO_TYPES,
) -> None:
    """Writes a file, with one tensor in memory at a time, and reads it back.

    As in llama.cpp, matrices are stored in `dtype`, or in float16 if their rows cannot be divided into its blocks;
    vectors and routers are stored in float32.

    Args:
      spec: the file without its weights.
      names: Hugging Face's names of `values`, in order; the experts of a projection follow each other.
      values: the tensors; those in codes are stored unchanged.
      dtype: a key of TYPES or MIXED.
      types: those of tensors in codes, if they are not `dtype`, by the names in `names`.

    Raises:
      OSError: the file cannot be written, or its copy on the disk differs; names it.
    """
    wanted, file_type = (TYPES | MIXED)[dtype]
    tensors = [spec.tensors[name] for name in names]
    given = {spec.tensors[name].name: GGMLQuantizationType[kind] for name, kind in types.items()}
    kinds = [given.get(tensor.name) or _kind(tensor, wanted) for tensor in tensors]
    rows = _rows(spec, tensors, kinds)
    stored = itertools.chain(
        (_stored(tensor, kind, value) for tensor, kind, value in zip(tensors, kinds, values, strict=True)),
        (np.asarray(table, np.float32) for table in spec.tables.values()),
    )
    header, written = _header(spec, file_type, rows), dict[str, StoredTensor]()
    with staged_file(
        path,
        len(header) + _data_bytes(rows),
        check=lambda stage: check_read_back(stage, header, written, _read_back),
    ) as file:
        file.write(header)
        for row in rows:
            digest = TensorDigest()
            for piece in itertools.islice(stored, row.pieces):
                # Not by GGUFWriter, whose `tofile` reports no error if the disk is full.
                file.write(digest.add(piece))
            assert digest.nbytes == row.nbytes, row
            file.write(bytes(_padding(row.nbytes)))
            written[row.name] = digest.stored(row.kind.name, row.shape)
        assert next(stored, None) is None, "a tensor without a row in the table"


def tensor_types(spec: GgufSpec, dtype: str) -> dict[str, str]:
    """Returns the type that `write_gguf` gives each tensor, by Hugging Face's name."""
    return {name: _kind(tensor, TYPES[dtype][0]).name for name, tensor in spec.tensors.items()}


def write_outline(path: Path, spec: GgufSpec, dtype: str) -> None:
    """Writes a file whose weights are a hole, for readers of the header."""
    wanted, file_type = TYPES[dtype]
    tensors = sorted(spec.tensors.values(), key=lambda tensor: stack_name(tensor.name))
    rows = _rows(spec, tensors, [_kind(tensor, wanted) for tensor in tensors])
    with path.open("wb") as file:
        file.write(_header(spec, file_type, rows))
        file.truncate(file.tell() + _data_bytes(rows))


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


def _rows(spec: GgufSpec, tensors: Sequence[OutputTensor], kinds: Sequence[GGMLQuantizationType]) -> list[_Row]:
    """Returns the rows of the tensor table; consecutive experts of one projection share one."""
    rows = []
    pairs = zip(tensors, kinds, strict=True)
    for name, group in itertools.groupby(pairs, key=lambda pair: stack_name(pair[0].name)):
        (first, kind), *others = group
        stack = () if name == first.name else (1 + len(others),)
        rows.append(_Row(name, (*stack, *first.shape), kind, 1 + len(others)))
    return rows + [_Row(name, table.shape, F32) for name, table in spec.tables.items()]


def _data_bytes(rows: Sequence[_Row]) -> int:
    return sum(row.nbytes + _padding(row.nbytes) for row in rows)


def _kind(tensor: OutputTensor, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(tensor.shape) == 1 or ROUTERS.fullmatch(tensor.name):
        return F32
    return F16 if tensor.shape[-1] % GGML_QUANT_SIZES[wanted][0] else wanted


def _stored(tensor: OutputTensor, kind: GGMLQuantizationType, value: np.ndarray | GgmlTensor) -> np.ndarray:
    """Returns a tensor in the order and type of the file."""
    if isinstance(value, GgmlTensor):
        assert value.ggml_type == kind.name, (tensor.name, value.ggml_type, kind)
        return np.ascontiguousarray(tensor.transform.reordered(np.asarray(value.codes)))
    ordered = np.ascontiguousarray(tensor.transform.inverse(value.reshape(tensor.shape)))
    with np.errstate(over="ignore"):  # the check names the tensor
        stored = np.ascontiguousarray(quantize(ordered, kind))
    check_range(tensor.name, ordered, stored)
    return stored


def _header(spec: GgufSpec, file_type: LlamaFileType, rows: Sequence[_Row]) -> bytes:
    """Returns the bytes before the first tensor."""
    out = io.BytesIO()
    writer = GGUFWriter(None, spec.architecture)
    for key in spec.keys:
        writer.add_key_value(*key)
    writer.add_file_type(file_type)
    for row in rows:
        writer.add_tensor_info(row.name, row.shape_in_bytes, np.dtype(np.uint8), row.nbytes, raw_dtype=row.kind)
    writer.fout, writer.state = [cast(io.BufferedWriter, out)], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return out.getvalue() + bytes(_padding(out.tell()))


def _padding(nbytes: int) -> int:
    return -nbytes % GGUF_DEFAULT_ALIGNMENT


def _read_back(path: Path) -> dict[str, StoredTensor]:
    """Reads the tensors of a file."""
    return {
        info.name: StoredTensor.of(info.type.name, info.shape, map_bytes(path, info.offset, info.nbytes))
        for info in parse_header(path).tensors
    }
