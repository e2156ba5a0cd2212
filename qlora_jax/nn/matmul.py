"""Matrix products accumulated in f32, in the one form that is fast on every device.

XLA has a fast CPU path for products whose left operand contracts its last axis and whose arrays are all row-major.
Any other form is several times slower (docs/cpu.md). So products that contract rows, such as the gradient of a LoRA
matrix, transpose their narrower operand explicitly.

Dimension key: Z batch, M rows, K and N columns.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.dense_matmul import dot


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
