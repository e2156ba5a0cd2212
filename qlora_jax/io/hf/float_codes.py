"""Weights in codes that are floating-point numbers: NVFP4, MXFP4, and FP8 in e4m3.

NVFP4 has two codes of E2M1 per byte, the first in the low bits, a scale of e4m3 for 16 of them, and an f32 scale of the
tensor. FP8 has a scale per rectangle of codes: a block, a row, or the tensor.

Dimension key: N out, K in, B blocks per row, R x C rectangles.
"""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import UInt8

from pallas_kernels.formats.ggml_blocks import (
    BLOCK_FORMATS,
    NVFP4_GROUP,
    PART,
    fp8_type,
    nvfp4_blocks,
    nvfp4_type,
    packed_parts,
)
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.ggml_matmul import api as ggml
from qlora_jax.io.hf.coded_weights import CodedWeight, Parts, tensor_problems
from qlora_jax.io.hf.integer_groups import integers
from qlora_jax.model_source import TensorEntry

FLOATS = ("F32", "BF16", "F16")  # types of scales
Rectangle = tuple[int | None, int | None]  # rows and columns that share a scale; None: all
GREATEST = 448 * 6  # the largest scale of e4m3 times the largest value of E2M1


def nvfp4_weight(parts: Parts, codes: str, of_tensor: str, inverse: bool) -> CodedWeight:
    """Returns a weight of NVFP4.

    Args:
      codes: the name of the tensor of codes; `weight_scale` has the scales of 16.
      of_tensor: the name of the tensor's scale.
      inverse: True if that scale divides the others, as in compressed-tensors; False if it multiplies them.

    Raises:
      ValueError: lists everything that is wrong with the tensors.
    """
    n, k = _matrix(parts[codes], "U8")
    k *= 2
    problems = tensor_problems(parts, {"weight_scale": (["F8_E4M3"], (n, k // NVFP4_GROUP))}) + _column_problems(k)
    problems += _scale_problems(parts[of_tensor], [(), (1,)])
    if problems:
        raise ValueError("; ".join(problems))
    scale = np.float32(parts[of_tensor].read().reshape(()))
    with np.errstate(all="ignore"):
        greatest = np.float32(GREATEST) / scale if inverse else np.float32(GREATEST) * scale
    if not np.isfinite(greatest):
        raise ValueError(f"{of_tensor}: found {scale}, expected a number with which all weights are finite")
    kind = nvfp4_type(k, inverse)

    def read(first: int, end: int) -> UInt8[np.ndarray, "N _"]:
        packed = np.ascontiguousarray(parts[codes].read_rows(first, end))
        scales = parts["weight_scale"].read_rows(first, end)
        return nvfp4_blocks(integers(packed), scales, scale, kind)

    return _coded((n, k), kind, read)


def mxfp4_weight(parts: Parts) -> CodedWeight:
    """Returns a weight of MXFP4: `weight_packed` has its codes, and `weight_scale` a power of two for 32 of them.

    Raises:
      ValueError: lists everything that is wrong with the tensors.
    """
    n, k = _matrix(parts["weight_packed"], "U8")
    k *= 2
    if problems := tensor_problems(parts, {"weight_scale": (["U8"], (n, k // PART))}) + _column_problems(k):
        raise ValueError("; ".join(problems))

    def read(first: int, end: int) -> UInt8[np.ndarray, "N _"]:
        codes = integers(np.ascontiguousarray(parts["weight_packed"].read_rows(first, end)))
        scales = parts["weight_scale"].read_rows(first, end)[..., None]
        packed = packed_parts(codes).reshape(*scales.shape[:2], -1)
        return np.concatenate([scales, packed], -1).reshape(end - first, -1)

    return _coded((n, k), "MXFP4", read)


def fp8_weight(parts: Parts, scale: str, rectangles: Sequence[Rectangle]) -> CodedWeight:
    """Returns a weight of FP8.

    Args:
      scale: the name of the tensor of scales.
      rectangles: (rows, columns) that may share a scale.

    Raises:
      ValueError: lists everything that is wrong with the tensors.
    """
    n, k = _matrix(parts["weight"], "F8_E4M3")
    whole = ((height or n, width or k) for height, width in rectangles)
    sizes = {(-(-n // height), -(-k // width)): (height, width) for height, width in whole}
    grids = [*sizes, *([(n,)] if (n, 1) in sizes else []), *([(1,), ()] if (1, 1) in sizes else [])]
    problems = _column_problems(k) + _scale_problems(parts[scale], grids)
    if problems:
        raise ValueError("; ".join(problems))
    grid = parts[scale].shape + (1,) * (2 - len(parts[scale].shape))
    height, width = sizes[grid[0], grid[1]]
    scales_RC = parts[scale].read().astype(np.float32).reshape(grid)
    kind = fp8_type(math.gcd(k, width))

    def read(first: int, end: int) -> UInt8[np.ndarray, "N _"]:
        block = BLOCK_FORMATS[kind].weights
        codes_NBb = np.ascontiguousarray(parts["weight"].read_rows(first, end)).view(np.uint8)
        codes_NBb = codes_NBb.reshape(end - first, k // block, block)
        scales_NB = scales_RC[np.arange(first, end) // height][:, np.arange(k // block) * block // width]
        header = np.ascontiguousarray(scales_NB)[..., None].view(np.uint8)
        return np.concatenate([header, codes_NBb], -1).reshape(end - first, -1)

    return _coded((n, k), kind, read)


def _coded(shape: tuple[int, int], kind: str, read: Callable[[int, int], np.ndarray]) -> CodedWeight:
    def read_stored(first: int, end: int) -> GgmlTensor:
        return GgmlTensor(codes=read(first, end), ggml_type=kind, shape=(end - first, shape[1]), dtype="float32")

    return CodedWeight(
        shape=shape,
        file_type=kind,
        read_rows=lambda first, end: np.asarray(_dequantized(read_stored(first, end))),
        read_stored=read_stored,
    )


@jax.jit
def _dequantized(weight: GgmlTensor) -> jax.Array:
    return ggml.dequantize_layer(weight, None, np.float32)


def _matrix(entry: TensorEntry, file_type: str) -> tuple[int, int]:
    if entry.file_type != file_type or len(entry.shape) != 2 or 0 in entry.shape:
        name = entry.name.rpartition(".")[2]
        raise ValueError(f"{name}: found {entry.file_type} {list(entry.shape)}, expected a matrix of {file_type}")
    return entry.shape[0], entry.shape[1]


def _column_problems(columns: int) -> list[str]:
    return [f"found {columns} inputs, expected a multiple of {PART}"] if columns % PART else []


def _scale_problems(entry: TensorEntry, shapes: Sequence[tuple[int, ...]]) -> list[str]:
    if entry.file_type in FLOATS and entry.shape in shapes:
        return []
    name, expected = entry.name.rpartition(".")[2], " or ".join(str(list(shape)) for shape in shapes)
    found = f"{entry.file_type} {list(entry.shape)}"
    return [f"{name}: found {found}, expected {' or '.join(FLOATS)}, {expected}"]
