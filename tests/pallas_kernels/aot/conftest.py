"""What tests of compiling for absent cards share: the check that it works here, and small programs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot


@pytest.fixture(scope="session")
def _problem() -> str | None:
    return aot.problem()


@pytest.fixture
def compile_for(_problem: str | None) -> Callable[..., aot.CompiledFor]:
    """pallas_kernels.aot.compile_for; skips where compiling for absent cards can't work."""
    if _problem:
        pytest.skip(f"no compiling for absent cards: {_problem}")
    return aot.compile_for


@pytest.fixture
def offload() -> Callable[[Any, Any], Any]:
    """(x, kept) -> results: an update of `kept`, which lives in host memory, as a paged optimizer makes it."""

    def update(x, kept):
        moved = jax.device_put(kept, jax.memory.Space.Device) * 0.5 + x
        return x - moved, jax.device_put(moved, jax.memory.Space.Host)

    return update


def arrays(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
