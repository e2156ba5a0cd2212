"""Bytes between the parts of a traced program: small programs by hand, and a model's step against closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.config import LoraArgs
from qlora_jax.models.config import WeightFormat
from qlora_jax.sharding import absent_mesh
from qlora_jax.training.cost.traffic import Traffic
from qlora_jax.training.plan.roofline import ADAPTERS, ATTENTION, FROZEN, HEAD_AND_LOSS, REST, activation_traffic
from qlora_jax.training.step_spec import StepSpec
from tests.training.cost.step_cases import LAYERS, LIKE_PHI, MODEL

SIZE = 4 * 8 * 8  # bytes of a square
SQUARE = jax.ShapeDtypeStruct((8, 8), jnp.float32)


def one(x):
    with jax.named_scope("one"):
        return jnp.sin(jnp.cos(x))


def two(x):
    with jax.named_scope("two"):
        return x @ x.T


def traffic(function, *args, weights=()):
    found = Traffic({"one": "1", "two": "2"}, "rest")
    program = jax.jit(function).trace(*args).jaxpr.jaxpr
    found.program(program, [at in weights for at in range(len(program.invars))])
    return {name: size / SIZE for name, size in found.found.items()}


def test_arrays_between_parts_are_written_once_and_read_once_per_part():
    def program(x):
        y = one(x)  # reads x, writes y
        return two(y) + two(y) + y.reshape(4, 16).reshape(8, 8)  # reads y once per part, writes two products

    assert traffic(program, SQUARE) == {"1": 2, "2": 3, "rest": 4}


def test_what_a_part_uses_alone_stays_on_the_chip():
    assert traffic(lambda x: one(one(x)), SQUARE) == {"1": 2}


def test_weights_and_views_of_them_are_not_counted():
    def program(x, stack):
        return two(jax.lax.dynamic_index_in_dim(stack, 1, keepdims=False)) * x

    stack = jax.ShapeDtypeStruct((3, 8, 8), jnp.float32)
    assert traffic(program, SQUARE, stack, weights=(1,)) == {"2": 1, "rest": 3}


def test_a_loop_counts_as_often_as_it_runs():
    def layer(x, w):
        return one(x) * w, two(x)

    stack = jax.ShapeDtypeStruct((5, 8, 8), jnp.float32)
    # Per trip: one reads x and writes y; two reads x and writes what is stacked; the rest reads y and w, writes x.
    assert traffic(lambda x, ws: jax.lax.scan(layer, x, ws), SQUARE, stack) == {"1": 10, "2": 10, "rest": 15}


def test_a_loop_within_a_part_stays_on_the_chip():
    def program(x):
        with jax.named_scope("one"):
            return jax.lax.scan(lambda x, _: (jnp.sin(x), None), x, None, length=9)[0]

    assert traffic(program, SQUARE) == {"1": 2}


def test_recomputation_reads_and_writes_once_more():
    def loss(x):
        return jnp.sum(one(x))

    # Reads x, writes y; backward reads dy, writes dx.
    assert traffic(jax.grad(loss), SQUARE)["1"] == 4
    # Recomputation also reads x, and writes sin x and cos (cos x), which the backward pass reads.
    assert traffic(jax.grad(jax.checkpoint(loss)), SQUARE)["1"] == 4 + 1 + 2 + 2


def test_a_gradient_is_added_to_its_sum_in_memory():
    def program(x):
        total = jax.new_ref(jnp.zeros((8, 8)))
        jax.ref.addupdate(total, ..., one(x))
        return jax.ref.freeze(total)

    assert traffic(program, SQUARE)["1"] == 3  # reads x and the sum, writes the sum


# A model's step


def step(length=512, **changes):
    settings = {"model": MODEL, "weights": WeightFormat(platform="gpu"), "lora": LoraArgs(rank=8), "remat": "names"}
    return StepSpec(**settings | changes, batch=(2, 3, length))


def per_token(**settings):
    """Returns the bytes per token and layer, without what is the same for any number of tokens."""
    long, short = (activation_traffic(step(length=length, **settings)) for length in (1024, 512))
    return {name: (long[name] - short[name]) / (2 * 3 * 512) / LAYERS for name in long}


D, F = MODEL.embed_dim, MODEL.mlp_dim
Q, KV = MODEL.num_heads * MODEL.head_dim, MODEL.num_kv_heads * MODEL.head_dim
# Widths of the inputs and of the results of a layer's products; the inputs count once.
INPUTS, RESULTS = D + Q + D + F, (Q + 2 * KV) + D + 2 * F + D
LSE = 4 * MODEL.num_heads
RANKS = 7 * 8


def test_a_steps_traffic_is_that_of_closed_forms():
    found = per_token()
    # Forward: q, k, v -> out. Backward: q, k, v, out and its gradient -> dq, dk, dv.
    assert found[ATTENTION] == 2 * (Q + 2 * KV + Q) + 2 * (2 * (Q + 2 * KV) + 2 * Q) + 2 * LSE
    # Backward, the gradients of an input are added where they are made, those of its adapters included.
    assert found[FROZEN] == 2 * (INPUTS + RESULTS) + 2 * (RESULTS + 2 * INPUTS)
    # Forward an adapter adds to a result; x A is saved.
    assert found[ADAPTERS] == 2 * (INPUTS + 2 * RESULTS + RANKS) + 2 * (INPUTS + RESULTS + INPUTS + RANKS)
    assert found[HEAD_AND_LOSS] * LAYERS == pytest.approx(2 * 2 * D, rel=0.05)  # targets and weights are small


@pytest.mark.slow
def test_full_recomputation_runs_the_forward_pass_once_more_without_the_last_product():
    names, full = per_token(), per_token(remat="full")
    assert full[ATTENTION] - names[ATTENTION] == 2 * (Q + 2 * KV + Q)  # the first pass writes no log-sum-exp
    assert full[FROZEN] - names[FROZEN] == 2 * (INPUTS - F) + 2 * (RESULTS - D)
    assert full[HEAD_AND_LOSS] == names[HEAD_AND_LOSS]


@pytest.mark.slow
def test_adapters_on_two_projections_read_and_write_those_only():
    found = per_token(lora=LoraArgs(rank=8, target_modules=["q_proj", "v_proj"]))
    q_and_v = Q + KV
    least = 2 * (D + 2 * q_and_v + 16) + 2 * (D + q_and_v + D + 16)
    assert least <= found[ADAPTERS] <= least + 2 * D  # the gradients of x are added in one of the two parts
    assert found[ATTENTION] == per_token()[ATTENTION]


@pytest.mark.slow
def test_a_device_of_a_mesh_has_the_traffic_of_its_rows():
    alone = activation_traffic(dataclasses.replace(step(), batch=(2, 1, 512)))
    assert activation_traffic(step(mesh=absent_mesh(1, 3))) == alone


@pytest.mark.slow
@pytest.mark.parametrize("model", [MODEL, LIKE_PHI], ids=["llama", "phi"])
def test_the_rest_reads_and_writes_each_layers_stream_at_least_once(model):
    assert per_token(model=model)[REST] > 2 * 2 * 2 * D
