"""Zeros for large arrays that are filled little by little, such as a key-value cache."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.native.library import handler, problem


def lazy_zeros(shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Returns zeros; on Linux, CPUs with the C++ loops allocate their memory when it is first written.

    Writing 256 MiB of zeros takes 0.1 to 2 s, depending on how fast the system provides memory.
    """
    result = jax.ShapeDtypeStruct(shape, dtype)

    def by_xla() -> jax.Array:
        return jnp.zeros(shape, dtype)

    if problem() is not None:
        return by_xla()
    return jax.lax.platform_dependent(cpu=jax.ffi.ffi_call(handler("lazy_zeros"), result), default=by_xla)
