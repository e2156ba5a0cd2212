"""RMSNorm, its statistics in f32, with a VJP that keeps its input alone.

Dimension key: D embed; `...` any leading axes.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.nn.variables import Frozen, of_layer


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "... D"], weight_D: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """y = weight * x / sqrt(mean(x^2) + eps), computed in f32, in x's dtype."""
    return _forward(x, weight_D, eps)[0]


def _normalized(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    x32 = x.astype(jnp.float32)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return x32 * rstd, rstd


def _scale(weight_D: jax.Array, ndim: int) -> jax.Array:
    return weight_D.astype(jnp.float32).reshape((1,) * (ndim - 1) + weight_D.shape)


def _forward(x, weight_D, eps):
    normalized, _ = _normalized(x, eps)
    return (normalized * _scale(weight_D, x.ndim)).astype(x.dtype), (x, weight_D)


def _backward(eps, residuals, dy):
    x, weight_D = residuals
    normalized, rstd = _normalized(x, eps)
    dy32 = dy.astype(jnp.float32)
    d_normalized = dy32 * _scale(weight_D, x.ndim)
    dx = rstd * (d_normalized - normalized * jnp.mean(d_normalized * normalized, axis=-1, keepdims=True))
    d_weight = jnp.sum(dy32 * normalized, axis=tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype), d_weight.astype(weight_D.dtype)


rms_norm.defvjp(_forward, _backward)


class RMSNorm(nnx.Module):
    """rms_norm with a frozen weight: [D], or [L, D] where the layers are stacked."""

    def __init__(self, weight: Float[Array, "*L D"], eps: float):
        self.weight = Frozen(weight)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"], layer: jax.Array | None = None) -> Float[Array, "... D"]:
        with jax.named_scope("norm"):
            return rms_norm(x, of_layer(self.weight, layer), self.eps)
