"""Fixtures of tests that compile for absent cards: the check that it works here, and small programs."""

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
    """Returns pallas_kernels.aot.compile_for; skips if it cannot work here."""
    if _problem:
        pytest.skip(f"no compiling for absent cards: {_problem}")
    return aot.compile_for


@pytest.fixture
def offload() -> Callable[[Any, Any], Any]:
    """Returns (x, kept) -> results, which updates `kept` in host memory as a paged optimizer does."""

    def update(x, kept):
        moved = jax.device_put(kept, jax.memory.Space.Device) * 0.5 + x
        return x - moved, jax.device_put(moved, jax.memory.Space.Host)

    return update


def arrays(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
