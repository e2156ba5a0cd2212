"""Low-rank adapters: y = frozen(x) + scaling * dropout(x) A B.

Dimension key: L layers, M rows, K in, N out, R rank.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from qlora_jax.nn.dots import dot_nn, dot_nt, dot_tn


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def lora_delta(
    x_MK: Float[Array, "M K"],
    lora_a_KR: Float[Array, "K R"],
    lora_b_RN: Float[Array, "R N"],
    scaling: float,
    dropout: float,
    key: jax.Array | None,
) -> Float[Array, "M N"]:
    """scaling * dropout(x) A B, with A and B cast to x's dtype, sums in f32, the result in x's dtype.

    The gradients of A and B come in f32. Dropout masks are made again from `key` in the backward pass, not kept.

    Args:
      dropout: probability that an element of x is zeroed; needs `key` where it is not 0.
    """
    return _forward(x_MK, lora_a_KR, lora_b_RN, scaling, dropout, key)[0]


def _dropped(x_MK: jax.Array, dropout: float, key: jax.Array | None) -> jax.Array:
    if dropout == 0.0 or key is None:
        return x_MK
    keep = jax.random.bernoulli(key, 1.0 - dropout, x_MK.shape)
    return jnp.where(keep, x_MK / jnp.asarray(1.0 - dropout, x_MK.dtype), jnp.zeros((), x_MK.dtype))


def _forward(x_MK, lora_a_KR, lora_b_RN, scaling, dropout, key):
    dtype = x_MK.dtype
    xa_MR = (dot_nn(_dropped(x_MK, dropout, key), lora_a_KR.astype(dtype)) * scaling).astype(dtype)
    y_MN = dot_nn(xa_MR, lora_b_RN.astype(dtype), dtype)
    return y_MN, (x_MK, lora_a_KR, lora_b_RN, checkpoint_name(xa_MR, "lora_xa"), key)


def _backward(scaling, dropout, residuals, dy_MN):
    x_MK, lora_a_KR, lora_b_RN, xa_MR, key = residuals
    dtype = x_MK.dtype
    d_xa_MR = (dot_nt(dy_MN, lora_b_RN.astype(dtype)) * scaling).astype(dtype)
    d_b_RN = dot_tn(xa_MR, dy_MN)
    d_a_KR = dot_tn(_dropped(x_MK, dropout, key), d_xa_MR)
    dx_MK = _dropped(dot_nt(d_xa_MR, lora_a_KR.astype(dtype), dtype), dropout, key)
    return dx_MK, d_a_KR.astype(lora_a_KR.dtype), d_b_RN.astype(lora_b_RN.dtype), None


lora_delta.defvjp(_forward, _backward)


class LoRA(nnx.Module):
    """LoRA (and rsLoRA) on one projection: `scaling` is alpha / rank, or alpha / sqrt(rank).

    `lora_a` [L, K, R] and `lora_b` [L, R, N] in f32; inside the scan over layers, one layer of each.
    """

    def __init__(self, lora_a: Float[Array, "*L K R"], lora_b: Float[Array, "*L R N"], scaling: float, dropout: float):
        self.lora_a = nnx.LoRAParam(lora_a)
        self.lora_b = nnx.LoRAParam(lora_b)
        self.scaling = scaling
        self.dropout = dropout

    @classmethod
    def init(
        cls, key: jax.Array, stack: int, shape: tuple[int, int], *, rank: int, scaling: float, dropout: float
    ) -> "LoRA":
        """A uniform in +-1/sqrt(K) and B zero, as PEFT draws them (Kaiming with a = sqrt(5)); the delta is then zero.

        Args:
          stack: number of layers L.
          shape: (N, K) of the frozen weight.
        """
        n, k = shape
        bound = 1 / math.sqrt(k)
        lora_a = jax.random.uniform(key, (stack, k, rank), jnp.float32, -bound, bound)
        return cls(lora_a, jnp.zeros((stack, rank, n), jnp.float32), scaling, dropout)

    def apply(self, x_MK: jax.Array, frozen, key: jax.Array | None) -> jax.Array:
        """frozen(x) + scaling * dropout(x) A B."""
        return frozen(x_MK) + lora_delta(x_MK, self.lora_a[...], self.lora_b[...], self.scaling, self.dropout, key)

    def merge(self, weight: Float[Array, "*L N K"]) -> Float[Array, "*L N K"]:
        """weight + scaling * (A B)^T, in f32."""
        delta = dot_nn(self.lora_a[...], self.lora_b[...]) * self.scaling
        return weight.astype(jnp.float32) + jnp.swapaxes(delta, -1, -2)
