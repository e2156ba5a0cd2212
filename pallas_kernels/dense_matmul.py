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

FEW_ROWS = 8  # up to this many, reading b takes the time, and packing it would cost as much again
LEAST = 32  # columns and terms below which the loops are hardly faster
HANDLERS = {"float32": ("dense_rows", "product_f32"), "bfloat16": ("dense_rows", None)}  # for few rows, for many


def handler_for(
    a: jax.Array | jax.ShapeDtypeStruct,
    b: jax.Array | jax.ShapeDtypeStruct,
    contract: tuple[int, int],
    dtype: DTypeLike = jnp.float32,
) -> str | None:
    """Returns the handler of C++ loops that multiplies these operands on a CPU, or None: XLA multiplies.

    They take matrices of one dtype, for a result in it or in f32: a's rows by b's rows or columns, if `a` has few rows
    only by b's rows.
    """
    if a.ndim != 2 or b.ndim != 2 or contract[0] != 1 or a.dtype != b.dtype or a.dtype.name not in HANDLERS:
        return None
    if jnp.dtype(dtype) not in (jnp.float32, a.dtype) or not a.shape[0]:
        return None
    rows, terms = a.shape
    few, many = HANDLERS[a.dtype.name]
    name = (few if contract[1] == 1 else None) if rows <= FEW_ROWS else many
    return name if min(b.shape[1 - contract[1]], terms) >= LEAST and problem() is None else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _by_loops(
    a_MK: Float[Array, "M K"], b: Float[Array, "_ _"], name: str, contracted: int, dtype: DTypeLike
) -> Float[Array, "M N"]:
    result = jax.ShapeDtypeStruct((a_MK.shape[0], b.shape[1 - contracted]), dtype)
    if name == "dense_rows":
        return jax.ffi.ffi_call(handler(name), result, vmap_method="sequential")(a_MK, b)
    results = (
        jax.ShapeDtypeStruct(result.shape, jnp.float32),
        jax.ShapeDtypeStruct(a_MK.shape, jnp.float32),  # a packed, used only by the call
    )
    call = jax.ffi.ffi_call(handler(name), results, vmap_method="sequential")
    return call(a_MK, b, transposed=contracted == 1)[0].astype(dtype)


def _forward(a_MK, b, name, contracted, dtype):
    return _by_loops(a_MK, b, name, contracted, dtype), (a_MK, b)


def _backward(name, contracted, dtype, operands, dc_MN):
    dims = (((1,), (contracted,)), ((), ()))
    product = functools.partial(jax.lax.dot_general, dimension_numbers=dims, preferred_element_type=dtype)
    return jax.vjp(product, *operands)[1](dc_MN)


_by_loops.defvjp(_forward, _backward)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int], dtype: DTypeLike) -> jax.Array:
    """Contracts axis contract[0] of `a` with axis contract[1] of `b`, summed in f32 and rounded once to `dtype`.

    Leading axes beyond two are batch axes. XLA sums 16-bit products in f32 whatever the result's dtype, so a 16-bit
    result saves a pass over it.
    """
    batch = tuple(range(a.ndim - 2))
    dims = ((contract[:1], contract[1:]), (batch, batch))
    product = functools.partial(jax.lax.dot_general, dimension_numbers=dims, preferred_element_type=dtype)
    if (name := handler_for(a, b, contract, dtype)) is not None:
        loops = functools.partial(_by_loops, name=name, contracted=contract[1], dtype=dtype)
        return jax.lax.platform_dependent(a, b, cpu=loops, default=product)
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
