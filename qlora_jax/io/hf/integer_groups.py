"""Weights in groups of 4-bit integers, w = scale (code - zero), which GPTQ, AWQ and compressed-tensors pack into words.

Each method has a file that unpacks its tensors; this one turns the result into entries. Blocks of INT4
(pallas_kernels/formats/ggml_blocks.py) hold the same integers and scales, so nothing is rounded.

Dimension key: N out, K in, G groups per row, B blocks per row.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Integer, Shaped, UInt8

from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS, int_type
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from qlora_jax.metadata import check_value, shorten
from qlora_jax.model_source import ACT_ORDER, TensorEntry
from qlora_jax.models.tensor_names import MAX_LINES, lines_by_layer

GIVE_16_BITS = "Give the folder of the 16-bit model that these weights were made from: loading quantizes it"
SCALE_TYPES = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
PART = 32  # weights; a group is whole parts
WHOLE_ROW = -1  # group_size of one group per row
SLICE_WEIGHTS = 1 << 20  # weights that are dequantized together, which takes several temporaries of their size

Parts = Mapping[str, TensorEntry]  # the tensors of one weight, by the last part of their names
Settings = Mapping[str, Any]  # quantization_config, checked against the method's TypedDict


class Groups(NamedTuple):
    """Integers and scales of some rows of a weight.

    Attributes:
      codes: 0 to 15.
      zeros: 0 to 15.
      scales: float16 or bfloat16.
    """

    codes: UInt8[np.ndarray, "N K"]
    zeros: UInt8[np.ndarray, "N G"]
    scales: Shaped[np.ndarray, "N G"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegerWeight:
    """A weight in groups of integers, whose tensors were checked.

    Attributes:
      shape: (N, K).
      group_size: columns per group.
      scale_type: float16 or bfloat16.
      read: (first, end) -> these rows.
      order: group of each column, [K]; None if groups are runs of columns.
    """

    shape: tuple[int, int]
    group_size: int
    scale_type: np.dtype
    read: Callable[[int, int], Groups]
    order: Integer[np.ndarray, "K"] | None = None


class IntegerMethod(NamedTuple):
    """One method's form of such weights.

    Attributes:
      title: its name in messages.
      settings: TypedDict of the keys of quantization_config that are used.
      problems: (settings) -> a line per setting that is not supported.
      parts: last part of a tensor's name -> True if every weight has this tensor. The first has the codes.
      weight: (tensors, settings) -> the weight; raises ValueError with everything that is wrong.
    """

    title: str
    settings: type
    problems: Callable[[Settings], list[str]]
    parts: Mapping[str, bool]
    weight: Callable[[Parts, Settings], IntegerWeight]


def check_settings(path: Path, quantization: Settings, method: IntegerMethod) -> Settings:
    """Returns the settings of a method from quantization_config.

    Raises:
      ValueError: settings have other types, or are not supported; all are listed.
    """
    settings = check_value(quantization, method.settings, f"{path}, quantization_config")
    if problems := method.problems(settings):
        raise ValueError(
            f"{path}: quantization_config of {method.title} is not supported ({'; '.join(problems)}). {GIVE_16_BITS}"
        )
    return settings


def group_integers(folder: Path, tensors: Parts, method: IntegerMethod, settings: Settings) -> dict[str, TensorEntry]:
    """Replaces the tensors of each weight in integers by one entry; other tensors stay unchanged.

    Raises:
      ValueError: lists everything that is wrong with the tensors.
    """
    stems: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in tensors.items():
        stem, _, part = name.rpartition(".")
        if part in method.parts:
            stems.setdefault(stem, {})[part] = entry
    found, problems = {}, {}
    for stem, parts in stems.items():
        try:
            found[f"{stem}.weight"] = _entry(f"{stem}.weight", parts, method, settings, tensors)
        except ValueError as error:
            problems.setdefault(str(error), []).append(stem)
    if not stems:
        problems = {f"no tensor is named .{next(iter(method.parts))}": ["model"]}
    lines = [line for problem, stems in problems.items() for line in lines_by_layer(problem, stems)]
    if lines:
        more = [f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
        text = "\n  ".join([*lines[:MAX_LINES], *more])
        raise ValueError(
            f"{folder}: {method.title} weights cannot be read. Use undamaged files, or the 16-bit model:\n  {text}"
        )
    used = {entry.name for parts in stems.values() for entry in parts.values()}
    return {name: entry for name, entry in tensors.items() if name not in used} | found


def _entry(name: str, parts: Parts, method: IntegerMethod, settings: Settings, tensors: Parts) -> TensorEntry:
    """Returns the entry of one weight; raises ValueError with its problems."""
    missing = [part for part, required in method.parts.items() if required and part not in parts]
    problems = [f"missing {', '.join(missing)}"] if missing else []
    if name in tensors:
        problems.append("weight in 16 bits next to its codes")
    if problems:
        raise ValueError("; ".join(problems))
    weight = method.weight(parts, settings)
    packed = weight.order is None
    return TensorEntry(
        name=name,
        shape=weight.shape,
        file_type=int_type(4, weight.group_size, weight.scale_type) if packed else ACT_ORDER,
        nbytes=sum(entry.nbytes for entry in parts.values()),
        read_rows=lambda first, end: dequantized(weight.read(first, end), weight.order),
        ranges_of=lambda first, end: tuple(each for entry in parts.values() for each in entry.ranges_of(0, entry.rows)),
        read_stored=(lambda first, end: as_blocks(weight.read(first, end))) if packed else None,
    )


def dequantized(groups: Groups, order: Integer[np.ndarray, "K"] | None = None) -> np.ndarray:
    """Returns the weights, f32 [N, K]; every product is exact."""
    rows, columns = groups.codes.shape
    if order is None:
        order = np.arange(columns) // (columns // groups.zeros.shape[1])
    weights_NK, step = np.empty((rows, columns), np.float32), max(1, SLICE_WEIGHTS // columns)
    for start in range(0, rows, step):
        codes, zeros, scales = (each[start : start + step].astype(np.float32) for each in groups)
        np.multiply(codes - zeros[:, order], scales[:, order], out=weights_NK[start : start + step])
    return weights_NK


def as_blocks(groups: Groups) -> GgmlTensor:
    """Returns the same integers and scales in blocks of INT4; a group larger than a block is several."""
    rows, columns = groups.codes.shape
    ggml_type = int_type(4, columns // groups.zeros.shape[1], groups.scales.dtype)
    blocks = columns // BLOCK_FORMATS[ggml_type].weights
    each = blocks // groups.zeros.shape[1]
    scales_NBb = np.ascontiguousarray(np.repeat(groups.scales, each, 1)).view(np.uint8).reshape(rows, blocks, 2)
    zeros_NBb = np.repeat(groups.zeros, each, 1)[..., None]
    low, high = np.moveaxis(groups.codes.reshape(rows, blocks, -1, 2, PART // 2), 3, 0)
    codes_NBb = (low | high << 4).reshape(rows, blocks, -1)
    codes = np.concatenate([scales_NBb, zeros_NBb, codes_NBb], -1).reshape(rows, -1)
    return GgmlTensor(codes=codes, ggml_type=ggml_type, shape=(rows, columns), dtype="float32")


def nibbles(words: Integer[np.ndarray, "rows words"]) -> UInt8[np.ndarray, "rows _"]:
    """Unpacks 32-bit words to 8 integers each, the lowest four bits first."""
    packed = np.ascontiguousarray(words, "<i4").view(np.uint8)
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(words), -1)


def group_setting_problems(settings: Settings) -> list[str]:
    """Returns a line if `group_size` is neither -1, one group per row, nor whole parts."""
    size = settings["group_size"]
    valid = size == WHOLE_ROW or (size > 0 and size % PART == 0)
    return [] if valid else [f"group_size: found {size}, expected {WHOLE_ROW} or a multiple of {PART}"]


def group_size_of(setting: int, columns: int) -> int:
    """Returns the columns per group of a weight; raises ValueError if they are not whole parts of its rows."""
    size = columns if setting == WHOLE_ROW else setting
    if problems := list(group_size_problems(size, columns)):
        raise ValueError("; ".join(problems))
    return size


def group_size_problems(size: int, columns: int) -> Iterator[str]:
    """Yields why groups of a size cannot be read from rows of some columns."""
    if size < 1 or columns % size:
        yield f"group_size: found {size}, expected a divisor of the {columns} inputs"
    elif size % PART:
        yield f"group_size: found {size} (of {columns} inputs), expected a multiple of {PART}"


def tensor_problems(parts: Parts, expected: Mapping[str, tuple[Sequence[str], tuple[int, ...]]]) -> list[str]:
    """Returns a line for each tensor that has not one of the types, or not the shape, that are expected of it."""
    return [
        f"{part}: found {parts[part].file_type} {list(parts[part].shape)}, expected {' or '.join(types)} {list(shape)}"
        for part, (types, shape) in expected.items()
        if part in parts and (parts[part].file_type not in types or parts[part].shape != shape)
    ]


def matrix_of_words(entry: TensorEntry) -> tuple[int, int]:
    """Returns the shape of a tensor of packed codes; raises ValueError if it is not a matrix of 32-bit words."""
    if entry.file_type != "I32" or len(entry.shape) != 2 or 0 in entry.shape:
        name = entry.name.rpartition(".")[2]
        raise ValueError(f"{name}: found {entry.file_type} {list(entry.shape)}, expected a matrix of I32")
    return entry.shape[0], entry.shape[1]


def column_order(entry: TensorEntry | None, columns: int, group_size: int) -> Integer[np.ndarray, "K"] | None:
    """Returns the group of each column, from a tensor that was checked; None if groups are runs of columns.

    Raises:
      ValueError: a group does not exist.
    """
    if entry is None:
        return None
    order = np.asarray(entry.read())
    if np.array_equal(order, np.arange(columns) // group_size):
        return None
    if order.min() < 0 or order.max() >= columns // group_size:
        raise ValueError(
            f"{entry.name.rpartition('.')[2]}: found groups {order.min()} to {order.max()}, expected 0 to "
            f"{columns // group_size - 1}"
        )
    return order


def setting_problems(settings: Settings, expected: Mapping[str, tuple[object, ...]]) -> list[str]:
    """Returns a line for each setting that is present and has none of the values expected of it."""
    return [
        f"{key}: found {shorten(settings[key])}, expected {' or '.join(map(str, values))}"
        for key, values in expected.items()
        if key in settings and settings[key] not in values
    ]
