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

# Up to this many rows are multiplied by loops that read each weight once and pack nothing: a token of each of the rows
# that decode together. A row's result depends neither on the number of rows, nor on the other rows.
FEW_ROWS = 16
PROMPT_ROWS = 512  # up to so many rows of a prompt are multiplied together, always by the loops if they are in f32
LEAST = 32  # columns and terms below which the loops are slower for more rows
LEAST_FEATURES = 9  # features below which XLA sums a gradient over tokens faster
HANDLERS = {"float32": ("dense_rows", "product_f32"), "bfloat16": ("dense_rows", None)}  # for few rows, for many


def handler_for(
    a: jax.Array | jax.ShapeDtypeStruct,
    b: jax.Array | jax.ShapeDtypeStruct,
    contract: tuple[int, int],
    dtype: DTypeLike = jnp.float32,
) -> str | None:
    """Returns the handler of C++ loops that multiplies these operands on a CPU, or None: XLA multiplies.

    They take matrices of one dtype, for a result in it or in f32: a's rows by b's rows or columns. For few rows, the
    numbers of terms and columns may be small.
    """
    if a.ndim != 2 or b.ndim != 2 or contract[0] != 1 or a.dtype != b.dtype or a.dtype.name not in HANDLERS:
        return None
    if jnp.dtype(dtype) not in (jnp.float32, a.dtype) or not a.size or not b.size:
        return None
    few, many = HANDLERS[a.dtype.name]
    if a.shape[0] <= FEW_ROWS:
        return few if problem() is None else None
    wide = a.shape[0] <= PROMPT_ROWS or min(b.shape[1 - contract[1]], a.shape[1]) >= LEAST
    return many if wide and problem() is None else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _by_loops(
    a_MK: Float[Array, "M K"], b: Float[Array, "_ _"], name: str, contracted: int, dtype: DTypeLike
) -> Float[Array, "M N"]:
    result = jax.ShapeDtypeStruct((a_MK.shape[0], b.shape[1 - contracted]), dtype)
    if name == "dense_rows":
        call = jax.ffi.ffi_call(handler(name), result, vmap_method="sequential")
        return call(a_MK, b, transposed=contracted == 1)
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
    return _multiply(a, b, contract, dtype, handler_for(a, b, contract, dtype))


def _multiply(a: jax.Array, b: jax.Array, contract: tuple[int, int], dtype: DTypeLike, name: str | None) -> jax.Array:
    """Multiplies by the loops of a handler on CPUs, or by XLA."""
    batch = tuple(range(a.ndim - 2))
    dims = ((contract[:1], contract[1:]), (batch, batch))
    product = functools.partial(jax.lax.dot_general, dimension_numbers=dims, preferred_element_type=dtype)
    if name is not None:
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
        return row_major(_of_features(row_major(jnp.swapaxes(a, -1, -2)), b))
    return jnp.swapaxes(_dot_tn_cpu(b, a), -1, -2)


def _of_features(a: Float[Array, "*Z K M"], b: Float[Array, "*Z M N"]) -> Float[Array, "*Z K N"]:
    """Computes a b. Few rows are features here, not tokens that decode together: the loops for those would be slow."""
    many = a.shape[-2] >= LEAST_FEATURES and min(a.shape[-1], b.shape[-1]) >= LEAST and problem() is None
    name = "product_f32" if many and a.ndim == 2 and a.dtype == b.dtype == jnp.float32 else None
    return _multiply(a, b, (a.ndim - 1, b.ndim - 2), jnp.float32, name)
