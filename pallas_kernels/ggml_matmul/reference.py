"""The reference implementation of ggml_matmul: dequantize one weight, then one dot. Runs on every device.

Dimension key: M rows, N out, K in.
"""

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.dense_matmul import dot
from pallas_kernels.formats.ggml_tensor import GgmlTensor, dequantize_ggml
from pallas_kernels.frozen_product import Layer


def dequantize_layer(weights: GgmlTensor, layer: Layer, dtype: DTypeLike) -> jax.Array:
    """Dequantizes one weight, or one layer of a stack."""
    return dequantize_ggml(weights if layer is None else weights.layer(layer), dtype)


def forward(x_MK: Float[Array, "M K"], weights: GgmlTensor, layer: Layer) -> Float[Array, "M N"]:
    """Computes y = x w^T, accumulated in f32, in x's dtype."""
    return dot(x_MK, dequantize_layer(weights, layer, x_MK.dtype), (1, 1), x_MK.dtype)


def backward(dy_MN: Float[Array, "M N"], weights: GgmlTensor, layer: Layer) -> Float[Array, "M K"]:
    """Computes dx = dy w, accumulated in f32, in dy's dtype."""
    return dot(dy_MN, dequantize_layer(weights, layer, dy_MN.dtype), (1, 0), dy_MN.dtype)
