"""Warm-up from 0 or from the first step's share: rates by closed form and by optax, and what the first step does."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.config import OptimArgs
from qlora_jax.optim import make_optimizer, make_schedule
from qlora_jax.optim.optax_chain import OPTIMIZERS
from qlora_jax.optim.schedule import warmup_steps
from qlora_jax.optim.updates import apply_updates

TOTAL = 24


def rates(schedule: str, warmup_start: str, warmup_ratio: float) -> np.ndarray:
    args = OptimArgs(schedule=schedule, warmup_start=warmup_start, warmup_ratio=warmup_ratio, learning_rate=1.0)
    return np.array([float(make_schedule(args, TOTAL)(step)) for step in range(TOTAL)], np.float32)


@pytest.mark.parametrize(
    ("schedule", "warmup_ratio"), [("constant", 0.0), ("linear", 0.01), ("cosine", 0.25), ("constant", 1.0)]
)
def test_rates_are_the_closed_forms_to_the_bit(schedule, warmup_ratio):
    warm = warmup_steps(OptimArgs(warmup_ratio=warmup_ratio), TOTAL)
    steps = np.arange(warm, dtype=np.float32)
    zero, first = (rates(schedule, start, warmup_ratio) for start in ("zero", "first"))
    np.testing.assert_array_equal(zero[:warm], steps / np.float32(max(1, warm)))
    np.testing.assert_array_equal(first[:warm], (steps + 1) / np.float32(max(1, warm)))
    np.testing.assert_array_equal(zero[warm:], first[warm:])
    if warm < TOTAL:
        assert zero[warm] == 1


def test_rates_of_both_are_those_of_optax():
    warm, rate = 6, 3e-4
    for start, first in (("zero", 0.0), ("first", rate / warm)):
        args = OptimArgs(schedule="linear", warmup_ratio=0.25, warmup_start=start, learning_rate=rate)
        rise = optax.linear_schedule(first, rate, warm if start == "zero" else warm - 1)
        expected = optax.join_schedules([rise, optax.linear_schedule(rate, 0.0, TOTAL - warm)], [warm])
        found = make_schedule(args, TOTAL)(np.arange(TOTAL))
        np.testing.assert_allclose(found, expected(np.arange(TOTAL)), rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_first_step_trains_only_from_the_first_share(name):
    parameters = {"a": jnp.ones((4, 2))}
    for start, trains in (("zero", False), ("first", True)):
        optimizer = make_optimizer(OptimArgs(name=name, warmup_ratio=0.25, warmup_start=start), TOTAL)
        updates, _ = optimizer.update(parameters, optimizer.init(parameters), parameters)
        moved = apply_updates(parameters, updates)["a"] != parameters["a"]
        assert moved.all() if trains else not moved.any()
