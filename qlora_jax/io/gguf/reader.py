"""Reads a GGUF file: tensors are dequantized one at a time, with Hugging Face's names and row order."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from pallas_kernels.devices import target_device
from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.ggml_matmul.cpu import dequantize_layer
from pallas_kernels.native.library import problem as loops_problem
from qlora_jax.io.gguf.architectures import LONGROPE_FACTORS, ROPE_FACTORS, Architecture
from qlora_jax.io.gguf.config_reader import DRAFT_LAYERS, architecture_of, config_from_metadata, number_of_layers
from qlora_jax.io.gguf.expert_stacks import split_experts
from qlora_jax.io.gguf.header import GgufHeader, TensorInfo, parse_header
from qlora_jax.io.gguf.tokenizer_metadata import tokenizer_from_metadata
from qlora_jax.io.loading.draft_layers import split_drafts, without_drafts
from qlora_jax.model_source import ByteRange, ModelSource, TensorEntry, aligned_empty, map_bytes
from qlora_jax.untrusted_json import JsonObject

# Types of plain numbers, and types in blocks, which the gguf package dequantizes.
PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
BLOCKED = tuple(name for name in BLOCK_FORMATS if name in GGMLQuantizationType.__members__)

EMBEDDING = "token_embd.weight"
TABLES = {ROPE_FACTORS, *LONGROPE_FACTORS.values()}  # tensors that are part of the config
NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)(?:\.(?P<expert>\d+))?\.(?P<leaf>weight|bias)")

# Dequantizing needs several temporaries as large as its result, so it runs on slices of about this many weights.
SLICE_WEIGHTS = 1 << 20


def open_gguf(path: Path) -> ModelSource:
    """Opens the model in a GGUF file; its header is read and checked, tensors are not read.

    Raises:
      ValueError: not a GGUF file; truncated or corrupt; or the architecture, a key or a tensor type is not supported.
    """
    header = parse_header(path)
    architecture = architecture_of(path, header.metadata)
    odd = [info for info in header.tensors if info.type.name not in (*PLAIN, *BLOCKED)]
    if odd:
        kinds = sorted({info.type.name for info in odd})
        raise ValueError(
            f"{path}: {len(odd)} tensors have types that are not supported, such as {odd[0].name} (found "
            f"{', '.join(kinds)}, expected {', '.join((*PLAIN, *BLOCKED))}). Get the model in another quantization; "
            "the most exact are BF16 and Q8_0"
        )
    infos = {info.name: info for info in header.tensors}
    tables = {name: _read_table(path, infos[name]) for name in TABLES & infos.keys()}
    config = config_from_metadata(path, architecture, header.metadata, frozenset(infos), tables)
    if f"{architecture.name}.vocab_size" not in header.metadata and EMBEDDING in infos:
        config["vocab_size"] = infos[EMBEDDING].shape[0]  # may be fewer than there are tokens
    entries = [_entry(path, info, architecture, config) for info in weights_of(header, architecture)]
    _, drafts = _split_drafts(header, architecture)
    return ModelSource(
        path=path,
        config=without_drafts(config),
        tokenizer=tokenizer_from_metadata(path, header.metadata),
        tensors={entry.name: entry for entry in entries},
        drafts={name: info.nbytes for name, info in drafts.items()},
    )


def stored_names(path: Path) -> dict[str, str]:
    """Returns the name in a file of each tensor, by Hugging Face's name; see `weights_of`."""
    header = parse_header(path)
    architecture = architecture_of(path, header.metadata)
    return {hugging_face_name(info.name, architecture): info.name for info in weights_of(header, architecture)}


def weights_of(header: GgufHeader, architecture: Architecture) -> Iterator[TensorInfo]:
    """Yields the tensors of the model, those of experts one by one.

    Tables that are part of the config are left out, and so are layers that predict further tokens.
    """
    count = header.metadata.get(f"{architecture.name}.expert_count", 0)
    kept, _ = _split_drafts(header, architecture)
    return split_experts((info for name, info in kept.items() if name not in TABLES), count)


def _split_drafts(
    header: GgufHeader, architecture: Architecture
) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """Returns (the tensors of the model, those of layers that predict further tokens)."""
    layers = number_of_layers(architecture, header.metadata)
    more = header.metadata.get(f"{architecture.name}.{DRAFT_LAYERS}", 0)
    return split_drafts({info.name: info for info in header.tensors}, range(layers, layers + more))


def hugging_face_name(name: str, architecture: Architecture) -> str:
    """Maps "blk.3.attn_q.weight" to "model.layers.3.self_attn.q_proj.weight"; an unknown name stays unchanged.

    An expert of `blk.3.ffn_up_exps` is "blk.3.ffn_up_exps.17.weight", as of `split_experts`.

    The loader then reports it as unexpected, together with all other problems.
    """
    match = NAME.fullmatch(name)
    return (match and architecture.hugging_face_name(**match.groupdict())) or name


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RowTransform:
    """Converts a tensor from GGUF to Hugging Face: takes its rows in another order and subtracts a constant.

    Attributes:
      order: the position in the file of each of Hugging Face's rows; None for the same order.
      offset: the constant.
    """

    order: np.ndarray | None = None
    offset: float = 0.0

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """Converts a tensor from Hugging Face to GGUF, in f32."""
        return self.reordered(values.astype(np.float32) + np.float32(self.offset))

    def reordered(self, values: np.ndarray) -> np.ndarray:
        """Returns rows of any kind in the order of the file."""
        if self.order is None:
            return values
        rows = np.empty_like(values)
        rows[self.order] = values
        return rows


def _entry(path: Path, info: TensorInfo, architecture: Architecture, config: JsonObject) -> TensorEntry:
    transform = transform_of(path, info, architecture, config)
    stored = info.type.name in BLOCK_FORMATS and len(info.shape) == 2
    return TensorEntry(
        name=hugging_face_name(info.name, architecture),
        shape=info.shape,
        file_type=info.type.name,
        nbytes=info.nbytes,
        read_rows=functools.partial(_read_rows, path, info, transform),
        ranges_of=functools.partial(_ranges_of, path, info, transform),
        read_stored=functools.partial(_read_stored, path, info, transform) if stored else None,
    )


def transform_of(path: Path, info: TensorInfo, architecture: Architecture, config: JsonObject) -> RowTransform:
    """The transform that undoes the changes of llama.cpp's converter.

    Raises:
      ValueError: the tensor's rows do not match the config's heads.
    """
    match = NAME.fullmatch(info.name)
    part = match["part"] if match else ""
    if part.endswith("norm"):
        return RowTransform(offset=architecture.norm_offset)
    heads = config["num_key_value_heads" if part == "attn_k" else "num_attention_heads"]
    if architecture.permutes_rotary_rows and part in ("attn_q", "attn_k"):
        _check_rows(path, info, heads, 2, "an even number of rows")
        return RowTransform(order=_rotary_order(info.shape[0], heads))
    if architecture.fused_by_part and part == "attn_qkv":
        _check_rows(path, info, heads, 3, "as many rows of queries, keys and values")
        return RowTransform(order=_fused_order(info.shape[0], heads))
    if architecture.rotary_halves and part in ("attn_q", "attn_k"):
        assert architecture.partial is not None
        head_dim = config["head_dim"]
        _check_rows(path, info, heads, head_dim, f"{head_dim} rows")
        rotated = int(head_dim * config[architecture.partial])
        return RowTransform(order=_halves_order(info.shape[0], head_dim, rotated))
    return RowTransform()


def _check_rows(path: Path, info: TensorInfo, heads: int, groups: int, what: str) -> None:
    if info.shape[0] % (groups * heads) or info.nbytes % info.shape[0]:
        raise ValueError(
            f"{path}: tensor {info.name}, {info.type.name} {list(info.shape)}: its rows cannot be reordered (expected "
            f"{heads} heads of {what}). Download it again"
        )


def _read_table(path: Path, info: TensorInfo) -> np.ndarray:
    return _read_rows(path, info, RowTransform(), 0, math.prod(info.shape[:1])).reshape(info.shape)


def _read_rows(path: Path, info: TensorInfo, transform: RowTransform, first: int, end: int) -> np.ndarray:
    shape = (end - first, *info.shape[1:])
    raw = _stored_rows(path, info, transform, first, end)
    if info.type.name in PLAIN:
        values = raw.reshape(-1).view(PLAIN[info.type.name]).reshape(shape)
    elif len(info.shape) == 1:  # its blocks run along the only axis
        values = _dequantize(raw, info.type, info.shape)[first:end]
    else:
        values = _dequantize(raw, info.type, shape)
    return values.astype(np.float32) - np.float32(transform.offset) if transform.offset else values


def _read_stored(path: Path, info: TensorInfo, transform: RowTransform, first: int, end: int) -> GgmlTensor:
    """Some of Hugging Face's rows in the file's blocks; reordering moves whole rows, so nothing is rounded."""
    codes = _stored_rows(path, info, transform, first, end).reshape(end - first, -1)
    return GgmlTensor(codes=codes, ggml_type=info.type.name, shape=(end - first, info.shape[1]), dtype="float32")


def _stored_rows(path: Path, info: TensorInfo, transform: RowTransform, first: int, end: int) -> np.ndarray:
    """The bytes of some of Hugging Face's rows; all bytes of a vector of blocks."""
    if transform.order is None:
        return map_bytes(*_ranges_of(path, info, transform, first, end)[0])
    positions = transform.order[first:end]
    if not positions.size:
        return np.empty(0, np.uint8)
    lowest, row = int(positions.min()), _row_bytes(info)
    span = (int(positions.max()) + 1 - lowest) * row
    return map_bytes(path, info.offset + lowest * row, span).reshape(-1, row)[positions - lowest]


def _ranges_of(path: Path, info: TensorInfo, transform: RowTransform, first: int, end: int) -> tuple[ByteRange, ...]:
    """The runs of bytes in which some of Hugging Face's rows are stored."""
    if len(info.shape) <= 1 and info.type.name in BLOCKED:
        return (ByteRange(path, info.offset, info.nbytes),)
    row = _row_bytes(info)
    if transform.order is None:
        return (ByteRange(path, info.offset + first * row, (end - first) * row),)
    positions = np.sort(transform.order[first:end])
    runs = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
    return tuple(ByteRange(path, info.offset + int(run[0]) * row, len(run) * row) for run in runs if len(run))


def _row_bytes(info: TensorInfo) -> int:
    return info.nbytes // max(1, math.prod(info.shape[:1]))


def _rotary_order(rows: int, heads: int) -> np.ndarray:
    """Positions of Hugging Face's rows in the file, where the two rows of a rotary pair are neighbours."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)


def _halves_order(rows: int, head_dim: int, rotated: int) -> np.ndarray:
    """Positions of Hugging Face's rows, whose rotary pairs are neighbours, in the file, where they are halves."""
    of_head = np.arange(head_dim)
    of_head[:rotated] = np.arange(rotated).reshape(2, rotated // 2).T.reshape(rotated)
    return (np.arange(0, rows, head_dim)[:, None] + of_head).reshape(rows)


def _fused_order(rows: int, heads: int) -> np.ndarray:
    """Positions of Hugging Face's rows, ordered per head, in the file: all queries, all keys, all values."""
    return np.arange(rows).reshape(3, heads, rows // heads // 3).swapaxes(0, 1).reshape(rows)


def _dequantize(raw: np.ndarray, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the weights by the C++ loops, which are faster, or else by the gguf package, with the same bits."""
    if kind.name in BLOCK_FORMATS and target_device().platform == "cpu" and loops_problem() is None:
        return np.asarray(_by_loops(raw.reshape(math.prod(shape[:-1]), -1), kind.name, shape[-1])).reshape(shape)
    out = aligned_empty((math.prod(shape[:-1]), shape[-1]), np.float32)
    rows = raw.reshape(len(out), -1)
    step = max(1, SLICE_WEIGHTS // shape[-1])
    for start in range(0, len(out), step):
        out[start : start + step] = dequantize(rows[start : start + step], kind)
    return out.reshape(shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _by_loops(codes: jax.Array, ggml_type: str, columns: int) -> jax.Array:
    weight = GgmlTensor(codes=codes, ggml_type=ggml_type, shape=(len(codes), columns), dtype="float32")
    return dequantize_layer(weight, None, np.float32)
