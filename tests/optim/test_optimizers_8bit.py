"""8-bit optimizers against bitsandbytes' CPU backend, bit for bit, and their other properties."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qlora_jax
from qlora_jax.config import OptimArgs
from qlora_jax.optim import make_elementwise, make_optimizer
from qlora_jax.optim.optimizers_8bit import (
    MIN_SIZE,
    Quantized,
    adamw_8bit_values,
    dequantize,
    lion_8bit_values,
    quantize,
    state_zeros,
)
from qlora_jax.optim.updates import apply_updates
from qlora_jax.quant.dynamic_8bit import LOOK_UP_SIZE, nearest_code_look_up

GOLDEN = Path(__file__).parent.parent / "golden/optimizers_8bit.npz"
MADE = {
    "AdamW8bit": lambda rate: adamw_8bit_values(rate, 0.9, 0.999, 1e-8, 0.1),
    "Lion8bit": lambda rate: lion_8bit_values(rate, 0.9, 0.99, 0.1),
}


def stepper(transform):
    """A step in one program, as in training: (parameters, state, gradients) -> (parameters, state)."""

    @jax.jit
    def step(params, state, grads):
        updates, state = transform.update(grads, state, params)
        return apply_updates(params, updates), state

    return step


def stepped(transform, params, gradients) -> tuple[dict, Any]:
    """(parameters, state) after a step with each of the gradients."""
    step, state = stepper(transform), transform.init(params)
    for grads in gradients:
        params, state = step(params, state, grads)
    return params, state


@pytest.mark.parametrize("kind", MADE)
def test_eight_steps_equal_bitsandbytes_golden(kind):
    with np.load(GOLDEN) as file:
        golden = dict(file)
    rates = jnp.array(json.loads(str(golden["settings"]))["rates"], jnp.float32)
    start = {name: jnp.asarray(golden[f"{name}.start"])[None] for name in ("large", "small")}
    gradients = {name: jnp.asarray(golden[f"{name}.gradients"].astype("f4"))[:, None] for name in start}
    steps = [{name: value[step] for name, value in gradients.items()} for step in range(len(rates))]
    params, state = stepped(MADE[kind](lambda count: rates[count]), start, steps)
    for name in start:
        np.testing.assert_array_equal(params[name][0], golden[f"{kind}.{name}"])
        for number, tree in enumerate(state.moments, 1):
            assert_held(tree[name], {k: golden.get(f"{kind}.{name}.{k}{number}") for k in ("state", "absmax")})


def assert_held(moment, expected):
    codes = moment.codes if isinstance(moment, Quantized) else moment
    np.testing.assert_array_equal(codes[0], expected["state"])
    if isinstance(moment, Quantized):
        np.testing.assert_array_equal(moment.absmax_LS[0], expected["absmax"])


def test_the_unsigned_look_up_is_that_of_bitsandbytes():
    with np.load(GOLDEN) as file:
        np.testing.assert_array_equal(nearest_code_look_up(signed=False), file["look_up.unsigned"])
    assert not np.array_equal(nearest_code_look_up(signed=False), nearest_code_look_up()) and LOOK_UP_SIZE == 2**16


def test_blocks_do_not_cross_from_one_tensor_into_the_next():
    x = jax.random.normal(jax.random.key(0), (3, 50, 83))  # 16 blocks and a part of one
    x = x * jnp.array([1e-3, 1.0, 1e3])[:, None, None]
    whole = quantize(x, signed=True)
    assert whole.absmax_LS.shape == (3, 17) and whole.codes.shape == x.shape
    for i in range(3):
        alone = quantize(x[i : i + 1], signed=True)
        jax.tree.map(np.testing.assert_array_equal, alone, jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], whole))
    found = dequantize(whole, signed=True)
    errors = jnp.mean(jnp.abs(found - x), axis=(1, 2)) / jnp.mean(jnp.abs(x), axis=(1, 2))
    assert jnp.all((errors > 0) & (errors < 0.02))


@pytest.mark.parametrize(("shape", "large"), [((9, 64, 64), True), ((9, 63, 65), False), ((9, 4096), True)])
def test_small_tensors_keep_f32_state(shape, large):
    assert (np.prod(shape[1:]) >= MIN_SIZE) == large == isinstance(state_zeros(shape), Quantized)
    assert large or jax.tree.leaves(state_zeros(shape))[0].dtype == jnp.float32


@pytest.mark.parametrize(("name", "most"), [("adamw_8bit", 2.05), ("lion_8bit", 1.025)])
def test_bytes_of_a_parameter(name, most):
    # Of a 7B model's projections at rank 64: the gate's A and B.
    params = {"a": jax.ShapeDtypeStruct((32, 4096, 64), jnp.float32), "b": jax.ShapeDtypeStruct((32, 64, 11008), "f4")}
    state = jax.eval_shape(make_optimizer(OptimArgs(name=name), 10).init, params)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)]
    assert sum(sizes) / sum(leaf.size for leaf in params.values()) <= most


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_near_the_same_in_32_bits(name):
    """Solves a least-squares problem in 8 and 32 bits: the losses fall alike."""
    target = {"a": jax.random.normal(jax.random.key(0), (2, 64, 80)), "b": jax.random.normal(jax.random.key(1), (2, 5))}
    args = OptimArgs(name=name, learning_rate=3e-2, warmup_ratio=0.0, max_grad_norm=0.0)
    losses = [falling_losses(dataclasses.replace(args, name=each), target) for each in (name, name[:-4] + "32bit")]
    np.testing.assert_allclose(*losses, rtol=0.03, atol=1e-3)
    assert losses[0][-1] < 0.3 * losses[0][0]


def falling_losses(args, target):
    transform = make_elementwise(args, 30)

    def loss(params):
        return sum(jnp.mean((params[name] - target[name]) ** 2) for name in target)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = transform.update(grads, state, params)
        return apply_updates(params, updates), state, value

    params = jax.tree.map(jnp.zeros_like, target)
    state, losses = transform.init(params), []
    for _ in range(30):
        params, state, value = step(params, state)
        losses.append(float(value))
    return losses


@pytest.mark.parametrize("kind", MADE)
def test_a_gradient_that_is_not_finite_shows_in_its_parameter_alone(kind):
    params = {"a": jnp.ones((1, 64, 64))}
    grads = {"a": jnp.ones((1, 64, 64)).at[0, 0, 0].set(jnp.nan)}
    params, state = stepped(MADE[kind](lambda count: jnp.float32(1e-3)), params, [grads])
    assert jnp.isnan(params["a"]).sum() == 1 and jnp.isnan(params["a"][0, 0, 0])
    assert state.moments[0]["a"].codes.dtype == jnp.uint8


@pytest.mark.parametrize("kind", MADE)
def test_scratch_is_that_of_a_few_tensors(kind):
    """Whole leaves' moments in f32 would take more than the 8 bits save."""
    shape = (40, 64, 128)
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    params = {"a": leaf, "b": leaf, "c": leaf}
    transform = MADE[kind](lambda count: jnp.float32(1e-3))

    def step(params, state, grads):
        updates, state = transform.update(grads, state, params)
        return apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(transform.init, params), params)
    memory: Any = compiled.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.5 * 4 * np.prod(shape)
    assert memory.alias_size_in_bytes > 3 * 4 * np.prod(shape)


@pytest.mark.parametrize("kind", MADE)
def test_optax_transforms_give_the_state_and_the_parameters_of_a_run(kind):
    """Exactly, save for parameters that jump in a step: their f32 difference cannot be exact."""
    public = {
        "AdamW8bit": qlora_jax.adamw_8bit(1e-3, weight_decay=0.1),
        "Lion8bit": qlora_jax.lion_8bit(lambda count: jnp.float32(1e-3), weight_decay=0.1),
    }[kind]
    key = jax.random.key(0)
    params = {"a": 0.02 * jax.random.normal(key, (2, 64, 80)), "b": jnp.zeros((2, 64, 70)), "c": jnp.ones((2, 8))}
    transform = MADE[kind](lambda count: jnp.float32(1e-3))
    step, update = stepper(transform), jax.jit(public.update)
    run, run_state, state = params, transform.init(params), public.init(params)
    for i in range(8):
        grads = jax.tree.map(lambda leaf, i=i: jax.random.normal(jax.random.fold_in(key, i), leaf.shape), params)
        updates, state = update(grads, state, run)
        found: dict = dict(optax.apply_updates(run, updates))
        before, (run, run_state) = run, step(run, run_state, grads)
        jax.tree.map(np.testing.assert_array_equal, state, tuple(jax.tree.leaves(run_state)))
        for name, leaf in found.items():
            change = np.abs(run[name] - before[name])
            jumps = (before[name] != 0) & (change > 0.5 * np.minimum(np.abs(before[name]), np.abs(run[name])))
            np.testing.assert_array_equal(leaf[~jumps], run[name][~jumps])
            np.testing.assert_allclose(leaf[jumps], run[name][jumps], rtol=0, atol=np.spacing(np.float32(2e-3)))
        assert not jnp.any(found["b"] != run["b"]) or i > 0  # from zero, every update is exact


def test_an_optax_transform_asks_for_parameters():
    transform = qlora_jax.adamw_8bit(1e-3)
    with pytest.raises(ValueError, match="params: found None"):
        transform.update({"a": jnp.ones((1, 2))}, transform.init({"a": jnp.ones((1, 2))}))


def test_an_nnx_optimizer_takes_an_optax_transform():
    class Adapter(nnx.Module):
        def __init__(self):
            self.lora = nnx.LoRAParam(jnp.ones((2, 64, 80)))

    model, expected = Adapter(), jnp.ones((2, 64, 80))
    transform = qlora_jax.adamw_8bit(1e-2)
    optimizer, state = nnx.Optimizer(model, transform, wrt=nnx.LoRAParam), transform.init(expected)
    for _ in range(2):
        grads = nnx.grad(lambda model: jnp.sum(model.lora[...] ** 2), argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        updates, state = transform.update(2.0 * expected, state, expected)
        optimizer.update(model, grads)
        expected = optax.apply_updates(expected, updates)
    np.testing.assert_array_equal(model.lora[...], expected)
