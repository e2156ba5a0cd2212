"""Where the codes of a weight lie in its bytes, and exact repacks between all layouts.

Dimension key: N out, K in, G = K / block_size, E = elements of `shape`; `...` stacked layers. A byte holds two codes,
one in its high and one in its low nibble. With code(n, k), or code(e) over the flattened weight:

| layout       | codes                | byte                                           | constants               |
|--------------|----------------------|------------------------------------------------|-------------------------|
| `bnb`        | u8 [..., N, K/2]     | [n, j] = code(n, 2j) << 4 or code(n, 2j+1)     | [..., N, G]             |
| `row_planar` | u8 [..., N/2, K]     | [i, k] = code(i, k) << 4 or code(i + N/2, k)   | [..., N, G]             |
| `flat`       | u8 [..., ceil(E/2)]  | [j] = code(2j) << 4 or code(2j+1)              | [..., ceil(E / block)]  |

`bnb` is bitsandbytes' byte order, so that import and export are reshapes; it needs K % block_size == 0. `row_planar`
unpacks to two contiguous halves, which is what CPUs like; it needs an even N besides. `flat` takes any shape: blocks
run over the flattened weight, the last may be partial, and an odd E leaves one nibble of padding.

Every function takes NumPy or JAX arrays and returns the same kind.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from pallas_kernels.formats.qtensor import QTensor

Array = Any  # numpy.ndarray or jax.Array


def pack_nibbles(high: Array, low: Array) -> Array:
    """byte = high << 4 | low, for codes 0..15 in uint8."""
    return (high << 4) | low


def unpack_nibbles(codes: Array) -> tuple[Array, Array]:
    """(byte >> 4, byte & 15)."""
    return codes >> 4, codes & 15


def pack_pairs(unpacked: Array) -> Array:
    """[..., 2J] codes -> [..., J] bytes, the first of two neighbours in the high nibble."""
    return pack_nibbles(unpacked[..., 0::2], unpacked[..., 1::2])


def unpack_pairs(codes: Array) -> Array:
    """[..., J] bytes -> [..., 2J] codes: the inverse of pack_pairs."""
    xp = codes.__array_namespace__()
    pairs = xp.stack(unpack_nibbles(codes), axis=-1)
    return pairs.reshape(*codes.shape[:-1], 2 * codes.shape[-1])


def pack_halves(unpacked: Array) -> Array:
    """[..., N, K] codes -> [..., N/2, K] bytes, rows i and i + N/2 in the high and low nibbles."""
    half = unpacked.shape[-2] // 2
    return pack_nibbles(unpacked[..., :half, :], unpacked[..., half:, :])


def unpack_halves(codes: Array) -> Array:
    """[..., N/2, K] bytes -> [..., N, K] codes: the inverse of pack_halves."""
    xp = codes.__array_namespace__()
    return xp.concat(unpack_nibbles(codes), axis=-2)


def _flat_to_bnb(codes: Array, shape: tuple[int, ...]) -> Array:
    rows, columns = shape
    return codes.reshape(*codes.shape[:-1], rows, columns // 2)


def _bnb_to_flat(codes: Array, shape: tuple[int, ...]) -> Array:
    return codes.reshape(*codes.shape[:-2], math.prod(shape) // 2)


def _row_planar_to_bnb(codes: Array, shape: tuple[int, ...]) -> Array:
    return pack_pairs(unpack_halves(codes))


def _bnb_to_row_planar(codes: Array, shape: tuple[int, ...]) -> Array:
    return pack_halves(unpack_pairs(codes))


def _unchanged(codes: Array, shape: tuple[int, ...]) -> Array:
    return codes


def _unpack_bnb(codes: Array, shape: tuple[int, ...]) -> Array:
    return unpack_pairs(codes)


def _unpack_row_planar(codes: Array, shape: tuple[int, ...]) -> Array:
    return unpack_halves(codes)


def _unpack_flat(codes: Array, shape: tuple[int, ...]) -> Array:
    elements = unpack_pairs(codes)[..., : math.prod(shape)]
    return elements.reshape(*codes.shape[:-1], *shape)


@dataclasses.dataclass(frozen=True)
class Layout:
    """One row of the table above: shapes and conversions for a weight of static `shape`, stacks allowed."""

    codes_shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    constants_shape: Callable[[tuple[int, ...], int], tuple[int, ...]]
    unpack: Callable[[Array, tuple[int, ...]], Array]
    to_bnb: Callable[[Array, tuple[int, ...]], Array]
    from_bnb: Callable[[Array, tuple[int, ...]], Array]


def _rows_of_blocks(shape: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    return (shape[0], shape[1] // block_size)


def _flat_blocks(shape: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    return (-(-math.prod(shape) // block_size),)


LAYOUTS: dict[str, Layout] = {
    "bnb": Layout(
        codes_shape=lambda shape: (shape[0], shape[1] // 2),
        constants_shape=_rows_of_blocks,
        unpack=_unpack_bnb,
        to_bnb=_unchanged,
        from_bnb=_unchanged,
    ),
    "row_planar": Layout(
        codes_shape=lambda shape: (shape[0] // 2, shape[1]),
        constants_shape=_rows_of_blocks,
        unpack=_unpack_row_planar,
        to_bnb=_row_planar_to_bnb,
        from_bnb=_bnb_to_row_planar,
    ),
    "flat": Layout(
        codes_shape=lambda shape: (-(-math.prod(shape) // 2),),
        constants_shape=_flat_blocks,
        unpack=_unpack_flat,
        to_bnb=_flat_to_bnb,
        from_bnb=_bnb_to_flat,
    ),
}


def layout_problem(layout: str, shape: tuple[int, ...], block_size: int) -> str | None:
    """Why a weight of this shape cannot have this layout, or None where it can."""
    if layout not in LAYOUTS:
        return f"layout {layout!r} is not known; known: {', '.join(LAYOUTS)}"
    if layout == "flat":
        return None
    if len(shape) != 2 or shape[1] % block_size:
        return f"layout {layout!r} needs a matrix [N, K] with K % {block_size} == 0, got shape {shape}; use 'flat'"
    if layout == "row_planar" and shape[0] % 2:
        return f"layout 'row_planar' needs an even N, got shape {shape}; use 'bnb'"
    return None


def natural_layout(shape: tuple[int, ...], block_size: int) -> str:
    """`bnb` where the weight is a matrix whose rows are whole blocks, else `flat`."""
    return "flat" if layout_problem("bnb", shape, block_size) else "bnb"


def repack(qt: QTensor, layout: str) -> QTensor:
    """The same weight, to the bit, with its codes in `layout`; double quantization and stacks are kept.

    Raises:
      ValueError: the weight's shape does not allow the layout.
    """
    if layout == qt.layout:
        return qt
    if problem := layout_problem(layout, qt.shape, qt.block_size):
        raise ValueError(f"cannot repack from {qt.layout!r}: {problem}")
    if qt.layout == "flat" and (problem := layout_problem("bnb", qt.shape, qt.block_size)):
        raise ValueError(f"cannot repack from 'flat': {problem}")
    codes = LAYOUTS[layout].from_bnb(LAYOUTS[qt.layout].to_bnb(qt.codes, qt.shape), qt.shape)
    shape = (*qt.stack_shape, *LAYOUTS[layout].constants_shape(qt.shape, qt.block_size))
    return dataclasses.replace(
        qt,
        codes=codes,
        absmax=None if qt.double_quant else qt.absmax.reshape(shape),
        absmax_codes=qt.absmax_codes.reshape(shape) if qt.double_quant else None,
        layout=layout,
    )
