"""The quantizer to NVFP4: the codes and scales of compressed-tensors for weights in f32, to the bit.

Dimension key: N out, K in, G groups of 16 columns per row.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, UInt8

from pallas_kernels.formats.ggml_blocks import NVFP4_GROUP, nvfp4_blocks

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
GREATEST_SCALE, GREATEST_VALUE = np.float32(448), np.float32(6)  # the largest numbers of e4m3 and of E2M1
SMALLEST_SCALE = np.float32(0.125)  # replaces 0, so that nothing is divided by 0
ABOVE, FROM = (0.25, 1.25, 2.5, 5), (0.75, 1.75, 3.5)  # a magnitude's code counts those that it exceeds, or reaches
SLICE_WEIGHTS = 1 << 20  # weights that are quantized together, which takes several temporaries of their size


class Nvfp4(NamedTuple):
    """A weight in NVFP4, w = code * scale / of_tensor.

    Attributes:
      codes: of E2M1.
      scales: of 16 codes each.
      of_tensor: the scale by which the others are divided.
    """

    codes: UInt8[np.ndarray, "N K"]
    scales: np.ndarray
    of_tensor: np.float32


def quantize_nvfp4(weight_NK: Float[np.ndarray, "N K"]) -> Nvfp4:
    """Returns a finite weight whose rows are whole groups, rounded to the nearest values, ties to even codes."""
    rows, columns = weight_NK.shape
    found = Nvfp4(
        np.empty((rows, columns), np.uint8), np.empty((rows, columns // NVFP4_GROUP), E4M3), _of_tensor(weight_NK)
    )
    step = max(1, SLICE_WEIGHTS // columns)
    for start in range(0, rows, step):
        own = slice(start, start + step)
        found.codes[own], found.scales[own] = _rows(weight_NK[own].astype(np.float32), found.of_tensor)
    return found


def nvfp4_blocks_of(weight_NK: Float[np.ndarray, "N K"], ggml_type: str) -> UInt8[np.ndarray, "N _"]:
    """Returns a finite weight quantized to blocks of NVFP4."""
    made = quantize_nvfp4(weight_NK)
    return nvfp4_blocks(made.codes, made.scales, made.of_tensor, ggml_type)


def _of_tensor(weight_NK: Float[np.ndarray, "N K"]) -> np.float32:
    """Returns the scale with which the largest weight has the greatest scale and value."""
    largest = np.float32(max(weight_NK.max(), -weight_NK.min()))
    with np.errstate(over="ignore"):
        # A reciprocal, because that is how torch divides a number by a tensor.
        scale = np.float32(1) / max(largest, np.finfo(np.float32).tiny) * (GREATEST_SCALE * GREATEST_VALUE)
    return scale if np.isfinite(scale) else np.float32(1)


def _rows(weight_NK: Float32[np.ndarray, "N K"], of_tensor: np.float32) -> tuple[UInt8[np.ndarray, "N K"], np.ndarray]:
    groups_NGk = weight_NK.reshape(len(weight_NK), -1, NVFP4_GROUP)
    exact_NG = np.abs(groups_NGk).max(-1) / GREATEST_VALUE * of_tensor
    scales_NG = np.minimum(exact_NG, GREATEST_SCALE).astype(E4M3)
    scales_NG = np.where(scales_NG == 0, SMALLEST_SCALE, scales_NG.astype(np.float32))
    scaled_NGk = groups_NGk / (scales_NG / of_tensor)[..., None]
    size_NGk = np.abs(scaled_NGk)
    codes_NGk = (scaled_NGk < 0).astype(np.uint8) << 3
    for compare, thresholds in ((np.greater, ABOVE), (np.greater_equal, FROM)):
        for threshold in thresholds:
            codes_NGk += compare(size_NGk, np.float32(threshold))
    return codes_NGk.reshape(weight_NK.shape), scales_NG.astype(E4M3)
