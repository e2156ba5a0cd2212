"""A matrix product in the form that XLA runs fastest on each device.

Dimension key: M rows, N columns, K contracted.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.native.library import problem

# Columns per panel of the packed operand. With AVX2 panels have half as many, and the same memory holds twice as many.
COLUMNS = 32
# Below these sizes a packed operand is hardly reused.
LEAST_ROWS, LEAST_COLUMNS, LEAST_TERMS = 9, 32, 32


def takes_f32(
    a: jax.Array | jax.ShapeDtypeStruct, b: jax.Array | jax.ShapeDtypeStruct, contract: tuple[int, int]
) -> bool:
    """True if the handler supports these operands on a CPU: f32 matrices, a's rows by b's rows or columns."""
    if a.ndim != 2 or contract[0] != 1 or {a.dtype, b.dtype} != {jnp.dtype(jnp.float32)}:
        return False
    rows, terms = a.shape
    columns = b.shape[1 - contract[1]]
    return rows >= LEAST_ROWS and columns >= LEAST_COLUMNS and terms >= LEAST_TERMS and problem() is None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product_f32(a_MK: Float[Array, "M K"], b: Float[Array, "_ _"], transposed: bool) -> Float[Array, "M N"]:
    """Computes a b, or a b^T if `transposed` and b is [N, K]; for operands that the handler takes (`takes_f32`)."""
    (rows, terms), columns = a_MK.shape, b.shape[0 if transposed else 1]
    results = (
        jax.ShapeDtypeStruct((rows, columns), jnp.float32),
        jax.ShapeDtypeStruct((-(-columns // COLUMNS), terms, COLUMNS), jnp.float32),  # b packed, used only by the call
    )
    return jax.ffi.ffi_call("product_f32", results, vmap_method="sequential")(a_MK, b, transposed=transposed)[0]


def _forward_f32(a_MK, b, transposed):
    return product_f32(a_MK, b, transposed), (a_MK, b)


def _backward_f32(transposed, operands, dc_MN):
    a_MK, b = operands
    da_MK = jax.lax.dot_general(dc_MN, b, (((1,), (0 if transposed else 1,)), ((), ())))
    left, right = (dc_MN, a_MK) if transposed else (a_MK, dc_MN)
    return da_MK, jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())))


product_f32.defvjp(_forward_f32, _backward_f32)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int], dtype: DTypeLike) -> jax.Array:
    """Contracts axis contract[0] of `a` with axis contract[1] of `b`, summed in f32 and rounded once to `dtype`.

    Leading axes beyond two are batch axes. XLA sums 16-bit products in f32 whatever the result's dtype, so a 16-bit
    result saves a pass over it.
    """
    batch = tuple(range(a.ndim - 2))
    dims = ((contract[:1], contract[1:]), (batch, batch))
    product = functools.partial(jax.lax.dot_general, dimension_numbers=dims, preferred_element_type=dtype)
    if takes_f32(a, b, contract):
        handler = functools.partial(product_f32, transposed=contract[1] == 1)
        return jax.lax.platform_dependent(a, b, cpu=lambda a, b: handler(a, b).astype(dtype), default=product)
    if a.ndim == 2 and a.shape[1 - contract[0]] == 1 and a.dtype == jnp.bfloat16:
        return jax.lax.platform_dependent(a, b, cpu=_doubled(product, 1 - contract[0]), default=product)
    return product(a, b)


def _doubled(product, rows_axis: int):
    """Repeats a single row and takes one of the two results.

    For one bf16 row and a head of 49152 x 576, XLA on CPUs takes 97 ms; for two rows it takes 3 ms.
    """
    return lambda a, b: product(jnp.repeat(a, 2, axis=rows_axis), b)[:1]
