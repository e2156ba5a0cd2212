"""Reads a GGUF file: tensors dequantized one at a time, under Hugging Face's names and in its row order."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from qlora_jax.io.gguf.architectures import LONGROPE_FACTORS, ROPE_FACTORS, Architecture
from qlora_jax.io.gguf.config_reader import architecture_of, check_types, config_from_metadata
from qlora_jax.io.gguf.header import TensorInfo, parse_header
from qlora_jax.io.gguf.tokenizer_reader import tokenizer_from_metadata
from qlora_jax.io.model_source import ByteRange, ModelSource, TensorEntry, map_bytes

# Types stored as plain numbers, and types whose blocks the gguf package dequantizes.
PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
BLOCKED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")

TABLES = {ROPE_FACTORS, *LONGROPE_FACTORS.values()}  # tensors that are part of the config
NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<leaf>weight|bias)")

# Dequantizing makes several temporaries as large as its result, so it goes by slices of about this many weights.
SLICE_WEIGHTS = 1 << 20
ALIGNMENT = 64  # bytes


def open_gguf(path: Path) -> ModelSource:
    """The model in a GGUF file; its header is read and checked, tensors are not.

    Raises:
      ValueError: no GGUF file, truncated, corrupt, or with an architecture, attribute or tensor type not supported.
    """
    header = parse_header(path)
    check_types(path, header.metadata)
    architecture = architecture_of(path, header.metadata)
    _check_tensor_types(path, header.tensors)
    infos = {info.name: info for info in header.tensors}
    tables = {name: _read(path, infos[name], Change()) for name in TABLES & infos.keys()}
    config = config_from_metadata(path, architecture, header.metadata, frozenset(infos), tables)
    entries = [_entry(path, info, architecture, config) for info in header.tensors if info.name not in TABLES]
    return ModelSource(
        path=path,
        config=config,
        tokenizer=tokenizer_from_metadata(path, header.metadata),
        tensors={entry.name: entry for entry in entries},
    )


def hugging_face_name(name: str, architecture: Architecture) -> str:
    """ "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"; a name without counterpart stays as it is.

    The loader then refuses it by that name, with everything else that does not fit.
    """
    match = NAME.fullmatch(name)
    return (match and architecture.hugging_face_name(match["layer"], match["part"], match["leaf"])) or name


def _check_tensor_types(path: Path, tensors: list[TensorInfo]) -> None:
    odd = [info for info in tensors if info.type.name not in (*PLAIN, *BLOCKED)]
    if odd:
        kinds = sorted({info.type.name for info in odd})
        raise ValueError(
            f"{path}: {len(odd)} tensors have types that are not supported ({', '.join(kinds)}), the first is "
            f"{odd[0].name}; supported: {', '.join((*PLAIN, *BLOCKED))}. Get the model in another quantization, the "
            "best of these is BF16 or Q8_0."
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What has to be done to a tensor of the file: its rows taken in another order, a constant subtracted."""

    order: np.ndarray | None = None
    offset: float = 0.0

    def undone(self, values: np.ndarray) -> np.ndarray:
        """A tensor as the file has it, from one as Hugging Face has it; f32."""
        values = values.astype(np.float32) + np.float32(self.offset)
        if self.order is None:
            return values
        rows = np.empty_like(values)
        rows[self.order] = values
        return rows


def _entry(path: Path, info: TensorInfo, architecture: Architecture, config: dict[str, Any]) -> TensorEntry:
    return TensorEntry(
        name=hugging_face_name(info.name, architecture),
        shape=info.shape,
        file_type=info.type.name,
        nbytes=info.nbytes,
        read=functools.partial(_read, path, info, change_of(path, info, architecture, config)),
        byte_ranges=(ByteRange(path, info.offset, info.nbytes),),
    )


def change_of(path: Path, info: TensorInfo, architecture: Architecture, config: Mapping[str, Any]) -> Change:
    """The inverse of what the converter did."""
    match = NAME.fullmatch(info.name)
    part = match["part"] if match else ""
    if part.endswith("norm"):
        return Change(offset=architecture.norm_offset)
    heads, groups = config["num_attention_heads"], 0
    if architecture.permutes_rotary_rows and part in ("attn_q", "attn_k"):
        heads, groups = heads if part == "attn_q" else config["num_key_value_heads"], 2
    elif architecture.fused_by_part and part == "attn_qkv":
        groups = 3
    if not groups:
        return Change()
    if info.shape[0] % (groups * heads) or info.nbytes % info.shape[0]:
        what = "an even number of rows" if groups == 2 else "as many rows of queries, keys and values"
        raise ValueError(
            f"{path}: tensor {info.name}, {info.type.name} {list(info.shape)}: its rows can't be put in the order of "
            f"Hugging Face, expected {heads} heads of {what}"
        )
    return Change(order=(_rotary_order if groups == 2 else _fused_order)(info.shape[0], heads))


def _read(path: Path, info: TensorInfo, change: Change) -> np.ndarray:
    raw = map_bytes(path, info.offset, info.nbytes)
    if change.order is not None:
        raw = raw.reshape(info.shape[0], -1)[change.order]
    if info.type.name in PLAIN:
        values = raw.reshape(-1).view(PLAIN[info.type.name]).reshape(info.shape)
    else:
        values = _dequantize(raw, info.type, info.shape)
    return values.astype(np.float32) - np.float32(change.offset) if change.offset else values


def _rotary_order(rows: int, heads: int) -> np.ndarray:
    """Where Hugging Face's rows lie in the file, which keeps the two rows of a rotary pair next to each other."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)


def _fused_order(rows: int, heads: int) -> np.ndarray:
    """Where Hugging Face's rows, head by head, lie in the file, which keeps queries, keys and values together."""
    return np.arange(rows).reshape(3, heads, rows // heads // 3).swapaxes(0, 1).reshape(rows)


def _dequantize(raw: np.ndarray, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> np.ndarray:
    out = _aligned_empty((math.prod(shape[:-1]), shape[-1]))
    rows = raw.reshape(len(out), -1)
    step = max(1, SLICE_WEIGHTS // shape[-1])
    for start in range(0, len(out), step):
        out[start : start + step] = dequantize(rows[start : start + step], kind)
    return out.reshape(shape)


def _aligned_empty(shape: tuple[int, int]) -> np.ndarray:
    """f32, not initialised, on an address that the CPU backend takes over as it is, where another would be copied."""
    buffer = np.empty(math.prod(shape) * 4 + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + math.prod(shape) * 4].view(np.float32).reshape(shape)
