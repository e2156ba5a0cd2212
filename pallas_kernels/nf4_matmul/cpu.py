"""nf4_matmul on CPUs through the C++ handlers of pallas_kernels.native, if they are built.

Few rows are multiplied directly from the codes, and weights exist only in registers. For many rows, weights are
dequantized into the panels that the product reads, so none exists as a whole.

Dimension key: M rows, N out, K in, L layers.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.dense_matmul import FEW_ROWS
from pallas_kernels.dispatch import Capabilities, Layer
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.tables import CODE_TABLES, dynamic_map
from pallas_kernels.native.library import handler, multiplies_bfloat16

# The handlers read whole vectors of 16 weights, in the one layout that gives two rows per load.
CAPABILITIES = Capabilities(
    devices=("cpu",), layouts=("row_planar",), dtypes=("bfloat16", "float32"), block_sizes=(64, 128, 256, 512, 1024)
)
INTEGER_CAPABILITIES = dataclasses.replace(CAPABILITIES, directions=("forward",), rows=(1, FEW_ROWS))


def forward(x_MK: Float[Array, "M K"], weights: QTensor, layer: Layer) -> Float[Array, "M N"]:
    """Computes y = x w^T, accumulated in f32, in x's dtype."""
    if x_MK.shape[0] > FEW_ROWS:
        return _product(x_MK, weights, layer, transposed=False)
    return _few_rows(x_MK, weights, layer, integer=False)


def integer_forward(x_MK: Float[Array, "M K"], weights: QTensor, layer: Layer) -> Float[Array, "M N"]:
    """Computes y = x w^T with x and the table of the codes rounded to 8 bits, for few rows.

    Each 64 numbers of a row share a scale, which is their greatest magnitude / 127. Sums of 64 products are exact.
    """
    return _few_rows(x_MK, weights, layer, integer=True)


def _few_rows(x_MK: Float[Array, "M K"], weights: QTensor, layer: Layer, *, integer: bool) -> Float[Array, "M N"]:
    shape = jax.ShapeDtypeStruct((x_MK.shape[0], weights.shape[0]), x_MK.dtype)
    return _call("nf4_rows", [shape], weights, layer, x_MK, integer=integer)[0]


def backward(dy_MN: Float[Array, "M N"], weights: QTensor, layer: Layer) -> Float[Array, "M K"]:
    """Computes dx = dy w, accumulated in f32, in dy's dtype."""
    return _product(dy_MN, weights, layer, transposed=True)


def _product(a: Float[Array, "M _"], weights: QTensor, layer: Layer, *, transposed: bool) -> Float[Array, "M _"]:
    """Computes a w if `transposed`, else a w^T."""
    numbers = 2 if a.dtype == jnp.bfloat16 and multiplies_bfloat16() else 1
    rows, terms = a.shape[0], a.shape[1] // numbers
    results = (
        jax.ShapeDtypeStruct((rows, weights.shape[1 if transposed else 0]), a.dtype),
        # a packed, used only by the call: AMX multiplies 32 rows and 16 terms at once
        jax.ShapeDtypeStruct((-(-rows // 32) * 32, -(-terms // 16) * 16), jnp.uint32),
    )
    return _call("nf4_product", results, weights, layer, a, transposed=transposed)[0]


def dequantize_layer(weights: QTensor, layer: Layer, dtype: DTypeLike) -> Float[Array, "N K"]:
    """Dequantizes one layer of the weights, bit-identical to `formats.dequantize`."""
    with jax.named_scope("dequantize"):
        return _call("nf4_dequantize", [jax.ShapeDtypeStruct(weights.shape, dtype)], weights, layer)[0]


def _call(
    name: str,
    results: Sequence[jax.ShapeDtypeStruct],
    weights: QTensor,
    layer: Layer,
    *rows: jax.Array,
    **how: bool,
) -> Sequence[jax.Array]:
    """Calls a handler on one layer. It receives the whole stack, so that no slice is copied."""
    stack = weights if layer is not None else jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], weights)
    if stack.double_quant:
        constants = (stack.absmax_codes, stack.nested_absmax, stack.nested_offset)
    else:
        constants = (stack.absmax, jnp.zeros((1, 1), jnp.float32), jnp.zeros((1,), jnp.float32))
    tables = (CODE_TABLES[weights.quant_type].astype(np.float32), dynamic_map().astype(np.float32))
    index = jnp.asarray(0 if layer is None else layer, jnp.int32)
    call = jax.ffi.ffi_call(handler(name), results, vmap_method="sequential")
    return call(*rows, stack.codes, *constants, index, *tables, nested_size=np.int64(weights.nested_block_size), **how)
