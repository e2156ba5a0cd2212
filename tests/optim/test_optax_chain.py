"""The chain against torch's AdamW step by step, and its other properties."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.config import OptimArgs
from qlora_jax.config.schema import PAGED
from qlora_jax.optim import make_elementwise, make_optimizer, make_schedule
from qlora_jax.optim.optax_chain import OPTIMIZERS
from qlora_jax.optim.schedule import SHAPES

GOLDEN = Path(__file__).parent.parent / "golden/adamw.npz"
ORACLE = Path(__file__).parent.parent / "oracle/adamw.py"


def read_golden() -> tuple[dict, dict, dict, dict]:
    """(settings, parameters at the start, gradients of every step, torch's parameters after every step)."""
    with np.load(GOLDEN) as file:
        arrays = dict(file)
    names = ("lora_a", "lora_b")
    start, gradients = ({n: arrays[f"{n}_{what}"] for n in names} for what in ("start", "gradients"))
    return json.loads(str(arrays["settings"])), start, gradients, {n: arrays[n] for n in names}


def optim_args(settings: dict) -> OptimArgs:
    """Converts the oracle's settings to ours."""
    ours = {k: v for k, v in settings.items() if k not in ("warmup_steps", "total_steps")}
    return OptimArgs(**ours, warmup_ratio=settings["warmup_steps"] / settings["total_steps"])


def trace(settings: dict, start: dict, gradients: dict) -> dict[str, np.ndarray]:
    """Returns every leaf after each step, [steps, ...]."""
    optimizer = make_optimizer(optim_args(settings), settings["total_steps"])
    parameters = jax.tree.map(jnp.asarray, start)
    state, rows = optimizer.init(parameters), []
    update = jax.jit(optimizer.update)
    for step in range(settings["total_steps"]):
        updates, state = update({n: jnp.asarray(g[step]) for n, g in gradients.items()}, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        rows.append(parameters)
    return {name: np.stack([row[name] for row in rows]) for name in start}


def assert_equal_traces(found: dict, expected: dict, learning_rate: float) -> None:
    # torch clips by max_norm / (norm + 1e-6), optax by max_norm / norm: at norms near 0.3 that is 3e-6 of a gradient,
    # and an Adam update, about one learning rate at most, changes relatively by no more than its gradients do.
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-6, atol=2e-4 * learning_rate, err_msg=name)


def test_fifty_steps_equal_torch_golden():
    settings, start, gradients, expected = read_golden()
    assert_equal_traces(trace(settings, start, gradients), expected, settings["learning_rate"])


@pytest.mark.parametrize("schedule", list(SHAPES))
def test_learning_rates_and_steps_equal_torch(oracle, schedule):
    settings, start, gradients, _ = read_golden()
    settings |= {"schedule": schedule, "warmup_steps": 2, "weight_decay": 0.0}
    sent = {f"{n}_gradients": g for n, g in gradients.items()}
    expected = oracle(ORACLE, settings=settings, names=list(start), **start, **sent)
    assert_equal_traces(trace(settings, start, gradients), expected, settings["learning_rate"])
    rates = jax.vmap(make_schedule(optim_args(settings), settings["total_steps"]))(jnp.arange(settings["total_steps"]))
    np.testing.assert_allclose(rates, expected["learning_rate"], rtol=1e-5, atol=1e-9)


def test_clipping_scales_to_the_global_norm():
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}  # norm 5
    args = OptimArgs(max_grad_norm=0.5)
    clipped = make_optimizer(args, 10)
    scaled = jax.tree.map(lambda g: g * jnp.float32(0.1), gradients)
    state, other = clipped.init(gradients), make_elementwise(args, 10).init(gradients)
    _, (_, after) = clipped.update(gradients, state, gradients)
    _, expected = make_elementwise(args, 10).update(scaled, other, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), after, expected)


def test_zero_turns_clipping_off():
    gradients = {"a": jnp.array([300.0, 0.0])}
    args = OptimArgs(max_grad_norm=0.0)
    state = make_optimizer(args, 10).init(gradients)
    jax.tree.map(
        np.testing.assert_array_equal,
        make_optimizer(args, 10).update(gradients, state, gradients),
        make_elementwise(args, 10).update(gradients, state, gradients),
    )


def test_state_is_that_of_the_pytree_given():
    lora = {"a": jnp.zeros((4, 2)), "b": jnp.zeros((2, 3))}
    moments = [leaf for leaf in jax.tree.leaves(make_optimizer(OptimArgs(), 10).init(lora)) if leaf.ndim]
    assert sorted(leaf.shape for leaf in moments) == sorted(2 * [(4, 2), (2, 3)])
    assert {leaf.dtype for leaf in moments} == {np.dtype("float32")}


def test_config_names_what_the_tables_hold():
    hints = OptimArgs.__annotations__
    assert set(hints["name"].__args__) == {*OPTIMIZERS, *(PAGED + name for name in OPTIMIZERS)}
    assert set(hints["schedule"].__args__) == set(SHAPES)


@pytest.mark.parametrize("schedule", list(SHAPES))
def test_schedule_of_one_step_trains(schedule):
    assert make_schedule(OptimArgs(schedule=schedule, warmup_ratio=0.0), 1)(0) == jnp.float32(2e-4)


def test_a_schedule_needs_steps():
    with pytest.raises(ValueError, match="total_steps: found 0"):
        make_schedule(OptimArgs(), 0)
