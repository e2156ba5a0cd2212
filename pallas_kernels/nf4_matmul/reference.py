"""The reference implementation of nf4_matmul: dequantize one weight, then one dot. Runs on every device and layout.

Dimension key: M rows, N out, K in.
"""

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.dense_matmul import dot
from pallas_kernels.dispatch import Layer
from pallas_kernels.formats.dequantize import dequantize
from pallas_kernels.formats.qtensor import QTensor


def _dequantize(weights: QTensor, layer: Layer, dtype: DTypeLike) -> jax.Array:
    return dequantize(weights if layer is None else weights.layer(layer), dtype)


def forward(x_MK: Float[Array, "M K"], weights: QTensor, layer: Layer) -> Float[Array, "M N"]:
    """Computes y = x w^T, accumulated in f32, in x's dtype."""
    return dot(x_MK, _dequantize(weights, layer, x_MK.dtype), (1, 1), x_MK.dtype)


def backward(dy_MN: Float[Array, "M N"], weights: QTensor, layer: Layer) -> Float[Array, "M K"]:
    """Computes dx = dy w, accumulated in f32, in dy's dtype."""
    return dot(dy_MN, _dequantize(weights, layer, dy_MN.dtype), (1, 0), dy_MN.dtype)
