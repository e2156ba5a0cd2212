"""Products of rows that each have a matrix of their own, such as the adapters of several runs.

Dimension key: M rows, K in, N out, L layers, A matrices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dense_matmul import dot_nn
from pallas_kernels.native.library import handler, problem


def own_matrix(
    x_MK: Float[Array, "M K"],
    matrices_LAKN: Float[Array, "L A K N"],
    layer: Int[Array, ""] | int,
    own_M: Int[Array, " M"],
) -> Float[Array, "M N"]:
    """Returns x_m w_m for each row m, summed and returned in f32; zeros for rows without a matrix.

    By the C++ loops, a row's result depends only on that row and its matrix, to the bit, and on no zeros that pad it.

    Args:
      matrices_LAKN: of each layer, in f32 or bf16.
      own_M: 1 + the index of each row's matrix; 0: none.
    """
    if problem() is not None:
        return _by_matrix(x_MK, matrices_LAKN, layer, own_M)
    return jax.lax.platform_dependent(x_MK, matrices_LAKN, layer, own_M, cpu=_by_loops, default=_by_matrix)


def _by_loops(x_MK: jax.Array, matrices_LAKN: jax.Array, layer: jax.Array | int, own_M: jax.Array) -> jax.Array:
    result = jax.ShapeDtypeStruct((x_MK.shape[0], matrices_LAKN.shape[3]), jnp.float32)
    call = jax.ffi.ffi_call(handler("own_matrix"), result, vmap_method="sequential")
    return call(x_MK, matrices_LAKN, jnp.asarray(layer, jnp.int32), own_M.astype(jnp.int32))


def _by_matrix(x_MK: jax.Array, matrices_LAKN: jax.Array, layer: jax.Array | int, own_M: jax.Array) -> jax.Array:
    """Multiplies all rows by each matrix that any of them has."""

    def add(y_MN: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        own_M1 = (own_M == number)[:, None]

        def product(y_MN: jax.Array) -> jax.Array:
            matrix_KN = matrices_LAKN[layer, number - 1].astype(x_MK.dtype)
            return jnp.where(own_M1, dot_nn(x_MK, matrix_KN), y_MN)

        return jax.lax.cond(own_M1.any(), product, lambda y_MN: y_MN, y_MN), None

    zeros_MN = jnp.zeros((x_MK.shape[0], matrices_LAKN.shape[3]), jnp.float32)
    return jax.lax.scan(add, zeros_MN, jnp.arange(1, matrices_LAKN.shape[1] + 1, dtype=own_M.dtype))[0]
