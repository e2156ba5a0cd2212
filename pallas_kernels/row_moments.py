"""Moments of rows, whose bits do not depend on the number of rows.

XLA sums rows in another order if there are fewer of them, and computes 1 / sqrt(x) in several ways.

Dimension key: D width; `...` any leading axes.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.native.library import handler, problem


def row_moments(
    x: Float[Array, "... D"], *, centered: bool, eps: float = 0.0
) -> tuple[Float[Array, "... 1"], Float[Array, "... 1"]]:
    """Returns (the mean of each row, or 0 if it is not `centered`; 1 / sqrt(mean of (x - mean)^2 + eps)), in f32.

    By the C++ loops, a row's bits depend on that row alone; other devices have XLA's sums.
    """
    plain = functools.partial(_by_xla, centered=centered, eps=eps)
    if problem() is not None or not x.size or x.dtype not in (jnp.float32, jnp.bfloat16):
        return plain(x)
    loops = functools.partial(_by_loops, centered=centered, eps=eps)
    return jax.lax.platform_dependent(x, cpu=loops, default=plain)


def _by_loops(x: jax.Array, centered: bool, eps: float) -> tuple[jax.Array, jax.Array]:
    rows = math.prod(x.shape[:-1])
    result = jax.ShapeDtypeStruct((rows, 2), jnp.float32)
    call = jax.ffi.ffi_call(handler("row_moments"), result, vmap_method="sequential")
    moments = call(x.reshape(rows, x.shape[-1]), centered=centered, eps=np.float32(eps)).reshape(*x.shape[:-1], 2)
    return moments[..., :1], moments[..., 1:]


def _by_xla(x: jax.Array, centered: bool, eps: float) -> tuple[jax.Array, jax.Array]:
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True) if centered else jnp.zeros((*x.shape[:-1], 1), jnp.float32)
    return mean, jax.lax.rsqrt(jnp.mean(jnp.square(x32 - mean), axis=-1, keepdims=True) + eps)
