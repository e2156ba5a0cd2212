"""Paged updates against jitted optax, bit for bit, and the pages that move."""

import contextlib
import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.config import OptimArgs
from qlora_jax.optim import make_elementwise, make_optimizer
from qlora_jax.optim.optax_chain import ELEMENTWISE, OPTIMIZERS, check_elementwise, from_optax, to_optax
from qlora_jax.optim.page_layout import layer_pages
from qlora_jax.optim.page_pool import Memory, on_device
from qlora_jax.optim.pager import (
    PagedUpdate,
    check_budget,
    evict_to_budget,
    paged_init,
    resident_bytes,
)
from qlora_jax.optim.schedule import SHAPES
from qlora_jax.optim.updates import apply_updates
from qlora_jax.training.step import update
from tests.marks import EXHAUSTIVE

STEPS = 50
LAYERS, PAGES, LAYERS_A_PAGE = 10, 4, 3  # the last page has one layer
SHAPES_OF = {"q": {"lora_a": (8, 4), "lora_b": (4, 12)}, "v": {"lora_a": (8, 4), "lora_b": (4, 6)}}
LARGE_OF = {"q": {"lora_a": (64, 70), "lora_b": (64, 72)}, "v": {"lora_a": (64, 3), "lora_b": (3, 1400)}}
ARGS = OptimArgs(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.3)
MEMORY = Memory(jax.devices()[0], "pinned_host")
NUMPY = Memory(jax.devices()[0], "numpy")


def tree(seed: int, layers: int = LAYERS, name: str = ARGS.name) -> dict:
    """Makes parameters; for an 8-bit optimizer, three of four leaves are large enough for 8-bit state."""
    shapes_of = LARGE_OF if name.endswith("_8bit") else SHAPES_OF
    keys = iter(jax.random.split(jax.random.key(seed), 4))
    stacked = functools.partial(jax.tree.map, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return stacked(lambda shape: jax.random.normal(next(keys), (layers, *shape)), shapes_of)


@functools.partial(jax.jit, static_argnames="micro_batches")
def gradients(params: dict, step: jax.Array, micro_batches: int = 1) -> dict:
    """Gradients of some function of the parameters, below and above the clip: a wrong bit shows in every later step."""

    def accumulate(total, index):
        wave = jax.tree.map(lambda p: jnp.sin(9.0 * p + index + step) * jnp.exp2(-(step % 7.0)), params)
        return jax.tree.map(jnp.add, total, wave), None

    return jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, params), jnp.arange(float(micro_batches)))[0]


def plain_run(args: OptimArgs, steps: int = STEPS, start=None, micro_batches: int = 1) -> tuple:
    """(parameters, state, norms) after so many steps of jitted optax."""
    optimizer = make_optimizer(args, STEPS)

    @jax.jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return apply_updates(params, updates), state, optax.tree.norm(grads)

    params, state, first = start or (tree(0, name=args.name), optimizer.init(tree(0, name=args.name)), 0)
    norms = []
    for step in range(first, first + steps):
        params, state, norm = update(params, state, gradients(params, float(step), micro_batches))
        norms.append(norm)
    return params, state, norms


def page_size(args: OptimArgs) -> int:
    """Returns the bytes of the state of LAYERS_A_PAGE layers."""
    state = jax.eval_shape(make_elementwise(args, STEPS).init, tree(0, LAYERS_A_PAGE, args.name))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim)


class Run:
    """A paged run that records the transfers and norm of each step."""

    def __init__(self, args: OptimArgs, memory: Memory = MEMORY, start=None):
        self.transform = make_elementwise(args, STEPS)
        self.layout = layer_pages(self.transform, tree(0, name=args.name), page_size(args))
        self.memory, self.moves, self.norms = memory, [], []
        self.update = PagedUpdate(self.transform, self.layout, memory, args.max_grad_norm)
        self.params, self.step = tree(0, name=args.name), 0
        if start is None:
            self.state = paged_init(self.transform, self.params, self.layout, memory)
        else:
            self.params, state, self.step = start
            self.state = from_optax(state, self.layout, memory)

    def go(self, budget: int, steps: int = STEPS, micro_batches: int = 1) -> "Run":
        for _ in range(steps):
            grads = gradients(self.params, float(self.step), micro_batches)
            self.params, self.state, norm, moved = self.update(self.params, self.state, grads, budget)
            self.moves.append(moved)
            self.norms.append(norm)
            self.step += 1
        return self

    def optax(self):
        return to_optax(self.state, self.layout, self.memory)


def assert_same(found, expected) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_equal_runs(run: Run, plain: tuple) -> None:
    assert_same((run.params, run.optax(), run.norms), plain)


def test_pages_are_layers_of_every_leaf():
    run = Run(ARGS)
    assert run.layout.count == PAGES and run.layout.rows == (LAYERS_A_PAGE,) * 4
    assert [run.layout.page_bytes(page) for page in range(PAGES)] == [page_size(ARGS)] * 3 + [page_size(ARGS) // 3]
    assert len(run.state.pages[0]) == 8  # m and v of four leaves
    assert not any(map(on_device, run.state.pages))


@pytest.mark.parametrize(
    ("name", "pages"),
    [
        pytest.param(name, pages, marks=[] if name == ARGS.name or pages == 1 else EXHAUSTIVE)
        for name in OPTIMIZERS
        for pages in (0, 1, 2, PAGES)
    ],
)
def test_fifty_steps_equal_optax_at_every_budget_and_move_p_minus_c(name, pages):
    args = dataclasses.replace(ARGS, name=name)
    run = Run(args).go(pages * page_size(args))
    assert_equal_runs(run, plain_run(args))
    assert {(moved.pages_in, moved.pages_out) for moved in run.moves[1:]} == {(PAGES - pages, PAGES - pages)}
    assert run.moves[0].pages_in == PAGES  # all start on the host
    assert sum(map(on_device, run.state.pages)) == pages
    assert resident_bytes(run.state) == run.layout.total_bytes - sum(
        run.layout.page_bytes(i) for i, page in enumerate(run.state.pages) if not on_device(page)
    )
    assert len(run.update) == 2  # three layers, and one


@pytest.mark.parametrize("schedule", list(SHAPES))
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.3])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_fifty_steps_equal_optax_with_every_schedule_clipping_and_accumulation(schedule, max_grad_norm, micro_batches):
    args = dataclasses.replace(ARGS, schedule=schedule, max_grad_norm=max_grad_norm, warmup_ratio=0.1)
    run = Run(args).go(2 * page_size(args), micro_batches=micro_batches)
    assert_equal_runs(run, plain_run(args, micro_batches=micro_batches))


@pytest.mark.parametrize("name", ["adamw_32bit", "adamw_8bit"])
def test_norms_of_bf16_gradients_are_the_same_in_every_program(name):
    """XLA sums bf16 in another order if nothing else reads it in f32."""
    transform, optimizer = (make(OptimArgs(name=name), STEPS) for make in (make_elementwise, make_optimizer))
    shapes = {str(i): (4, 64, 32 * 2 ** (i % 3)) for i in range(14)}
    rng = np.random.default_rng(0)
    params, *gradients = (
        {"all": {key: jnp.asarray(0.01 * rng.normal(size=shape), jnp.bfloat16) for key, shape in shapes.items()}}
        for _ in range(25)
    )
    layout = layer_pages(transform, params)
    paged = PagedUpdate(transform, layout, MEMORY, max_grad_norm=0.3)
    whole, plain_state = jax.tree.map(jnp.copy, params), optimizer.init(params)
    state, norms = paged_init(transform, params, layout, MEMORY), []
    for grads in gradients:
        whole, plain_state, norm = update(optimizer, whole, plain_state, grads)
        params, state, paged_norm, _ = paged(params, state, grads, 0)
        norms.append((norm, paged_norm))
    assert_same(*zip(*norms, strict=True))
    assert_same((params, to_optax(state, layout, MEMORY)), (whole, plain_state))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(whole)} == {"bfloat16"}


def test_state_is_in_8_bits_where_leaves_are_large():
    run = Run(dataclasses.replace(ARGS, name="adamw_8bit"))
    assert run.layout.count == PAGES and run.layout.rows == (LAYERS_A_PAGE,) * 4
    held = [leaf.dtype for leaf in run.state.pages[0]]
    assert held.count(np.dtype("uint8")) == 6 and held.count(np.dtype("float32")) == 6 + 2  # scales; a small leaf


def test_budgets_that_change_from_step_to_step_change_no_bit():
    run, size = Run(ARGS), page_size(ARGS)
    for pages in [4, 4, 1, 3, 0, 2, 4, 1]:
        run.state, _ = evict_to_budget(run.state, MEMORY, pages * size)
        assert resident_bytes(run.state) <= pages * size
        run.go(pages * size, steps=1)
        assert resident_bytes(run.state) <= pages * size
    assert_equal_runs(run, plain_run(ARGS, steps=8))


def test_pages_of_numpy_arrays_where_there_is_no_pinned_memory():
    run = Run(ARGS, NUMPY).go(page_size(ARGS), steps=10)
    assert_equal_runs(run, plain_run(ARGS, steps=10))
    assert sum(isinstance(page[0], np.ndarray) for page in run.state.pages) == PAGES - 1


def test_every_transform_that_is_known_is_in_the_table_of_optimizers():
    assert set(OPTIMIZERS) >= ELEMENTWISE


def live_bytes() -> int:
    """Returns the device bytes of all live arrays."""
    arrays = [a for a in jax.live_arrays() if not a.is_deleted() and a.sharding.memory_kind == "device"]
    return sum(a.nbytes for a in arrays)


@dataclasses.dataclass(frozen=True)
class Watched(Memory):
    """Memory that records the live device bytes after each copy."""

    seen: list = dataclasses.field(default_factory=list)

    def to_device(self, page):
        copy = super().to_device(page)
        self.seen.append(live_bytes())
        return copy


@pytest.mark.parametrize("pages", [0, 1, 2, 3])
def test_pages_never_take_more_than_the_budget(pages):
    memory = Watched(jax.devices()[0], "pinned_host")
    run, budget = Run(ARGS, memory), pages * page_size(ARGS)
    run.go(budget, steps=2)
    grads = gradients(run.params, 0.0)
    norm = jax.block_until_ready(jax.jit(optax.tree.norm)(grads))
    before, shared = live_bytes() - resident_bytes(run.state), 2 * sum(leaf.nbytes for leaf in run.state.shared)
    memory.seen.clear()
    run.params, run.state, _, moved = run.update(run.params, run.state, grads, budget)
    assert len(memory.seen) == moved.pages_in > 0
    assert max(memory.seen) <= before + max(budget, page_size(ARGS)) + shared + norm.nbytes


def test_the_update_is_in_place():
    run = Run(ARGS).go(0, steps=1)
    for rows, program in run.update._programs.items():
        analysis, text = program.memory_analysis(), program.as_text()
        page = run.layout.page_bytes(0 if rows[0] == LAYERS_A_PAGE else PAGES - 1)
        donated = sum(leaf.nbytes for leaf in jax.tree.leaves(run.params)) + page
        assert analysis.alias_size_in_bytes == donated
        assert " copy(" not in text


@pytest.mark.parametrize("budget", [0, 2, PAGES])
def test_checkpoints_of_plain_and_paged_runs_are_each_others(budget):
    args, size = ARGS, page_size(ARGS)
    params, state, _ = plain_run(args, steps=4)
    run = Run(args, start=(params, make_elementwise_state(state), 4)).go(budget * size, steps=3)
    params, whole = run.params, run.optax()
    assert_same((params, whole), plain_run(args, steps=7)[:2])
    start = (jax.tree.map(jnp.array, params), jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(whole)), 7)
    assert_same(plain_run(args, steps=2, start=start)[:2], plain_run(args, steps=9)[:2])
    run.go(size, steps=2)  # to_optax did not change the pages
    assert_same((run.params, run.optax()), plain_run(args, steps=9)[:2])


def make_elementwise_state(state):
    """Returns the optimizer's part of the chain's state."""
    return jax.tree.unflatten(
        jax.tree.structure(jax.eval_shape(make_elementwise(ARGS, STEPS).init, tree(0))), jax.tree.leaves(state)
    )


@pytest.mark.parametrize(
    "shapes",
    [
        {"one": (7, 5)},
        {"layers_a": (8, 3), "layers_b": (8, 2), "rows": (50, 3)},
        {"more_a": (12, 2), "more_b": (12, 3), "few_a": (3, 2), "few_b": (3, 4)},
        {"a": (1, 4), "b": (5, 2), "c": (9, 3)},
    ],
)
def test_trees_whose_leaves_differ_in_length_are_exact(shapes):
    keys = jax.random.split(jax.random.key(1), len(shapes))
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    transform = make_elementwise(ARGS, STEPS)
    layout = layer_pages(transform, params, 1)  # the most pages possible
    assert layout.count > 1
    assert all(sum(k > 0 for k in layout.page_rows(p)) >= min(2, len(shapes)) for p in range(layout.count))
    update, state = PagedUpdate(transform, layout, MEMORY, 0.0), paged_init(transform, params, layout, MEMORY)
    expected, whole = jax.tree.map(jnp.array, params), transform.init(params)

    @jax.jit
    def plain(params, state, grads):
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for step in range(10):
        grads = gradients(expected, float(step))
        expected, whole = plain(expected, whole, grads)
        params, state, *_ = update(params, state, grads, 0)
    assert_same((params, to_optax(state, layout, MEMORY)), (expected, whole))


def standard(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wraps a transform in the promotion that optax expects."""

    def update(*args):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return transform.update(*args)

    return optax.GradientTransformation(transform.init, update)


ELEMENT_BY_ELEMENT = {
    "lion": lambda: optax.lion(1e-3),
    "rmsprop": lambda: optax.rmsprop(1e-3, momentum=0.9),
    "nadamw": lambda: optax.nadamw(1e-3),
    "bf16 momentum": lambda: optax.adam(1e-3, mu_dtype=jnp.bfloat16),
}
OVER_LEAVES = {
    "lamb": lambda: optax.lamb(1e-3),
    "lars": lambda: optax.lars(1e-3),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.3), optax.adam(1e-3)),
    "clipped by block": lambda: optax.chain(optax.clip_by_block_rms(0.3), optax.adam(1e-3)),
}


@pytest.mark.parametrize("name", [*ELEMENT_BY_ELEMENT, *OVER_LEAVES])
def test_other_transforms_are_tried_and_refused_on_a_difference(name):
    transform = standard({**ELEMENT_BY_ELEMENT, **OVER_LEAVES}[name]())
    layout = layer_pages(transform, tree(0), page_size(ARGS))
    refused = pytest.raises(ValueError, match=r"is not elementwise.*paging=off")
    with refused if name in OVER_LEAVES else contextlib.nullcontext():
        check_elementwise(transform, jax.eval_shape(lambda: tree(0)), layout, MEMORY)


def test_a_state_that_is_not_by_layers_is_refused():
    flat = optax.GradientTransformation(lambda params: jax.tree.map(jnp.ravel, params), optax.adam(1e-3).update)
    with pytest.raises(ValueError, match=r"cannot be paged, .*found shape \(320,\).*paging=off"):
        layer_pages(flat, tree(0))
    with pytest.raises(ValueError, match="cut along the first axis of parameters"):
        layer_pages(optax.adam(1e-3), {"scale": jnp.float32(1.0)})


def test_a_budget_that_can_not_be():
    run, size = Run(ARGS), page_size(ARGS)
    check_budget(size, run.layout, size)
    with pytest.raises(ValueError, match=r"paging_budget: found .*expected at least .* one page"):
        check_budget(size - 1, run.layout, None)
    with pytest.raises(ValueError, match=r"paging_budget: found .*expected at most 9,000 bytes, the device's memory"):
        check_budget(9001, run.layout, 9000)
    with pytest.raises(ValueError, match="budget_bytes: found -1, expected 0 or more"):
        run.go(-1, steps=1)


def test_no_donation_across_kinds_of_memory_ends_the_process():
    # Typical user parameters: uncommitted to a device, with an unspecified memory kind.
    code = (
        "import jax.numpy as jnp, optax, warnings, jax; warnings.simplefilter('error')\n"
        "from qlora_jax.optim.pager import *; from qlora_jax.optim.page_layout import *\n"
        "from qlora_jax.optim.page_pool import *\n"
        "memory = Memory.of(jax.devices()[0]); assert memory.kind == 'pinned_host'\n"
        "params = {'a': jnp.ones((4, 3)), 'b': jnp.ones((4, 2))}; transform = optax.adam(1e-3)\n"
        "layout = layer_pages(transform, params, 1); state = paged_init(transform, params, layout, memory)\n"
        "update = PagedUpdate(transform, layout, memory, 1.0)\n"
        "for budget in (0, 80, 160): params, state, *_ = update(params, state, {'a': jnp.ones((4, 3)), "
        "'b': jnp.ones((4, 2))}, budget)\n"
        "print(jax.block_until_ready(params)['a'].shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert done.stdout.strip() == "(4, 3)"
