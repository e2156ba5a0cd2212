"""Layouts: where a weight's codes lie in its bytes, and exact repacks between all layouts.

Dimension key: N out, K in, G = K / block_size, E = elements of `shape`; `...` stacked layers. A byte holds two codes,
one in its high and one in its low nibble. With code(n, k), or code(e) over the flattened weight:

| layout       | codes                     | byte                                             | constants              |
|--------------|---------------------------|--------------------------------------------------|------------------------|
| `bnb`        | u8 [..., N, K/2]          | [n, j] = code(n, 2j) << 4 or code(n, 2j+1)       | [..., N, G]            |
| `row_planar` | u8 [..., N/2, K]          | [i, k] = code(i, k) << 4 or code(i + N/2, k)     | [..., N, G]            |
| `split_k`    | u8 [..., N, 64 P]         | [n, 64p+j] = code(n, 128p+64+j) << 4 or          | [..., G, N]            |
|              | P = ceil(K / 128), j < 64 | code(n, 128p+j); past K the high nibble is 0     |                        |
| `flat`       | u8 [..., ceil(E/2)]       | [j] = code(2j) << 4 or code(2j+1)                | [..., ceil(E / block)] |

- `bnb` is bitsandbytes' byte order, so import and export are reshapes. It requires K % block_size == 0.
- `row_planar` unpacks to two contiguous halves, which suits CPUs. It also requires an even N.
- `split_k` is read by the GPU kernels: the nibbles of 64 consecutive bytes are two runs of 64 columns, each with one
  constant per row, and the constants of a run are contiguous. It requires N, K and blocks that are multiples of 64.
- `flat` takes any shape: blocks run over the flattened weight, the last may be partial, and an odd E leaves one nibble
  of padding.

In every layout, double quantization numbers blocks as bitsandbytes does: n * G + g.

Every function takes NumPy or JAX arrays and returns the same kind.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from pallas_kernels.formats.qtensor import QTensor

Array = Any  # numpy.ndarray or jax.Array

RUN = 64  # consecutive columns in `split_k`


def pack_nibbles(high: Array, low: Array) -> Array:
    """Packs two codes: byte = high << 4 | low, for codes 0..15 in uint8."""
    return (high << 4) | low


def unpack_nibbles(codes: Array) -> tuple[Array, Array]:
    """Returns (byte >> 4, byte & 15)."""
    return codes >> 4, codes & 15


def pack_pairs(unpacked: Array) -> Array:
    """Packs [..., 2J] codes to [..., J] bytes, the first of two neighbours in the high nibble."""
    return pack_nibbles(unpacked[..., 0::2], unpacked[..., 1::2])


def unpack_pairs(codes: Array) -> Array:
    """Unpacks [..., J] bytes to [..., 2J] codes: the inverse of pack_pairs."""
    xp = codes.__array_namespace__()
    pairs = xp.stack(unpack_nibbles(codes), axis=-1)
    return pairs.reshape(*codes.shape[:-1], 2 * codes.shape[-1])


def pack_halves(unpacked: Array) -> Array:
    """Packs [..., N, K] codes to [..., N/2, K] bytes, rows i and i + N/2 in the high and low nibbles."""
    half = unpacked.shape[-2] // 2
    return pack_nibbles(unpacked[..., :half, :], unpacked[..., half:, :])


def unpack_halves(codes: Array) -> Array:
    """Unpacks [..., N/2, K] bytes to [..., N, K] codes: the inverse of pack_halves."""
    xp = codes.__array_namespace__()
    return xp.concat(unpack_nibbles(codes), axis=-2)


def pack_runs(unpacked: Array) -> Array:
    """Packs [..., N, K] codes to [..., N, 64 ceil(K/128)] bytes, runs of 64 columns in low and high nibbles in turn."""
    xp = unpacked.__array_namespace__()
    padding = -unpacked.shape[-1] % (2 * RUN)
    padded = xp.pad(unpacked, [(0, 0)] * (unpacked.ndim - 1) + [(0, padding)])
    runs = padded.reshape(*unpacked.shape[:-1], -1, 2, RUN)
    return pack_nibbles(runs[..., 1, :], runs[..., 0, :]).reshape(*unpacked.shape[:-1], -1)


def unpack_runs(codes: Array, columns: int) -> Array:
    """Unpacks [..., N, 64 ceil(K/128)] bytes to [..., N, K] codes: the inverse of pack_runs, without its padding."""
    xp = codes.__array_namespace__()
    high, low = unpack_nibbles(codes.reshape(*codes.shape[:-1], -1, RUN))
    return xp.stack((low, high), axis=-2).reshape(*codes.shape[:-1], -1)[..., :columns]


def _flat_to_bnb(codes: Array, shape: tuple[int, ...]) -> Array:
    rows, columns = shape
    return codes.reshape(*codes.shape[:-1], rows, columns // 2)


def _bnb_to_flat(codes: Array, shape: tuple[int, ...]) -> Array:
    return codes.reshape(*codes.shape[:-2], math.prod(shape) // 2)


def _row_planar_to_bnb(codes: Array, shape: tuple[int, ...]) -> Array:
    return pack_pairs(unpack_halves(codes))


def _bnb_to_row_planar(codes: Array, shape: tuple[int, ...]) -> Array:
    return pack_halves(unpack_pairs(codes))


def _split_k_to_bnb(codes: Array, shape: tuple[int, ...]) -> Array:
    return pack_pairs(unpack_runs(codes, shape[1]))


def _bnb_to_split_k(codes: Array, shape: tuple[int, ...]) -> Array:
    return pack_runs(unpack_pairs(codes))


def _unchanged(codes: Array, shape: tuple[int, ...]) -> Array:
    return codes


def _unpack_bnb(codes: Array, shape: tuple[int, ...]) -> Array:
    return unpack_pairs(codes)


def _unpack_row_planar(codes: Array, shape: tuple[int, ...]) -> Array:
    return unpack_halves(codes)


def _unpack_split_k(codes: Array, shape: tuple[int, ...]) -> Array:
    return unpack_runs(codes, shape[1])


def _unpack_flat(codes: Array, shape: tuple[int, ...]) -> Array:
    elements = unpack_pairs(codes)[..., : math.prod(shape)]
    return elements.reshape(*codes.shape[:-1], *shape)


@dataclasses.dataclass(frozen=True)
class Layout:
    """One row of the table above: shapes and conversions for a weight of static `shape`, stacked or not.

    Attributes:
      codes_shape: shape -> the shape of the codes.
      blocks_shape: (shape, block_size) -> the shape of the constants in block order, (N, G) or (blocks,).
      unpack: (codes, shape) -> one code per element.
      to_bnb: (codes, shape) -> codes in `bnb` order.
      from_bnb: (codes, shape) -> codes in this layout.
      transposed: True if constants are stored as (G, N).
    """

    codes_shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    blocks_shape: Callable[[tuple[int, ...], int], tuple[int, ...]]
    unpack: Callable[[Array, tuple[int, ...]], Array]
    to_bnb: Callable[[Array, tuple[int, ...]], Array]
    from_bnb: Callable[[Array, tuple[int, ...]], Array]
    transposed: bool = False

    def constants_shape(self, shape: tuple[int, ...], block_size: int) -> tuple[int, ...]:
        """Returns the shape in which a weight's constants are stored."""
        blocks = self.blocks_shape(shape, block_size)
        return blocks[::-1] if self.transposed else blocks

    def turn(self, constants: Array) -> Array:
        """Converts stored constants to block order, or back."""
        return constants.swapaxes(-1, -2) if self.transposed else constants


def _rows_of_blocks(shape: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    return (shape[0], shape[1] // block_size)


def _flat_blocks(shape: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    return (-(-math.prod(shape) // block_size),)


LAYOUTS: dict[str, Layout] = {
    "bnb": Layout(
        codes_shape=lambda shape: (shape[0], shape[1] // 2),
        blocks_shape=_rows_of_blocks,
        unpack=_unpack_bnb,
        to_bnb=_unchanged,
        from_bnb=_unchanged,
    ),
    "row_planar": Layout(
        codes_shape=lambda shape: (shape[0] // 2, shape[1]),
        blocks_shape=_rows_of_blocks,
        unpack=_unpack_row_planar,
        to_bnb=_row_planar_to_bnb,
        from_bnb=_bnb_to_row_planar,
    ),
    "split_k": Layout(
        codes_shape=lambda shape: (shape[0], -(-shape[1] // (2 * RUN)) * RUN),
        blocks_shape=_rows_of_blocks,
        unpack=_unpack_split_k,
        to_bnb=_split_k_to_bnb,
        from_bnb=_bnb_to_split_k,
        transposed=True,
    ),
    "flat": Layout(
        codes_shape=lambda shape: (-(-math.prod(shape) // 2),),
        blocks_shape=_flat_blocks,
        unpack=_unpack_flat,
        to_bnb=_flat_to_bnb,
        from_bnb=_bnb_to_flat,
    ),
}


def layout_problem(layout: str, shape: tuple[int, ...], block_size: int) -> str | None:
    """Returns why a weight of this shape cannot have this layout, or None if it can."""
    if layout not in LAYOUTS:
        return f"layout {layout!r} is unknown (known: {', '.join(LAYOUTS)})"
    if layout == "flat":
        return None
    if len(shape) != 2 or shape[1] % block_size:
        return f"layout {layout!r} requires a matrix [N, K] with K % {block_size} == 0, found shape {shape}; use 'flat'"
    if layout == "row_planar" and shape[0] % 2:
        return f"layout 'row_planar' requires an even N, found shape {shape}; use 'bnb'"
    if layout == "split_k" and (shape[0] % RUN or shape[1] % RUN or block_size % RUN):
        return f"layout 'split_k' requires N, K, block_size in {RUN}s, found {shape=}, {block_size=}; use 'bnb'"
    return None


def natural_layout(shape: tuple[int, ...], block_size: int) -> str:
    """Returns `bnb` if the weight is a matrix whose rows are whole blocks, else `flat`."""
    return "flat" if layout_problem("bnb", shape, block_size) else "bnb"


def convert_codes(codes: Array, shape: tuple[int, ...], given: str, wanted: str) -> Array:
    """Returns codes of one layout in another, unchecked: some rows of a weight need not be a weight of the layout."""
    return codes if given == wanted else LAYOUTS[wanted].from_bnb(LAYOUTS[given].to_bnb(codes, shape), shape)


def repack(qt: QTensor, layout: str) -> QTensor:
    """Returns the same weight, bit for bit, in another layout, with its stack and its double quantization.

    Raises:
      ValueError: the weight's shape does not allow the layout.
    """
    if layout == qt.layout:
        return qt
    if problem := layout_problem(layout, qt.shape, qt.block_size):
        raise ValueError(f"cannot repack from {qt.layout!r}: {problem}")
    if qt.layout == "flat" and (problem := layout_problem("bnb", qt.shape, qt.block_size)):
        raise ValueError(f"cannot repack from 'flat': {problem}")
    return dataclasses.replace(
        qt,
        codes=convert_codes(qt.codes, qt.shape, qt.layout, layout),
        absmax=None if qt.double_quant else _repack_constants(qt, qt.absmax, layout),
        absmax_codes=_repack_constants(qt, qt.absmax_codes, layout) if qt.double_quant else None,
        layout=layout,
    )


def _repack_constants(qt: QTensor, constants: Array, layout: str) -> Array:
    in_order = LAYOUTS[qt.layout].turn(constants)
    shape = LAYOUTS[layout].blocks_shape(qt.shape, qt.block_size)
    return LAYOUTS[layout].turn(in_order.reshape(*qt.stack_shape, *shape))
