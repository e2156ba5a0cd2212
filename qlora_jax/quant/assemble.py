"""Codes and block constants of a weight, put into a QTensor."""

import math
from typing import Any

from pallas_kernels.formats.layouts import LAYOUTS, natural_layout
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.quant.double_quant import mean, quantize_constants
from qlora_jax.quant.settings import QuantSettings

Array = Any  # numpy.ndarray or jax.Array


def assemble(codes: Array, absmax: Array, settings: QuantSettings, shape: tuple[int, ...], dtype: str) -> QTensor:
    """The QTensor of one weight from its codes [blocks, block_size/2], two a byte, and its constants [blocks].

    The layout is `bnb` for a matrix whose rows are whole blocks, else `flat`; what is left of the last, partial block
    holds the code of zero, as bitsandbytes pads.
    """
    layout = natural_layout(shape, settings.block_size)
    stored = -(-math.prod(shape) // 2)
    constants_shape = LAYOUTS[layout].constants_shape(shape, settings.block_size)
    return QTensor(
        codes=codes.reshape(-1)[:stored].reshape(LAYOUTS[layout].codes_shape(shape)),
        **_constants(absmax, constants_shape, settings),
        quant_type=settings.quant_type,
        block_size=settings.block_size,
        nested_block_size=settings.nested_block_size,
        shape=tuple(shape),
        dtype=dtype,
        layout=layout,
    )


def _constants(absmax: Array, shape: tuple[int, ...], settings: QuantSettings) -> dict[str, Array]:
    """The leaves of a QTensor beside its codes."""
    if not settings.double_quant:
        return {"absmax": absmax.reshape(shape)}
    offset = mean(absmax)
    absmax_codes, nested_absmax = quantize_constants(absmax, offset, settings.nested_block_size)
    return {"absmax_codes": absmax_codes.reshape(shape), "nested_absmax": nested_absmax, "nested_offset": offset}
