"""Weights in groups of integers, w = scale (code - zero), which GPTQ, AWQ and compressed-tensors pack into words.

Each method has a file that unpacks its tensors; this one turns the result into blocks of INT4 or INT8, which hold the
same integers and scales.

Dimension key: N out, K in, G groups per row, B blocks per row.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Integer, Shaped, UInt8

from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS, PART, int_type, packed_parts
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from qlora_jax.io.hf.coded_weights import CodedWeight, Settings
from qlora_jax.model_source import ACT_ORDER, TensorEntry

SCALE_TYPES = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
WHOLE_ROW = -1  # group_size of one group per row
SLICE_WEIGHTS = 1 << 20  # weights that are dequantized together, which takes several temporaries of their size


class Groups(NamedTuple):
    """Integers and scales of some rows of a weight.

    Attributes:
      codes: below 2^bits.
      zeros: below 2^bits.
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
      bits: of a code, at most 8.
      group_size: columns per group.
      scale_type: float16 or bfloat16.
      read: (first, end) -> these rows.
      order: group of each column, [K]; None if groups are runs of columns.
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    scale_type: np.dtype
    read: Callable[[int, int], Groups]
    order: Integer[np.ndarray, "K"] | None = None

    def coded(self) -> CodedWeight:
        """Returns the weight in blocks, of 4 bits for codes of fewer; a group larger than a block is several."""
        block_bits, packed = 4 if self.bits <= 4 else 8, self.order is None
        kind = int_type(block_bits, self.group_size, self.scale_type) if packed else ACT_ORDER
        return CodedWeight(
            shape=self.shape,
            file_type=kind,
            read_rows=lambda first, end: dequantized(self.read(first, end), self.order),
            read_stored=(lambda first, end: as_blocks(self.read(first, end), kind)) if packed else None,
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


def as_blocks(groups: Groups, ggml_type: str) -> GgmlTensor:
    """Returns the same integers and scales in blocks of INT4 or INT8."""
    rows, columns = groups.codes.shape
    blocks = columns // BLOCK_FORMATS[ggml_type].weights
    each = blocks // groups.zeros.shape[1]
    scales_NBb = np.ascontiguousarray(np.repeat(groups.scales, each, 1)).view(np.uint8).reshape(rows, blocks, 2)
    zeros_NBb = np.repeat(groups.zeros, each, 1)[..., None]
    codes = groups.codes if ggml_type.startswith("INT8") else packed_parts(groups.codes)
    codes = np.concatenate([scales_NBb, zeros_NBb, codes.reshape(rows, blocks, -1)], -1).reshape(rows, -1)
    return GgmlTensor(codes=codes, ggml_type=ggml_type, shape=(rows, columns), dtype="float32")


def integers(words: Integer[np.ndarray, "rows words"], bits: int = 4) -> UInt8[np.ndarray, "rows _"]:
    """Unpacks words of 32 or 8 bits to integers of 2, 4 or 8, those in the lowest bits first."""
    packed = np.ascontiguousarray(words).view(np.uint8)
    fields = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return np.stack(fields, -1).reshape(len(words), -1)


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
