"""Double quantization (QLoRA paper, section 3): the block constants of a weight, themselves quantized to 8 bits.

absmax -> (absmax_codes, nested_absmax, nested_offset), read back as map8[absmax_codes] * nested_absmax + nested_offset.
As bitsandbytes' CPU build does it. Every function takes NumPy or JAX arrays, returns the same kind, and gives both the
same bits.
"""

import functools
from typing import Any

import numpy as np

from pallas_kernels.formats.rounding import rounded
from pallas_kernels.formats.tables import dynamic_map

Array = Any  # numpy.ndarray or jax.Array
LOOK_UP_SIZE = 65536


@functools.cache
def nearest_code_look_up() -> np.ndarray:
    """uint8[65536]: entry i is the code of the map value nearest to the i-th of 65,536 even steps from -1 to 1.

    bitsandbytes' CPU build quantizes through this table, which near a midpoint of the map is not always the nearest
    code: up to 0.3% of the codes differ from it.
    """
    levels = dynamic_map()
    steps = np.arange(LOOK_UP_SIZE) / (LOOK_UP_SIZE - 1) * 2.0 - 1.0
    return np.searchsorted((levels[:-1] + levels[1:]) / np.float32(2), steps).astype(np.uint8)


def _tree_sum(values: Array) -> Array:
    """[1]: the sum, added in one fixed order by every library and device: eight parts at a time, by pairs."""
    xp = values.__array_namespace__()
    while (n := values.shape[0]) > 1:
        columns = -(-n // 8)
        padded = xp.concat([values, xp.zeros(8 * columns - n, values.dtype)]).reshape(8, columns)
        parts = list(padded)
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
        values = parts[0]
    return values


def mean(absmax: Array) -> Array:
    """mean(absmax) in f32, correct to the last bit or nearly so, and the same bits in NumPy and under jit.

    The second step adds the mean of what the first estimate leaves over. torch's own mean depends on its number of
    threads; it lies within 2 ulp of this one. A quotient by a constant would become a product in XLA, hence 1 / n.
    """
    inverse = np.float32(1.0 / absmax.shape[0])
    estimate = rounded(_tree_sum(absmax) * inverse)
    return (estimate + rounded(_tree_sum(absmax - estimate) * inverse)).reshape(())


def quantize_constants(absmax: Array, offset: Array, nested_block_size: int) -> tuple[Array, Array]:
    """(absmax_codes, nested_absmax) of absmax - offset, in blocks of `nested_block_size`, the last one partial.

    code = look_up[trunc((v + 1) / 2 * 65535 + 1/2)], v = (absmax - offset) * (1 / nested_absmax). A block of zeros, and
    zeros in a block whose reciprocal overflows, take code 0: map8[0] * nested_absmax is zero there.
    """
    xp = absmax.__array_namespace__()
    blocks = -(-absmax.shape[0] // nested_block_size)
    padding = xp.zeros(blocks * nested_block_size - absmax.shape[0], absmax.dtype)
    centred = xp.concat([absmax - offset, padding]).reshape(blocks, nested_block_size)
    nested_absmax = xp.max(xp.abs(centred), axis=-1)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        v = centred * (np.float32(1) / nested_absmax)[:, None]
    step = rounded((xp.clip(v, -1, 1) + np.float32(1)) * np.float32(0.5) * np.float32(LOOK_UP_SIZE - 1))
    index = xp.where(xp.isnan(v), 0, step + np.float32(0.5)).astype(np.int32)
    codes = xp.where(xp.isnan(v), np.uint8(0), xp.take(xp.asarray(nearest_code_look_up()), index, axis=0, mode="clip"))
    return codes.reshape(-1)[: absmax.shape[0]], nested_absmax
