"""Products of f32 matrices on CPUs through the C++ handler, if it is built: faster than XLA's own (docs/cpu.md).

Dimension key: M rows, N columns, K contracted.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.native.library import problem

# Columns per panel of the packed operand. With AVX2 panels have half as many, and the same memory holds twice as many.
COLUMNS = 32
# Below these sizes a packed operand is hardly reused.
LEAST_ROWS, LEAST_COLUMNS, LEAST_TERMS = 9, 32, 32


def takes(a: jax.Array | jax.ShapeDtypeStruct, b: jax.Array | jax.ShapeDtypeStruct, contract: tuple[int, int]) -> bool:
    """True if the handler supports these operands on a CPU: f32 matrices, a's rows by b's rows or columns."""
    if a.ndim != 2 or contract[0] != 1 or {a.dtype, b.dtype} != {jnp.dtype(jnp.float32)}:
        return False
    rows, terms = a.shape
    columns = b.shape[1 - contract[1]]
    return rows >= LEAST_ROWS and columns >= LEAST_COLUMNS and terms >= LEAST_TERMS and problem() is None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(a_MK: Float[Array, "M K"], b: Float[Array, "_ _"], transposed: bool) -> Float[Array, "M N"]:
    """Computes a b, or a b^T if `transposed` and b is [N, K]; for operands that the handler `takes`."""
    (rows, terms), columns = a_MK.shape, b.shape[0 if transposed else 1]
    results = (
        jax.ShapeDtypeStruct((rows, columns), jnp.float32),
        jax.ShapeDtypeStruct((-(-columns // COLUMNS), terms, COLUMNS), jnp.float32),  # b packed, used only by the call
    )
    return jax.ffi.ffi_call("product_f32", results, vmap_method="sequential")(a_MK, b, transposed=transposed)[0]


def _forward(a_MK, b, transposed):
    return product(a_MK, b, transposed), (a_MK, b)


def _backward(transposed, operands, dc_MN):
    a_MK, b = operands
    da_MK = jax.lax.dot_general(dc_MN, b, (((1,), (0 if transposed else 1,)), ((), ())))
    left, right = (dc_MN, a_MK) if transposed else (a_MK, dc_MN)
    return da_MK, jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())))


product.defvjp(_forward, _backward)
