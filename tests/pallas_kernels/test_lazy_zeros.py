"""Lazy zeros are zeros, also in memory that held something else, and take memory only when they are written."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lazy_zeros import lazy_zeros
from pallas_kernels.native.library import problem

MIB = 1 << 20


def resident() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("shape", [(0,), (3, 5), (1 << 18, 3), (5, MIB + 1), (24 * MIB,)])
def test_memory_that_was_used_before_is_zero(shape, dtype):
    for _ in range(3):
        used = jnp.ones(shape, dtype).block_until_ready()
        used.delete()
        zeros = lazy_zeros(shape, dtype)
        assert zeros.shape == shape and zeros.dtype == dtype and not np.asarray(zeros).any()


@pytest.mark.skipif(sys.platform != "linux" or problem() is not None, reason="requires Linux and the C++ loops")
def test_memory_is_taken_when_it_is_written():
    write = jax.jit(lambda x, at: jax.lax.dynamic_update_slice(x, jnp.ones(1000), (at,)), donate_argnums=0)
    write(lazy_zeros((256 * MIB // 4,), jnp.float32), 0).delete()  # compiles
    before = resident()
    x = lazy_zeros((256 * MIB // 4,), jnp.float32)
    for at in (0, 1000, 32 * MIB):
        x = write(x, at)
    assert np.asarray(x[32 * MIB : 32 * MIB + 1001]).sum() == 1000
    assert resident() - before < 16 * MIB
