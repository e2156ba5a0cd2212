"""Blockwise quantization to the dynamic 8-bit map, in the arithmetic of bitsandbytes' CPU build.

Every function takes NumPy or JAX arrays, returns the same kind, and gives the same bits for both.
"""

import functools

import jax
import numpy as np

from pallas_kernels.formats.tables import dynamic_map, rounded

LOOK_UP_SIZE = 65536


@functools.cache
def nearest_code_look_up(signed: bool = True) -> np.ndarray:
    """Returns uint8[65536]: entry i is the code of the map value nearest to the i-th of 65,536 even steps from -1 to 1.

    bitsandbytes' CPU build quantizes through this table. Near a midpoint of the map it is not always the nearest code:
    up to 0.3% of codes differ. The table has no step at 0, so values near 0 become +-2.1e-5 in the signed map and
    1.6e-5 in the unsigned one.
    """
    levels = dynamic_map(signed)
    # In f32, as in bitsandbytes: in f64 one entry of the unsigned table differs.
    steps = np.float32(2) * np.arange(LOOK_UP_SIZE, dtype=np.float32) / np.float32(LOOK_UP_SIZE - 1) - np.float32(1)
    return np.searchsorted((levels[:-1] + levels[1:]) / np.float32(2), steps).astype(np.uint8)


def quantize_blocks[Array: (np.ndarray, jax.Array)](blocks: Array, signed: bool = True) -> tuple[Array, Array]:
    """Quantizes f32 blocks [..., n] to (codes uint8 [..., n], absmax f32 [...]).

    code = look_up[trunc((v + 1) / 2 * 65535 + 1/2)] with v = x * (1 / absmax). Code 0 goes to blocks of zeros, to zeros
    in a block whose reciprocal overflows, and to NaN.
    """
    xp = blocks.__array_namespace__()
    absmax = xp.max(xp.abs(blocks), axis=-1)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        v = blocks * (np.float32(1) / absmax)[..., None]
    step = rounded((xp.clip(v, -1, 1) + np.float32(1)) * np.float32(0.5) * np.float32(LOOK_UP_SIZE - 1))
    index = xp.where(xp.isnan(v), 0, step + np.float32(0.5)).astype(np.int32)
    look_up = xp.asarray(nearest_code_look_up(signed))
    codes = xp.where(xp.isnan(v), np.uint8(0), xp.take(look_up, index, axis=0, mode="clip"))
    return codes, absmax
