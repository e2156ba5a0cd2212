"""The quantizer in NumPy: bit-identical to bitsandbytes on CPUs, subnormal weights included."""

import numpy as np

from pallas_kernels.formats.layouts import pack_pairs
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.tables import CODE_BY_RANK, MIDPOINTS
from qlora_jax.quant.double_quant import assemble, check_offset
from qlora_jax.quant.settings import QuantSettings, check_finite, check_weight

# bitsandbytes keeps reciprocals finite with this clamp. It stores constants of whole blocks unclamped, and the constant
# of a partial block clamped.
SMALLEST_ABSMAX = np.float32(1e-38)


def quantize_numpy(
    weight: np.ndarray,
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    nested_block_size: int = 256,
) -> QTensor:
    """Quantizes a weight in NumPy, with the arguments and errors of `quantize`; slower, but exact at any scale."""
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
    if double_quant:
        check_offset(qt.nested_offset, absmax)
    return qt


def _blocks(weight: np.ndarray, block_size: int) -> tuple[np.ndarray, bool]:
    """Returns ([blocks, block_size] padded with zeros, True if the last block is partial)."""
    padding = -weight.size % block_size
    return np.pad(weight.reshape(-1), (0, padding)).reshape(-1, block_size), padding > 0


def _normalize(blocks: np.ndarray, partial: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns (absmax, w / absmax): a reciprocal in whole blocks, a quotient in a partial one, as in bitsandbytes."""
    absmax = np.abs(blocks).max(axis=-1)
    normalized = blocks * (np.float32(1) / np.maximum(absmax, SMALLEST_ABSMAX))[:, None]
    if partial:
        absmax[-1] = np.maximum(absmax[-1], SMALLEST_ABSMAX)
        normalized[-1] = blocks[-1] / absmax[-1]
    return absmax, normalized


def _rank(normalized: np.ndarray, midpoints: np.ndarray) -> np.ndarray:
    """Counts sum_j (x > midpoint_j) with one byte of scratch per element, where searchsorted takes eight."""
    rank = np.zeros(normalized.shape, np.uint8)
    for midpoint in midpoints:
        rank += normalized > midpoint
    return rank
