"""RMSNorm and LayerNorm with statistics in f32 and VJPs that save only the input.

Dimension key: D normalized width; `...` any leading axes.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.row_moments import row_moments
from qlora_jax.nn.variables import Frozen, TrainedLeaf, select_layer


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rms_norm(
    x: Float[Array, "... D"], weight_D: Float[Array, " D"], eps: float, offset: float = 0.0
) -> Float[Array, "... D"]:
    """Returns (offset + weight) * x / sqrt(mean(x^2) + eps) in x's dtype, computed in f32."""
    return _rms_forward(x, weight_D, eps, offset)[0]


def _by_rms(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    x32 = x.astype(jnp.float32)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return x32 * rstd, rstd


def _scale(weight_D: jax.Array, ndim: int, offset: float = 0.0) -> jax.Array:
    weight32 = weight_D.astype(jnp.float32).reshape((1,) * (ndim - 1) + weight_D.shape)
    return weight32 + offset if offset else weight32


def _rms_forward(x, weight_D, eps, offset):
    normalized, _ = _by_rms(x, eps)
    return (normalized * _scale(weight_D, x.ndim, offset)).astype(x.dtype), (x, weight_D)


def _rms_backward(eps, offset, residuals, dy):
    x, weight_D = residuals
    normalized, rstd = _by_rms(x, eps)
    dy32 = dy.astype(jnp.float32)
    d_normalized = dy32 * _scale(weight_D, x.ndim, offset)
    dx = rstd * (d_normalized - normalized * jnp.mean(d_normalized * normalized, axis=-1, keepdims=True))
    d_weight = jnp.sum(dy32 * normalized, axis=tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype), d_weight.astype(weight_D.dtype)


rms_norm.defvjp(_rms_forward, _rms_backward)


def layer_norm(
    x: Float[Array, "... D"], weight_D: Float[Array, " D"], bias_D: Float[Array, " D"] | None, eps: float
) -> Float[Array, "... D"]:
    """Returns weight * (x - mean(x)) / sqrt(var(x) + eps) + bias in x's dtype, computed in f32; None: no bias."""
    return _layer_norm(x, weight_D, bias_D, eps, bias_D is not None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm(x, weight_D, bias_D, eps, has_bias):
    return _layer_forward(x, weight_D, bias_D, eps, has_bias)[0]


def _by_variance(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    x32 = x.astype(jnp.float32)
    return _by_rms(x32 - jnp.mean(x32, axis=-1, keepdims=True), eps)


def _layer_forward(x, weight_D, bias_D, eps, has_bias):
    normalized, _ = _by_variance(x, eps)
    y = normalized * _scale(weight_D, x.ndim)
    y = y + _scale(bias_D, x.ndim) if has_bias else y
    return y.astype(x.dtype), (x, weight_D)


def _layer_backward(eps, has_bias, residuals, dy):
    x, weight_D = residuals
    normalized, rstd = _by_variance(x, eps)
    dy32 = dy.astype(jnp.float32)
    d_normalized = dy32 * _scale(weight_D, x.ndim)
    along = normalized * jnp.mean(d_normalized * normalized, axis=-1, keepdims=True)
    dx = rstd * (d_normalized - jnp.mean(d_normalized, axis=-1, keepdims=True) - along)
    leading = tuple(range(x.ndim - 1))
    d_weight = jnp.sum(dy32 * normalized, axis=leading).astype(weight_D.dtype)
    d_bias = jnp.sum(dy32, axis=leading).astype(weight_D.dtype) if has_bias else None
    return dx.astype(x.dtype), d_weight, d_bias


_layer_norm.defvjp(_layer_forward, _layer_backward)


def norm_by_row(
    x: Float[Array, "... D"],
    weight_D: Float[Array, " D"],
    bias_D: Float[Array, " D"] | None,
    eps: float,
    *,
    offset: float = 0.0,
    centered: bool = False,
) -> Float[Array, "... D"]:
    """Returns `layer_norm` if `centered`, else `rms_norm`, for inference: a row's bits depend on that row alone."""
    mean, scale = row_moments(x, centered=centered, eps=eps)
    # Barriers keep XLA from fusing a product with a sum, which rounds once instead of twice in some shapes. Rotations
    # of normalized queries have such sums, too.
    normalized = jax.lax.optimization_barrier((x.astype(jnp.float32) - mean) * scale)
    scaled = jax.lax.optimization_barrier(normalized * _scale(weight_D, x.ndim, offset))
    y = scaled if bias_D is None else scaled + _scale(bias_D, x.ndim)
    return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def round_to(x: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """Rounds x to the precision of `dtype` but keeps its dtype; the gradient passes unchanged."""
    held = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=held.nexp, mantissa_bits=held.nmant)


round_to.defvjp(lambda x, dtype: (round_to(x, dtype), None), lambda dtype, _, dx: (dx,))


class TrainableNorm(nnx.Module):
    """A norm's trainable weight and bias in f32: `gain` and `bias`, [D] or [L, D]; inside the scan, one layer.

    A leaf that is None does not train, or does not exist. Leaves are rounded to the compute dtype in use. So a model
    that is saved in that dtype computes the same.
    """

    LEAVES = (TrainedLeaf("gain", vector=True), TrainedLeaf("bias", vector=True))

    def __init__(self, gain: Float[Array, "*L D"] | None, bias: Float[Array, "*L D"] | None):
        self.gain = None if gain is None else nnx.LoRAParam(gain)
        self.bias = None if bias is None else nnx.LoRAParam(bias)

    def leaves(self, dtype: DTypeLike) -> tuple[jax.Array | None, jax.Array | None]:
        """Returns (weight, bias) for computation in `dtype`."""
        gain, bias = (None if leaf is None else round_to(leaf[...], dtype) for leaf in (self.gain, self.bias))
        return gain, bias

    def select_layer(self, layer: int) -> "TrainableNorm":
        """Returns one layer of the stack, or the norm itself if it is not stacked."""
        leaves = [None if leaf is None else leaf[...] for leaf in (self.gain, self.bias)]
        if any(leaf is not None and leaf.ndim == 1 for leaf in leaves):
            return self
        return TrainableNorm(*(None if leaf is None else leaf[layer] for leaf in leaves))

    def merge(self, weight: Float[Array, " D"]) -> Float[Array, " D"]:
        """Returns the trained weight, or the frozen one in f32 if only the bias trains."""
        return weight.astype(jnp.float32) if self.gain is None else self.gain[...]

    def merge_bias(self, bias: Float[Array, " D"]) -> Float[Array, " D"]:
        """Returns the trained bias."""
        assert self.bias is not None
        return self.bias[...]


class RMSNorm(nnx.Module):
    """`rms_norm` with a frozen weight: [D], or [L, D] for stacked layers."""

    def __init__(self, weight: Float[Array, "*L D"], eps: float, offset: float = 0.0):
        self.weight = Frozen(weight)
        self.eps = eps
        self.offset = offset
        self.by_row = False  # decoding sets it
        self.adapter: TrainableNorm | None = nnx.data(None)  # data: it may be set later

    def make_trainable(self) -> None:
        """Replaces the frozen weight by a trainable copy."""
        self.adapter = TrainableNorm(self.weight[...].astype(jnp.float32), None)
        self.weight = Frozen(self.weight[...][:0])

    def __call__(self, x: Float[Array, "... D"], layer: jax.Array | None = None) -> Float[Array, "... D"]:
        weight = None if self.adapter is None else self.adapter.leaves(x.dtype)[0]
        if weight is None:
            weight = select_layer(self.weight[...], layer)
        with jax.named_scope("norm"):
            if self.by_row:
                return norm_by_row(x, weight, None, self.eps, offset=self.offset)
            return rms_norm(x, weight, self.eps, self.offset)


class LayerNorm(nnx.Module):
    """`layer_norm` with frozen weight and optional bias: [D], or [L, D] for stacked layers."""

    def __init__(self, weight: Float[Array, "*L D"], bias: Float[Array, "*L D"] | None, eps: float):
        self.weight = Frozen(weight)
        self.bias = None if bias is None else Frozen(bias)
        self.eps = eps
        self.by_row = False  # decoding sets it
        self.adapter: TrainableNorm | None = nnx.data(None)  # data: it may be set later

    def make_trainable(self) -> None:
        """Replaces the frozen weight and bias by trainable copies."""
        bias = None if self.bias is None else self.bias[...].astype(jnp.float32)
        self.adapter = TrainableNorm(self.weight[...].astype(jnp.float32), bias)
        self.weight = Frozen(self.weight[...][:0])
        self.bias = None if self.bias is None else Frozen(self.bias[...][:0])

    def make_bias_trainable(self) -> None:
        """Replaces the frozen bias by a trainable copy."""
        assert self.bias is not None
        self.adapter = TrainableNorm(None, self.bias[...].astype(jnp.float32))
        self.bias = Frozen(self.bias[...][:0])

    def __call__(self, x: Float[Array, "... D"], layer: jax.Array | None = None) -> Float[Array, "... D"]:
        if self.adapter is None:
            weight = select_layer(self.weight[...], layer)
            bias = None if self.bias is None else select_layer(self.bias[...], layer)
        else:
            weight, bias = self.adapter.leaves(x.dtype)
            if weight is None:  # in f32, because the bias's gradient has the weight's dtype
                weight = select_layer(self.weight[...], layer).astype(jnp.float32)
        with jax.named_scope("norm"):
            if self.by_row:
                return norm_by_row(x, weight, bias, self.eps, centered=True)
            return layer_norm(x, weight, bias, self.eps)
