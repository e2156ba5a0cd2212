"""Multiplies columns by a trainable vector.

Dimension key: M rows, N columns.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def scale_columns(x_MN: Float[Array, "M N"], scale_N: Float[Array, " N"]) -> Float[Array, "M N"]:
    """Returns x * scale in x's dtype, computed in f32; the gradient of `scale` is summed over rows in f32.

    The backward pass saves x, in its own dtype, and `scale`.
    """
    return _forward(x_MN, scale_N)[0]


def _times(x_MN: jax.Array, scale_N: jax.Array) -> jax.Array:
    return (x_MN.astype(jnp.float32) * scale_N.astype(jnp.float32)[None]).astype(x_MN.dtype)


def _forward(x_MN, scale_N):
    return _times(x_MN, scale_N), (x_MN, scale_N)


def _backward(residuals, dy_MN):
    x_MN, scale_N = residuals
    d_scale_N = jnp.sum(dy_MN.astype(jnp.float32) * x_MN.astype(jnp.float32), axis=0)
    return _times(dy_MN, scale_N), d_scale_N.astype(scale_N.dtype)


scale_columns.defvjp(_forward, _backward)
