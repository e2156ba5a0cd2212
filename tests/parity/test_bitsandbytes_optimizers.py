"""Millions of parameters through bitsandbytes' 8-bit optimizers and ours: parameters and states are bit-identical."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.optim.optimizers_8bit import Quantized, adamw_8bit_values, lion_8bit_values
from qlora_jax.optim.updates import apply_updates

SCRIPT = Path(__file__).resolve().parent.parent / "oracle/bnb_optimizer.py"
LAYERS, STEPS = 2, 4
SHAPES = {"large": (1024, 500), "odd": (77, 101), "small": (33, 20)}  # 500 x 1024 is whole blocks, 77 x 101 is not
RATES = [0.0, *(float(np.float32(rate)) for rate in (5e-4, 1e-3, 2e-4))]
CASES = {
    "AdamW8bit": (
        dict(betas=(0.9, 0.999), eps=1e-8),
        lambda rate, decay: adamw_8bit_values(rate, 0.9, 0.999, 1e-8, decay),
    ),
    "AdamW8bit, other betas": (
        dict(betas=(0.7, 0.95), eps=1e-6),
        lambda r, decay: adamw_8bit_values(r, 0.7, 0.95, 1e-6, decay),
    ),
    "Lion8bit": (dict(betas=(0.9, 0.99)), lambda rate, decay: lion_8bit_values(rate, 0.9, 0.99, decay)),
}


def drawn(rng: np.random.Generator) -> tuple[dict, dict]:
    """(parameters [LAYERS, ...], gradients [STEPS, LAYERS, ...]): zeros in both, and gradients of many sizes."""
    start = {name: rng.normal(scale=1e-2, size=(LAYERS, *shape)).astype("f4") for name, shape in SHAPES.items()}
    start["large"][:, :100] = 0  # as lora_b starts
    gradients = {}
    for name, shape in SHAPES.items():
        sizes = 10.0 ** rng.uniform(-6, 0, (STEPS, LAYERS, *shape[:1], 1))
        gradients[name] = (sizes * rng.normal(size=(STEPS, LAYERS, *shape)) ** 3).astype("f4")
    gradients["large"][:, 0, :2] = 0
    return start, gradients


def ours(transform, start: dict, gradients: dict) -> tuple[dict, tuple]:
    """(parameters after each step, moments after the last)."""

    @jax.jit
    def step(params, state, grads):
        updates, state = transform.update(grads, state, params)
        return apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, start)
    state, trace = transform.init(params), []
    for index in range(STEPS):
        params, state = step(params, state, {name: jnp.asarray(g[index]) for name, g in gradients.items()})
        trace.append(params)
    return {name: np.stack([each[name] for each in trace]) for name in start}, state.moments


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES)
def test_parameters_and_states_equal_bitsandbytes(oracle, case, decay):
    options, make = CASES[case]
    start, gradients = drawn(np.random.default_rng(0))
    tensors = {f"{name}{i}": value[i] for name, value in start.items() for i in range(LAYERS)}
    sent = {f"{name}{i}.gradients": value[:, i] for name, value in gradients.items() for i in range(LAYERS)}
    settings = {"class": case.split(",")[0], "options": options | {"lr": 1e-3, "weight_decay": decay}, "rates": RATES}
    expected = oracle(SCRIPT, settings=settings, names=list(tensors), **tensors, **sent)
    rates = jnp.array(RATES, jnp.float32)
    params, moments = ours(make(lambda count: rates[count], decay), start, gradients)
    for name, value in start.items():
        for i in range(LAYERS):
            np.testing.assert_array_equal(params[name][:, i], expected[f"{name}{i}"], err_msg=name)
            for number, tree in enumerate(moments, 1):
                for key, held in zip(("state", "absmax"), jax.tree.leaves(tree[name]), strict=False):
                    np.testing.assert_array_equal(held[i], expected[f"{name}{i}.{key}{number}"], err_msg=name)
            assert isinstance(moments[0][name], Quantized) == (value[i].size >= 4096)
