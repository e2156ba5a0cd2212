"""Reads 4-bit weights that bitsandbytes wrote into safetensors; codes and constants stay unchanged.

A weight NAME of N x K is several tensors: NAME the packed codes in any dtype, NAME.absmax (f32, or 8-bit codes if
NAME.nested_absmax exists), NAME.quant_map, and NAME.quant_state.bitsandbytes__nf4 (or fp4), whose bytes are JSON.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict

import numpy as np
from pydantic import Field

from pallas_kernels.formats.dequantize import dequantize_numpy
from pallas_kernels.formats.layouts import LAYOUTS, natural_layout
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.tables import CODE_TABLES, dynamic_map
from qlora_jax.model_source import ByteRange, TensorEntry
from qlora_jax.untrusted_json import MAX_BYTES, Count, decode_json

STATE = re.compile(r"(?P<name>.+)\.quant_state\.bitsandbytes__(?P<quant_type>nf4|fp4)")
CONSTANTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
ULP = 3e-7  # relative difference between tables that were computed on different machines


class QuantizationConfig(TypedDict, total=False):
    """The keys of quantization_config in config.json that are used."""

    quant_method: str
    load_in_4bit: bool


class QuantState(TypedDict):
    """The description of one 4-bit weight."""

    quant_type: str
    blocksize: Count
    shape: Annotated[list[Count], Field(min_length=2, max_length=2)]
    nested_blocksize: NotRequired[Count]
    nested_offset: NotRequired[float]
    dtype: NotRequired[Literal["float32", "float16", "bfloat16"]]


def is_bnb_4bit(quantization: Mapping[str, object]) -> bool:
    """True if a quantization_config describes 4-bit weights of bitsandbytes."""
    return quantization.get("quant_method") == "bitsandbytes" and bool(quantization.get("load_in_4bit"))


def group_quantized(path: Path, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Replaces the several tensors of each 4-bit weight by one entry; other tensors stay unchanged.

    Raises:
      ValueError: names every weight whose tensors contradict each other, are missing, or use another table.
    """
    states = [(match, entries[match[0]]) for name in entries if (match := STATE.fullmatch(name))]
    found, problems, used = {}, [], set()
    for match, entry in states:
        name, quant_type = match["name"], match["quant_type"]
        parts = {part: e for part in CONSTANTS if (e := entries.get(f"{name}.{part}")) is not None}
        used |= {entry.name, name, *(part.name for part in parts.values())}
        try:
            found[name] = _entry(name, quant_type, _state(entry), entries.get(name), parts)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    rest = {name: entry for name, entry in entries.items() if name not in used}
    unknown = [name for name, entry in rest.items() if entry.file_type == "U8"]
    problems += [f"{name}: bytes (U8) without a quant_state" for name in unknown]
    if problems:
        raise ValueError(f"{path}: 4-bit weights that cannot be read:\n  " + "\n  ".join(problems))
    return rest | found


def _state(entry: TensorEntry) -> QuantState:
    if entry.nbytes > MAX_BYTES:
        raise ValueError(f"its quant_state is too large (found {entry.nbytes} bytes, expected at most {MAX_BYTES})")
    return decode_json(entry.read().tobytes(), QuantState, "its quant_state")


def _entry(
    name: str,
    quant_type: str,
    state: QuantState,
    codes: TensorEntry | None,
    parts: Mapping[str, TensorEntry],
) -> TensorEntry:
    """The weight's entry, after its tensors are checked against its quant_state."""
    nested = "nested_absmax" in parts
    required = {"absmax", "quant_map", *({"nested_absmax", "nested_quant_map"} if nested else ())}
    if codes is None or (missing := required - parts.keys()):
        raise ValueError(f"{sorted(missing) if codes is not None else ['the codes']} missing")
    shape, block_size = tuple(state["shape"]), state["blocksize"]
    nested_block_size = state.get("nested_blocksize", 256)
    blocks = -(-math.prod(shape) // block_size)
    sizes = {"codes": (codes.nbytes, -(-math.prod(shape) // 2)), "absmax": (math.prod(parts["absmax"].shape), blocks)}
    if nested:
        sizes["nested_absmax"] = (math.prod(parts["nested_absmax"].shape), -(-blocks // nested_block_size))
    problems = [
        f"{part}: found {found}, expected {expected}" for part, (found, expected) in sizes.items() if found != expected
    ]
    if state["quant_type"] != quant_type:
        problems.append(f"{state['quant_type']} in its quant_state, {quant_type} in the tensor's name")
    problems += _type_problems(parts, nested) or _table_problems(quant_type, parts)
    if problems:
        raise ValueError(f"{'; '.join(problems)} (for {list(shape)} in blocks of {block_size})")
    like = QTensor(
        codes=None,
        quant_type=quant_type,
        block_size=block_size,
        nested_block_size=nested_block_size,
        shape=shape,
        dtype=str(state.get("dtype", "float32")),
        layout=natural_layout(shape, block_size),
    )
    offset = np.float32(state.get("nested_offset", 0.0))
    read = functools.partial(_read_quantized, like, codes, parts, offset if nested else None)
    return TensorEntry(
        name=name,
        shape=shape,
        file_type=quant_type.upper(),
        nbytes=codes.nbytes + sum(part.nbytes for part in parts.values()),
        read_rows=lambda first, end: dequantize_numpy(read(), np.float32)[first:end],
        ranges_of=functools.partial(_ranges_of, like, codes, parts),
        read_quantized=read,
    )


def _ranges_of(
    like: QTensor, codes: TensorEntry, parts: Mapping[str, TensorEntry], first: int, end: int
) -> tuple[ByteRange, ...]:
    """The codes of some rows, and all constants, which are few; all codes if rows are not whole blocks."""
    (stored,) = codes.ranges_of(0, codes.rows)
    if like.layout == "bnb":
        row = like.shape[1] // 2
        stored = ByteRange(stored.path, stored.offset + first * row, (end - first) * row)
    return (stored, *(each for part in parts.values() for each in part.ranges_of(0, part.rows)))


def _type_problems(parts: Mapping[str, TensorEntry], nested: bool) -> list[str]:
    expected = dict.fromkeys(parts, "F32") | {"absmax": "U8" if nested else "F32"}
    return [
        f"{part}: found {entry.file_type}, expected {expected[part]}"
        for part, entry in parts.items()
        if entry.file_type != expected[part]
    ]


def _table_problems(quant_type: str, parts: Mapping[str, TensorEntry]) -> list[str]:
    tables = {"quant_map": CODE_TABLES[quant_type], "nested_quant_map": dynamic_map()}
    return [
        f"{part} is not the table of {quant_type if part == 'quant_map' else 'the dynamic 8-bit map'}"
        for part, table in tables.items()
        if part in parts and not _is_table(parts[part], table)
    ]


def _is_table(entry: TensorEntry, table: np.ndarray) -> bool:
    return math.prod(entry.shape) == table.size and np.allclose(entry.read().reshape(-1), table, rtol=ULP, atol=0)


def _read_quantized(
    like: QTensor, codes: TensorEntry, parts: Mapping[str, TensorEntry], offset: np.float32 | None
) -> QTensor:
    """The codes and constants in the file."""
    layout = LAYOUTS[like.layout]
    constants_shape = layout.constants_shape(like.shape, like.block_size)
    packed = np.ascontiguousarray(codes.read()).reshape(-1).view(np.uint8).reshape(layout.codes_shape(like.shape))
    absmax = parts["absmax"].read().reshape(constants_shape)
    if offset is None:
        return dataclasses.replace(like, codes=packed, absmax=absmax)
    nested = {"nested_absmax": parts["nested_absmax"].read().reshape(-1), "nested_offset": np.asarray(offset)}
    return dataclasses.replace(like, codes=packed, absmax_codes=absmax, **nested)
