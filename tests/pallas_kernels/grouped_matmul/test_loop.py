"""The loop over experts: memory of the compiled program, residuals, and how often weights are dequantized."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.grouped_matmul import experts, group_rows, grouped_matmul
from pallas_kernels.native import library
from tests.pallas_kernels.grouped_matmul.experts import choices, quantized, random_rows

SHAPE, EXPERTS, LAYERS, TILE = (256, 256), 6, 2, 32
needs_handlers = pytest.mark.skipif(bool(library.problem()), reason=f"implementation cpu {library.problem()}")


@pytest.fixture(scope="module")
def stack():
    return quantized(LAYERS, EXPERTS, SHAPE, layout="row_planar")


def temporary_bytes(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@needs_handlers
@pytest.mark.parametrize("direction", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
def test_one_experts_weight_exists_at_a_time(stack, direction):
    groups = group_rows(jnp.asarray(choices(64, 2, EXPERTS)), EXPERTS, TILE)
    rows = random_rows(len(groups.pair_of_slot_P), SHAPE[1], dtype=jnp.bfloat16)
    weight, tile = 2 * SHAPE[0] * SHAPE[1], 2 * TILE * sum(SHAPE)
    used = temporary_bytes(getattr(experts, f"loop_{direction}"), rows, stack, groups, jnp.int32(1))
    assert weight <= used <= weight + tile + 8192  # indices


@needs_handlers
def test_few_rows_need_no_weight(stack):
    groups = group_rows(jnp.asarray(choices(1, 2, EXPERTS)), EXPERTS)
    rows = random_rows(len(groups.pair_of_slot_P), SHAPE[1])
    assert temporary_bytes(experts.loop_forward, rows, stack, groups, jnp.int32(1)) < SHAPE[0] * SHAPE[1]


def test_the_gradient_keeps_the_given_codes_and_no_weight(stack):
    groups = group_rows(jnp.asarray(choices(8, 2, EXPERTS)), EXPERTS, TILE)
    x = random_rows(len(groups.pair_of_slot_P), SHAPE[1])
    traced = jax.make_jaxpr(lambda x, stack: jax.vjp(lambda x: grouped_matmul(x, stack, groups, 1), x))(x, stack)
    _, *saved = traced.jaxpr.outvars
    given = traced.jaxpr.invars
    codes = [variable for variable in saved if variable.aval.shape == stack.codes.shape]
    assert len(codes) == 1 and codes[0] in given
    assert not [v.aval for v in saved if v not in given and v.aval.size >= SHAPE[0] * SHAPE[1]]


def test_only_experts_with_rows_are_visited(stack):
    experts_Mk = jnp.asarray([[1, 4], [4, 1], [4, 1]])
    groups = group_rows(experts_Mk, EXPERTS, 2)
    assert experts.tile_bounds(groups, EXPERTS).tolist() == [0, 0, 2, 2, 2, 4, 4]
    assert int(groups.tiles) == 4
