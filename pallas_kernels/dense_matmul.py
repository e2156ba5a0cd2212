"""Matrix products accumulated in f32, in the one form that is fast on every device.

XLA has a fast CPU path for products whose left operand contracts its last axis and whose arrays are all row-major.
Any other form is several times slower (docs/cpu.md). So products that contract rows, such as the gradient of a LoRA
matrix, transpose their narrower operand explicitly.

Dimension key: Z batch, M rows, N columns, K contracted.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.native.library import handler, problem

# Below these sizes packed operands are hardly reused.
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
        jax.ShapeDtypeStruct((rows, terms), jnp.float32),  # a packed, used only by the call
    )
    call = jax.ffi.ffi_call(handler("product_f32"), results, vmap_method="sequential")
    return call(a_MK, b, transposed=transposed)[0]


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
        loops = functools.partial(product_f32, transposed=contract[1] == 1)
        return jax.lax.platform_dependent(a, b, cpu=lambda a, b: loops(a, b).astype(dtype), default=product)
    if a.ndim == 2 and a.shape[1 - contract[0]] == 1 and a.dtype == jnp.bfloat16:
        return jax.lax.platform_dependent(a, b, cpu=_doubled(product, 1 - contract[0]), default=product)
    return product(a, b)


def _doubled(product, rows_axis: int):
    """Repeats a single row and takes one of the two results.

    For one bf16 row and a head of 49152 x 576, XLA on CPUs takes 97 ms; for two rows it takes 3 ms.
    """
    return lambda a, b: product(jnp.repeat(a, 2, axis=rows_axis), b)[:1]


def row_major(x: jax.Array) -> jax.Array:
    """Pins the layout of x, so that XLA executes a transpose next to it and does not fold it into a product."""
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def dot_nn(
    a: Float[Array, "*Z M K"], b: Float[Array, "*Z K N"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "*Z M N"]:
    """a b, summed in f32 and rounded once to `dtype`."""
    return dot(a, b, (a.ndim - 1, b.ndim - 2), dtype)


def dot_nt(
    a: Float[Array, "*Z M K"], b: Float[Array, "*Z N K"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "*Z M N"]:
    """a b^T, summed in f32 and rounded once to `dtype`."""
    return dot(a, b, (a.ndim - 1, b.ndim - 1), dtype)


def dot_tn(a: Float[Array, "*Z M K"], b: Float[Array, "*Z M N"]) -> Float[Array, "*Z K N"]:
    """a^T b, in f32, with the narrower of the two transposed."""
    return jax.lax.platform_dependent(a, b, cpu=_dot_tn_cpu, default=_dot_tn)


def _dot_tn(a: jax.Array, b: jax.Array) -> jax.Array:
    return dot(a, b, (a.ndim - 2, b.ndim - 2), jnp.float32)


def _dot_tn_cpu(a: jax.Array, b: jax.Array) -> jax.Array:
    if a.shape[-1] <= b.shape[-1]:
        return row_major(dot_nn(row_major(jnp.swapaxes(a, -1, -2)), b))
    return jnp.swapaxes(_dot_tn_cpu(b, a), -1, -2)
