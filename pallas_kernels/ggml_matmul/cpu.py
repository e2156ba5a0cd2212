"""ggml_matmul on CPUs through the C++ handlers of pallas_kernels.native, if they are built.

Few rows are multiplied directly from the blocks. For many rows, one layer is dequantized and XLA multiplies.

Dimension key: M rows, N out, K in.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.dense_matmul import FEW_ROWS, dot
from pallas_kernels.dispatch import Capabilities
from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS
from pallas_kernels.formats.ggml_tensor import BLOCKS, GgmlTensor
from pallas_kernels.frozen_product import Layer
from pallas_kernels.native.library import handler

CAPABILITIES = Capabilities(devices=("cpu",), layouts=(BLOCKS,), dtypes=("bfloat16", "float32"))


def forward(x_MK: Float[Array, "M K"], weights: GgmlTensor, layer: Layer) -> Float[Array, "M N"]:
    """Computes y = x w^T, accumulated in f32, in x's dtype."""
    if x_MK.shape[0] > FEW_ROWS:
        return dot(x_MK, dequantize_layer(weights, layer, x_MK.dtype), (1, 1), x_MK.dtype)
    shape = jax.ShapeDtypeStruct((x_MK.shape[0], weights.shape[0]), x_MK.dtype)
    return _call("ggml_rows", shape, weights, layer, x_MK)


def backward(dy_MN: Float[Array, "M N"], weights: GgmlTensor, layer: Layer) -> Float[Array, "M K"]:
    """Computes dx = dy w, accumulated in f32, in dy's dtype."""
    return dot(dy_MN, dequantize_layer(weights, layer, dy_MN.dtype), (1, 0), dy_MN.dtype)


def dequantize_layer(weights: GgmlTensor, layer: Layer, dtype: DTypeLike) -> Float[Array, "N K"]:
    """Dequantizes one weight of a stack, bit-identical to `dequantize_ggml`.

    Args:
      layer: index of the weight, where all leading axes of the stack count as one; None for a single weight.
    """
    with jax.named_scope("dequantize"):
        return _call("ggml_dequantize", jax.ShapeDtypeStruct(weights.shape, dtype), weights, layer)


def _call(name: str, out: jax.ShapeDtypeStruct, weights: GgmlTensor, layer: Layer, *rows: jax.Array) -> jax.Array:
    """Calls a handler on one weight. It receives the whole stack, so that no slice is copied."""
    index = jnp.asarray(0 if layer is None else layer, jnp.int32)
    number = np.int64(BLOCK_FORMATS[weights.ggml_type].number)
    call = jax.ffi.ffi_call(handler(name), out, vmap_method="sequential")
    return call(*rows, weights.codes, index, ggml_type=number)
