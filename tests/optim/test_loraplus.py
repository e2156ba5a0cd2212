"""LoRA+ against peft's optimizer, and every optimizer against plain ones at the two learning rates."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.config import OptimArgs
from qlora_jax.models.partition import lora_specs
from qlora_jax.optim import make_optimizer
from qlora_jax.optim.loraplus import rate_factors
from qlora_jax.optim.optax_chain import OPTIMIZERS, init_state
from qlora_jax.optim.updates import apply_updates
from qlora_jax.training.step import update
from tests.marks import EXHAUSTIVE, SLOW, first_always
from tests.optim.mesh_lora import assert_same_bits, lora_of, meshes, on_mesh
from tests.optim.test_pager import ARGS, Run, assert_equal_runs, page_size, plain_run

ORACLE = Path(__file__).parent.parent / "oracle/loraplus.py"
RATIO = 16.0  # a power of two: the product with it is exact
PLUS = dataclasses.replace(ARGS, loraplus_lr_ratio=RATIO)
# Our leaf -> (PEFT's name, the axes of one layer in PEFT's order).
PEFT = {"lora_a": ("lora_A", (1, 0)), "lora_b": ("lora_B", (1, 0)), "magnitude": ("lora_magnitude_vector", (0,))}
LEAVES = {
    "q": {"lora_a": (2, 24, 4), "lora_b": (2, 4, 12), "magnitude": (2, 12)},
    "v": {"lora_a": (2, 24, 4), "lora_b": (2, 4, 6), "magnitude": (2, 6)},
}

FAST_LEAVES = ("lora_b", "magnitude")  # as in peft.optimizers.create_loraplus_optimizer


def _drawn(rng: np.random.Generator, scale: float = 1.0) -> dict[str, dict[str, np.ndarray]]:
    return {
        name: {leaf: (scale * rng.normal(size=shape)).astype(np.float32) for leaf, shape in leaves.items()}
        for name, leaves in LEAVES.items()
    }


def _by_peft_names(tree: dict) -> dict[str, np.ndarray]:
    """Returns {"q0.lora_A": [R, K]}: layers of a stack as modules."""
    return {
        f"{name}{layer}.{PEFT[leaf][0]}": np.ascontiguousarray(np.transpose(values, PEFT[leaf][1]))
        for name, leaves in tree.items()
        for leaf, stack in leaves.items()
        for layer, values in enumerate(np.asarray(stack))
    }


@pytest.mark.slow
def test_steps_equal_those_of_peft(oracle):
    """Trains with a schedule, weight decay and gradients on both sides of the clip."""
    rng, steps = np.random.default_rng(0), 12
    start, gradients = _drawn(rng), [_drawn(rng, 10.0 ** -(step % 4)) for step in range(steps)]
    args = OptimArgs(
        learning_rate=1e-3,
        loraplus_lr_ratio=11.0,
        weight_decay=0.1,
        max_grad_norm=0.3,
        schedule="cosine",
        warmup_ratio=0.0,
    )
    sent = {f"{name}_start": values for name, values in _by_peft_names(start).items()}
    named = [_by_peft_names(each) for each in gradients]
    sent |= {f"{name}_gradients": np.stack([each[name] for each in named]) for name in named[0]}
    found = oracle(ORACLE, settings=dataclasses.asdict(args) | {"steps": steps}, names=list(named[0]), **sent)

    optimizer = make_optimizer(args, steps)
    params = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(params)
    for step in range(steps):
        grads = jax.tree.map(jnp.asarray, gradients[step])
        params, state, _ = update(optimizer, params, state, grads)
        # optax rounds 1 - 0.999^t to f32, up to 3e-5 of a step; torch clips by max_norm / (norm + 1e-6).
        for name, ours in _by_peft_names(params).items():
            rate = args.learning_rate * (1 if name.endswith("lora_A") else args.loraplus_lr_ratio)
            np.testing.assert_allclose(ours, found[name][step], rtol=1e-6, atol=4e-5 * rate, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", first_always(["adamw_8bit", *(name for name in OPTIMIZERS if name != "adamw_8bit")]))
def test_each_leaf_trains_as_in_a_run_at_its_rate(name):
    """The fast leaves equal those of a run at 16 times the rate, the others those of a run at the rate itself."""
    args = dataclasses.replace(PLUS, name=name)
    slow = dataclasses.replace(args, loraplus_lr_ratio=None)
    fast = dataclasses.replace(slow, learning_rate=RATIO * slow.learning_rate)
    params = lora_of(0)

    def trained(args: OptimArgs) -> dict[str, dict[str, jax.Array]]:
        optimizer = make_optimizer(args, 10)
        values, state = lora_of(0), optimizer.init(params)
        for step in range(3):
            updates, state = jax.jit(optimizer.update)(lora_of(1 + step, 0.01), state, values)
            values = apply_updates(values, updates)
        return values

    found, at_rate, at_multiple = map(trained, (args, slow, fast))
    for module, leaves in found.items():
        for leaf, values in leaves.items():
            expected = at_multiple if leaf in FAST_LEAVES else at_rate
            np.testing.assert_array_equal(values, expected[module][leaf], err_msg=f"{module} {leaf}")
            other = at_rate if leaf in FAST_LEAVES else at_multiple
            assert np.any(values != other[module][leaf])


@pytest.mark.parametrize("name", first_always(list(OPTIMIZERS)))
def test_pages_change_no_bit(name):
    args = dataclasses.replace(PLUS, name=name)
    assert_equal_runs(Run(args).go(2 * page_size(args), steps=10), plain_run(args, steps=10))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW if name == "adamw_8bit" else EXHAUSTIVE) for name in OPTIMIZERS]
)
def test_parameters_on_a_mesh_equal_those_of_one_device(name):
    mesh = meshes()[1]
    optimizer = make_optimizer(dataclasses.replace(PLUS, name=name, max_grad_norm=0.0), 10)
    whole, lora = lora_of(0), on_mesh(lora_of(0), mesh)
    whole_state, state = optimizer.init(whole), init_state(optimizer, lora, lora_specs(lora, mesh), mesh)
    for step in range(2):
        grads = lora_of(100 + step, 0.01)
        lora, state, _ = update(optimizer, lora, state, on_mesh(grads, mesh), mesh=mesh)
        whole, whole_state, _ = update(optimizer, whole, whole_state, grads)
    assert_same_bits((lora, state), (whole, whole_state))


def test_the_state_is_that_of_a_run_without():
    """A checkpoint has the same tree; only the settings decide whether a run may resume from it."""
    with_, without = (make_optimizer(args, 10).init(lora_of(0)) for args in (PLUS, ARGS))
    assert jax.tree.structure(with_) == jax.tree.structure(without)


def test_rows_and_tables_of_embeddings_are_slow():
    """PEFT has them in the group of A."""
    params = {"model.embed_tokens": {"rows": 0}, "lm_head": {"weight": 0, "rows": 0}}
    factors = rate_factors(4.0)
    assert factors is not None
    assert factors(params) == {
        "model.embed_tokens": {"rows": 1.0},
        "lm_head": {"weight": 1.0, "rows": 1.0},
    }
