"""`paged` against jitted optax, bit for bit, and inside optax chains and nnx.Optimizer."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import qlora_jax
from qlora_jax.optim.page_pool import on_device, page_bytes
from qlora_jax.optim.paged_transform import paged
from tests.optim.test_pager import assert_same, gradients, tree

STEPS = 6
PARAMS = tree(0)
STATE_BYTES = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))  # Adam's two moments
PAGE = STATE_BYTES // 5
ADAMW = optax.adamw(1e-2, weight_decay=0.1)


@pytest.fixture(autouse=True)
def optax_promotion():
    """Sets the dtype promotion that optax expects."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def jitted(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.GradientTransformation(transform.init, jax.jit(transform.update))


def resident(state) -> int:
    return sum(page_bytes(page) for page in state.pages if on_device(page))


def steps(transform, params, state=None, first: int = 0, count: int = STEPS):
    """Returns (parameters, state, the updates of every step)."""
    state, history = transform.init(params) if state is None else state, []
    for step in range(first, first + count):
        updates, state = transform.update(gradients(params, float(step)), state, params)
        params = optax.apply_updates(params, updates)
        history.append(updates)
    return params, state, history


@pytest.mark.parametrize("donate_state", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_updates_equal_those_of_jitted_optax_and_pages_stay_under_the_budget(share, donate_state):
    budget = int(share * STATE_BYTES)
    params, state, updates = steps(paged(ADAMW, budget, page_size=PAGE, donate_state=donate_state), PARAMS)
    expected, plain, expected_updates = steps(jitted(ADAMW), PARAMS)
    assert_same((params, updates), (expected, expected_updates))
    assert len(state.pages) > 2 and budget - PAGE <= resident(state) <= budget
    (count,) = state.shared
    assert count == plain[0].count == STEPS
    moments = [np.concatenate(rows) for rows in zip(*state.pages, strict=True)]
    assert_same(moments, jax.tree.leaves((plain[0].mu, plain[0].nu)))


@pytest.mark.parametrize(
    "transform",
    [
        optax.lion(1e-3),
        optax.adam(optax.linear_schedule(1e-2, 0.0, 10), mu_dtype=jnp.bfloat16),
        optax.chain(optax.add_decayed_weights(0.1), optax.scale_by_adam(), optax.scale(-1e-2)),
        qlora_jax.adamw_8bit(1e-2),
    ],
)
def test_other_transforms_are_equal(transform):
    params = tree(0, name="adamw_8bit")
    found = steps(paged(transform, "64KiB", page_size="32KiB"), params, count=3)
    expected = steps(jitted(transform), params, count=3)
    assert_same((found[0], found[2]), (expected[0], expected[2]))


def test_a_page_is_a_quarter_of_a_small_budget_unless_it_is_set():
    state = paged(ADAMW, f"{STATE_BYTES}B").init(PARAMS)
    assert max(map(page_bytes, state.pages)) <= STATE_BYTES // 4 and not resident(state)
    assert len(paged(ADAMW, STATE_BYTES, page_size="1 GiB").init(PARAMS).pages) == 1
    assert len(paged(ADAMW, 0).init(PARAMS).pages) == 1


def test_what_the_caller_passed_stays_valid():
    transform = paged(ADAMW, STATE_BYTES, page_size=PAGE)
    params, state, _ = steps(transform, PARAMS, count=2)
    grads = gradients(params, 2.0)
    once, after = transform.update(grads, state, params)
    again, after_again = transform.update(grads, state, params)
    assert_same((once, after), (again, after_again))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((grads, state, params, after)))


def test_a_donated_state_is_never_there_twice():
    transform = paged(ADAMW, STATE_BYTES, page_size=PAGE, donate_state=True)
    params, state, _ = steps(transform, PARAMS, count=1)
    grads = gradients(params, 1.0)
    transform.update(grads, state, params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.pages))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((grads, params)))


def test_a_chain_clips_before_the_pages():
    def clipped(transform):
        return optax.chain(optax.clip_by_global_norm(0.3), transform)

    found = steps(clipped(paged(ADAMW, STATE_BYTES // 2, page_size=PAGE)), PARAMS)
    expected = steps(clipped(jitted(ADAMW)), PARAMS)
    assert_same((found[0], found[2]), (expected[0], expected[2]))


class Adapter(nnx.Module):
    """Two LoRA parameters, and a frozen one."""

    def __init__(self):
        self.lora_a, self.lora_b = (nnx.LoRAParam(jnp.copy(leaf)) for leaf in PARAMS["q"].values())
        self.frozen = nnx.Param(jnp.ones(3))

    def __call__(self):
        return jnp.sum(jnp.sin(3.0 * self.lora_a[...])) + jnp.sum(jnp.cos(self.lora_b[...])) * self.frozen[...].sum()


@nnx.jit
def lora_gradients(model):
    return nnx.grad(lambda model: model(), argnums=nnx.DiffState(0, nnx.LoRAParam))(model)


def trained(transform) -> tuple[Adapter, nnx.Optimizer]:
    model = Adapter()
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.LoRAParam)
    for _ in range(STEPS):
        optimizer.update(model, lora_gradients(model))
    return model, optimizer


@pytest.mark.parametrize("inner", [ADAMW, optax.chain(optax.clip_by_global_norm(1.0), ADAMW)])
def test_an_nnx_optimizer_pages_its_state(inner):
    def with_clipping(transform):
        return transform if inner is ADAMW else optax.chain(optax.clip_by_global_norm(1.0), transform)

    size = 2 * sum(leaf.nbytes for leaf in PARAMS["q"].values())
    model, optimizer = trained(with_clipping(paged(ADAMW, size // 2, page_size=size // 8)))
    expected, _ = trained(with_clipping(jitted(ADAMW)))
    assert_same(nnx.state(model), nnx.state(expected))
    state = optimizer.opt_state if inner is ADAMW else optimizer.opt_state[1]
    kinds = [on_device(tuple(leaf.get_value() for leaf in page)) for page in state.pages]
    assert kinds.count(True) == kinds.count(False) > 1


@pytest.mark.parametrize("donate_state", [False, True])
def test_a_saved_state_resumes_bit_for_bit_under_another_budget(tmp_path, donate_state):
    transform = paged(ADAMW, STATE_BYTES // 2, page_size=PAGE)
    params, state, _ = steps(transform, PARAMS, count=3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    other = paged(ADAMW, 0, page_size=PAGE, donate_state=donate_state)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", other.init(PARAMS))
    assert_same(restored, state)
    assert_same(steps(other, params, restored, 3, 2)[0], steps(jitted(ADAMW), PARAMS, count=5)[0])
    params, state, _ = steps(transform, params, jax.tree.map(np.asarray, state), 3, 2)  # by any pytree tool
    assert_same(params, steps(jitted(ADAMW), PARAMS, count=5)[0])


def test_a_state_of_other_pages_is_an_error():
    state = paged(ADAMW, 0, page_size=PAGE).init(PARAMS)
    with pytest.raises(ValueError, match=r"state: its pages do not fit .*found 5 pages, expected 1.*page_size"):
        paged(ADAMW, 0).update(PARAMS, state, PARAMS)


def test_calls_under_jit_are_an_error_that_says_what_to_do():
    transform = paged(ADAMW, "1MiB")
    state = transform.init(PARAMS)
    model = Adapter()
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.LoRAParam)
    calls = [
        lambda: jax.jit(transform.update)(PARAMS, state, PARAMS),
        lambda: jax.jit(lambda grads: transform.update(grads, state, PARAMS))(PARAMS),
        lambda: jax.jit(transform.init)(PARAMS),
        lambda: nnx.jit(lambda o, m: o.update(m, nnx.state(m, nnx.LoRAParam)))(optimizer, model),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"under jax.jit .*Jit the function that computes the gradients.*outside"):
            call()


@pytest.mark.parametrize(
    ("transform", "elementwise"),
    [(optax.adam(1e-3), True), (optax.lamb(1e-3), False), (optax.chain(optax.clip_by_global_norm(0.3), ADAMW), False)],
)
def test_transforms_that_are_not_elementwise_are_an_error(transform, elementwise):
    refused = pytest.raises(ValueError, match=r"is not elementwise")
    with contextlib.nullcontext() if elementwise else refused:
        paged(transform, 0, page_size=PAGE).init(PARAMS)


def test_extra_arguments_reach_each_page():
    def update(updates, state, params=None, *, factor, **extra_args):
        return jax.tree.map(lambda g: -factor * g, updates), state

    transform = optax.GradientTransformationExtraArgs(optax.trace(0.9).init, update)
    grads = gradients(PARAMS, 1.0)
    pages = paged(optax.chain(optax.trace(0.9)), 0, page_size=PAGE).init(PARAMS)
    updates, _ = paged(transform, 0, page_size=PAGE).update(grads, pages, PARAMS, factor=jnp.float32(3.0))
    assert_same(updates, jax.tree.map(lambda g: -3.0 * g, grads))
    ignored, _ = paged(optax.trace(0.9), 0, page_size=PAGE).update(grads, pages, loss=1.0)
    assert_same(ignored, grads)


@pytest.mark.parametrize(
    ("budget", "words"), [(-1, "budget: found -1, expected 0 or more"), ("2 GiBs", r"budget: found '2 GiBs'.*2GiB")]
)
def test_malformed_budgets(budget, words):
    with pytest.raises(ValueError, match=words):
        paged(ADAMW, budget)
