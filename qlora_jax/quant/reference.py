"""The quantizer in NumPy: bitsandbytes' CPU results to the bit, subnormal weights included."""

import numpy as np

from pallas_kernels.formats.layouts import pack_pairs
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.tables import CODE_BY_RANK, MIDPOINTS
from qlora_jax.quant.double_quant import assemble
from qlora_jax.quant.settings import QuantSettings, check_finite, check_weight

# bitsandbytes keeps its reciprocals finite with this clamp. Constants of whole blocks are stored as they are, the
# constant of a partial block is stored clamped.
SMALLEST_ABSMAX = np.float32(1e-38)


def quantize_numpy(
    weight: np.ndarray,
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    nested_block_size: int = 256,
) -> QTensor:
    """code(e) = nearest table index of w[e] * (1 / absmax[block]): bitsandbytes to the bit, as NumPy leaves.

    The arguments and errors of `quantize`; slower, but exact for blocks of any scale.
    """
    settings = QuantSettings(
        quant_type=quant_type, block_size=block_size, double_quant=double_quant, nested_block_size=nested_block_size
    )
    weight = np.asarray(weight)
    check_weight(weight.shape, weight.dtype)
    check_finite(weight)
    blocks, partial = _blocks(weight.astype(np.float32), block_size)
    absmax, normalized = _normalize(blocks, partial)
    codes = pack_pairs(CODE_BY_RANK[quant_type][_rank(normalized, MIDPOINTS[quant_type])])
    with np.errstate(over="ignore", invalid="ignore"):
        qt = assemble(codes, absmax, settings, weight.shape, weight.dtype.name)
    if double_quant and not np.isfinite(qt.nested_offset):
        raise ValueError(
            f"cannot double-quantize the weight: its block constants, up to {absmax.max():.3g}, add up beyond float32; "
            f"scale the weight, or set double_quant=False"
        )
    return qt


def _blocks(weight: np.ndarray, block_size: int) -> tuple[np.ndarray, bool]:
    """[blocks, block_size] padded with zeros, and whether the last block is partial."""
    padding = -weight.size % block_size
    return np.pad(weight.reshape(-1), (0, padding)).reshape(-1, block_size), padding > 0


def _normalize(blocks: np.ndarray, partial: bool) -> tuple[np.ndarray, np.ndarray]:
    """(absmax, w / absmax): by a reciprocal in whole blocks, by a quotient in a partial one, as bitsandbytes does."""
    absmax = np.abs(blocks).max(axis=-1)
    normalized = blocks * (np.float32(1) / np.maximum(absmax, SMALLEST_ABSMAX))[:, None]
    if partial:
        absmax[-1] = np.maximum(absmax[-1], SMALLEST_ABSMAX)
        normalized[-1] = blocks[-1] / absmax[-1]
    return absmax, normalized


def _rank(normalized: np.ndarray, midpoints: np.ndarray) -> np.ndarray:
    """sum_j (x > midpoint_j), a midpoint at a time: one byte of scratch an element where searchsorted takes eight."""
    rank = np.zeros(normalized.shape, np.uint8)
    for midpoint in midpoints:
        rank += normalized > midpoint
    return rank
