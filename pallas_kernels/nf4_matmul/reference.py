"""The oracle of nf4_matmul: dequantize one weight, then one dot. Runs on every device and for every layout.

Dimension key: M rows, N out, K in.
"""

import jax
from jaxtyping import Array, Float

from pallas_kernels.formats.dequantize import dequantize
from pallas_kernels.formats.qtensor import QTensor


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    # XLA sums 16-bit products in f32 and rounds once; asking for f32 would cost a second pass over the result.
    return jax.lax.dot_general(a, b, dims, preferred_element_type=a.dtype)


def forward(x_MK: Float[Array, "M K"], weights: QTensor) -> Float[Array, "M N"]:
    """y = x w^T, accumulated in f32, in x's dtype."""
    return _dot(x_MK, dequantize(weights, x_MK.dtype), (1, 1))


def backward(dy_MN: Float[Array, "M N"], weights: QTensor) -> Float[Array, "M K"]:
    """dx = dy w, accumulated in f32, in dy's dtype."""
    return _dot(dy_MN, dequantize(weights, dy_MN.dtype), (1, 0))
