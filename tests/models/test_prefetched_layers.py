"""Layers that are fetched one ahead: the numbers of a loop over layers, and a schedule in which copies hide."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import aot
from pallas_kernels.aot.hlo import Instruction, parse
from pallas_kernels.aot.overlap import is_product
from pallas_kernels.aot.placement import HOST_LAYOUT
from qlora_jax.config import LoraArgs
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import host_sharding
from qlora_jax.models.prefetched_layers import COPIES_AT_ONCE, fetch_layer, prefetching_scan
from qlora_jax.training.step_spec import StepSpec
from tests.marks import EXHAUSTIVE
from tests.models.test_offloaded_experts import LARGER, MIXED_ON_CARD, ON_CARD

LAYERS, EXPERTS = 4, 4
SCOPE = "experts"  # name of products with fetched weights
PRODUCT = re.compile(rf"\b{SCOPE}\b")
FETCH = functools.partial(fetch_layer, first=1)


@functools.partial(jax.checkpoint, prevent_cse=False)
def step(x_MD, w_DD, position, fetched, frozen):
    """Returns (x w and then a product with each projection's codes, a sum), as layers do; x depends on the position."""
    x_MD = jnp.tanh(x_MD @ w_DD) * jnp.asarray(1 + position, x_MD.dtype)
    for name, scale in zip(sorted(fetched), frozen, strict=True):
        codes_END = fetched[name].weight
        with jax.named_scope(SCOPE):
            y_EMN = jnp.einsum("mk,enk->emn", x_MD, codes_END.astype(x_MD.dtype) * scale)
        x_MD = x_MD + jnp.tanh(y_EMN).sum(axis=0)
    return x_MD, x_MD.sum()


def prefetched(w_LDD, x_MD, stacks, frozen):
    y_MD, sums_L = prefetching_scan(step, FETCH, LAYERS, x_MD, w_LDD, stacks, frozen)
    return (y_MD**2).sum() + (sums_L * jnp.arange(LAYERS, dtype=y_MD.dtype)).sum()


def looped(w_LDD, x_MD, stacks, frozen):
    sums = []
    for layer in range(LAYERS):
        x_MD, total = step(x_MD, w_LDD[layer], layer, FETCH(stacks, layer), frozen)
        sums.append(total)
    return (x_MD**2).sum() + (jnp.stack(sums) * jnp.arange(LAYERS, dtype=x_MD.dtype)).sum()


def shapes(dtype: str, rows: int, width: int):
    """Returns the arguments; stacks have a row before the first layer that is scanned, and one behind the last."""
    stack = jax.ShapeDtypeStruct((LAYERS + 2, EXPERTS, width, width), jnp.uint8)
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((LAYERS, width, width), (rows, width))]
    return *arrays, dict.fromkeys("dgu", stack), [0.01] * 3


def filled(shape: jax.ShapeDtypeStruct, rng: np.random.Generator) -> jax.Array:
    if shape.dtype == jnp.uint8:
        return jnp.asarray(rng.integers(0, 16, shape.shape, np.uint8))
    return jnp.asarray(rng.normal(0, 0.3, shape.shape), shape.dtype)


def test_the_loss_and_its_gradients_equal_those_of_a_loop():
    """Outputs of layers count, rows of the stacks outside of the scan do not."""
    *arrays, frozen = shapes("float32", rows=8, width=16)
    w_LDD, x_MD, stacks = jax.tree.map(functools.partial(filled, rng=np.random.default_rng(0)), arrays)
    away = jax.device_put(stacks, host_sharding())
    found = jax.jit(jax.value_and_grad(prefetched, (0, 1)))(w_LDD, x_MD, away, frozen)
    expected = jax.jit(jax.value_and_grad(looped, (0, 1)))(w_LDD, x_MD, away, frozen)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)
    np.testing.assert_allclose(jax.jit(prefetched)(w_LDD, x_MD, away, frozen), found[0], rtol=1e-6)


@pytest.mark.slow
def test_copies_of_the_next_layer_hide_behind_the_products_of_this_one():
    if problem := aot.problem():
        pytest.skip(f"no compiling for absent cards: {problem}")
    w_LDD, x_MD, stacks, frozen = shapes("bfloat16", rows=64, width=2048)
    args = w_LDD, x_MD, aot.on_host(stacks), frozen
    compiled = aot.compile_for("h100", jax.grad(prefetched), *args, compiler_options=COPIES_AT_ONCE)
    shares = products_meanwhile(compiled.text)
    assert [len(of_loop) for of_loop in shares] == [3, 3] and min(map(min, shares)) > 0


@pytest.mark.parametrize("card", [pytest.param(card, marks=EXHAUSTIVE) for card in ("h100", "rtx4090")])
@pytest.mark.parametrize("remat", ["names", "full"])
def test_copies_hide_in_the_step_of_a_mixture(card, remat):
    if problem := aot.problem():
        pytest.skip(f"no compiling for absent cards: {problem}")
    weights, lora = dataclasses.replace(ON_CARD, experts_on_host=True), LoraArgs(rank=16)
    lowered = StepSpec(model=model_config(LARGER), weights=weights, lora=lora, batch=(1, 1, 512), remat=remat)
    program, options = lowered.gradients(), lowered.compiler_options
    compiled = aot.compile_for(card, program.function, *program.args, **program.kwargs, compiler_options=options)
    assert products_meanwhile(compiled.text) == [[1] * 6] * 2  # codes and their constants in u8, of three projections


@pytest.mark.slow
@pytest.mark.exhaustive
def test_copies_of_layers_in_several_types_hide_too():
    if problem := aot.problem():
        pytest.skip(f"no compiling for absent cards: {problem}")
    weights, lora = dataclasses.replace(MIXED_ON_CARD, experts_on_host=True), LoraArgs(rank=16)
    lowered = StepSpec(model=model_config(LARGER), weights=weights, lora=lora, batch=(1, 1, 512), remat="names")
    program, options = lowered.gradients(), lowered.compiler_options
    compiled = aot.compile_for("h100", program.function, *program.args, **program.kwargs, compiler_options=options)
    assert products_meanwhile(compiled.text) == [[1] * 3] * 2  # codes of three projections, without constants


def products_meanwhile(text: str) -> list[list[float]]:
    """Returns, for each loop over layers, the share of its products that start while each u8 array is copied.

    It is 1 if the copy starts before the first product with weights of the layer that runs, and is waited for after the
    last one.
    """
    computations, _ = parse(text)
    found = []
    for inside in computations.values():
        schedule = list(inside.values())
        products = [
            at for at, one in enumerate(schedule) if PRODUCT.search(one.op_name) and is_product(one, computations)
        ]
        copies = [(at, end_of(one, schedule)) for at, one in enumerate(schedule) if is_copy(one)]
        if products and copies:
            found.append([sum(start < at < end for at in products) / len(products) for start, end in copies])
    return found


def is_copy(one: Instruction) -> bool:
    """Returns True for the start of a copy of a u8 array from host memory."""
    return one.op.endswith("-start") and HOST_LAYOUT in one.type and "u8[" in one.type.partition(HOST_LAYOUT)[0]


def end_of(start: Instruction, schedule: list[Instruction]) -> int:
    """Returns the index of the instruction that waits for a copy."""
    return next(at for at, one in enumerate(schedule) if one.op.endswith("-done") and start.name in one.rest)
