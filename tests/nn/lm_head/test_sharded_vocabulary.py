"""Embedding and head cut over eight virtual devices, against whole ones on one device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.aot.collectives import read_collectives
from qlora_jax.nn.lm_head.chunks import chunk_size
from qlora_jax.nn.lm_head.cross_entropy import token_nll, token_nll_and_entropy
from qlora_jax.nn.lm_head.divergence import compare_tokens
from qlora_jax.nn.lm_head.head import Head
from qlora_jax.nn.lm_head.sharded_vocabulary import ShardedHead, at_temperature, look_up
from qlora_jax.nn.lm_head.tiles import TILES, Tile
from qlora_jax.nn.lm_head.token_scores import token_scores
from qlora_jax.sharding import FSDP, ROWS, Shard, make_mesh
from tests.nn.gradients import random_array

M, D, V = 8 * 40, 24, 96
MESHES = [(1, 8), (2, 4)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a device computes several chunks, and several tiles of its rows."""
    monkeypatch.setitem(TILES, "cpu", Tile(64, 5))


def on_mesh(function: Callable[..., Any], sizes: tuple[int, int], softcap: float | None = None) -> Callable[..., Any]:
    """Returns `function(head, arrays of tokens...)` for whole arrays (weight, bias, arrays of tokens...)."""
    mesh = make_mesh(*sizes)

    def per_device(weight, bias, *of_tokens):
        bias = None if bias is None else Shard(part=bias, axis=-1, count=sizes[1])
        return function(ShardedHead(Shard(part=weight, axis=-2, count=sizes[1]), bias, softcap), *of_tokens)

    def run(weight, bias, *of_tokens):
        specs = (P(FSDP), None if bias is None else P(FSDP), *[P(ROWS)] * len(of_tokens))
        mapped = jax.shard_map(per_device, mesh=mesh, in_specs=specs, out_specs=P(ROWS), check_vma=False)
        return mapped(weight, bias, *of_tokens)

    return jax.jit(run)


def whole_numbers(*shape: int, seed: int) -> jax.Array:
    """Draws values whose products are exact in f32, in any order of sums."""
    return jnp.asarray(np.random.default_rng(seed).integers(-2, 3, shape), jnp.float32)


def wanted_of(count: int) -> jax.Array:
    """`count` wanted tokens; the last device has none, so devices need different numbers of chunks."""
    order = np.random.default_rng(1).permutation(M - M // 8)
    return jnp.asarray(np.isin(np.arange(M), order[:count]))


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_look_up_equals_that_of_a_whole_table_to_the_bit(dtype, sizes):
    table = random_array(V, D).astype(dtype)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V, M), jnp.int32).at[:V].set(jnp.arange(V))
    found = on_mesh(lambda head, tokens: look_up(head.weight_VD, tokens), sizes)(table, None, tokens)
    assert found.dtype == table.dtype
    np.testing.assert_array_equal(found, table[tokens])


@pytest.mark.parametrize(("softcap", "biased", "sizes"), [(None, False, (1, 8)), (3.0, True, (2, 4))])
def test_token_nll_of_a_head_that_is_cut(softcap, biased, sizes):
    hidden, weight, bias = random_array(M, D), random_array(V, D), random_array(V) if biased else None
    targets = jnp.asarray(np.random.default_rng(0).integers(0, V, M), jnp.int32)
    cotangent = random_array(M, seed=9)
    assert 2 * chunk_size(M // 8, sizes[1]) < M // 8
    run = on_mesh(lambda head, *of_tokens: token_nll(of_tokens[0], head, *of_tokens[1:]), sizes, softcap)
    for supervised in (0, 1, 50, 280):
        wanted = wanted_of(supervised)
        expected, expected_vjp = jax.vjp(
            lambda x, w=wanted: token_nll(x, Head(weight, bias, softcap), targets, w), hidden
        )
        found, vjp = jax.vjp(lambda x, w=wanted: run(weight, bias, x, targets, w), hidden)
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)
        np.testing.assert_array_equal(found[~wanted], 0)
        (gradient,), (expected_gradient,) = vjp(cotangent), expected_vjp(cotangent)
        assert np.linalg.norm(gradient - expected_gradient) <= 1e-6 * np.linalg.norm(expected_gradient)


def test_temperature_and_entropy_of_a_head_that_is_cut():
    hidden, weight, targets, wanted = random_array(M, D), random_array(V, D), jnp.arange(M) % V, wanted_of(250)

    def scores(head, *of_tokens):
        return token_nll_and_entropy(of_tokens[0], at_temperature(head, 0.7), *of_tokens[1:])

    expected = scores(Head(weight, None, 3.0), hidden, targets, wanted)
    found = on_mesh(scores, (2, 4), 3.0)(weight, None, hidden, targets, wanted)
    for each, expected_each in zip(found, expected, strict=True):
        np.testing.assert_allclose(each, expected_each, rtol=2e-6, atol=4e-6)


def test_token_nll_of_logits_beyond_exp():
    """exp(l) alone would overflow, and each device's largest logit is far from the others'."""
    weight = random_array(V, D) * 10.0 ** jnp.repeat(jnp.arange(-4.0, 4.0), V // 8)[:, None]
    hidden, targets = random_array(M, D), jnp.arange(M, dtype=jnp.int32) % V
    everyone = jnp.ones(M, bool)
    run = on_mesh(lambda head, *of_tokens: token_nll(of_tokens[0], head, *of_tokens[1:]), (1, 8))
    expected = token_nll(hidden, Head(weight), targets, everyone)
    assert np.isfinite(expected).all() and np.max(expected) > 1000
    np.testing.assert_allclose(run(weight, None, hidden, targets, everyone), expected, rtol=1e-6)


@pytest.mark.parametrize("sizes", [(2, 4)])
def test_scores_of_a_head_that_is_cut(sizes):
    """Half of the rows equal a row of another device, so the likeliest ids tie; the smallest id wins."""
    hidden, weight = whole_numbers(M, D, seed=0), whole_numbers(V, D, seed=1)
    weight = weight.at[V // 2 :].set(weight[: V // 2])
    logits = np.asarray(hidden @ weight.T)
    first, last = logits.argmax(axis=1), V - 1 - logits[:, ::-1].argmax(axis=1)
    assert (first != last).all()
    targets, wanted = jnp.asarray(np.where(np.arange(M) % 2, first, last), jnp.int32), wanted_of(250)
    run = on_mesh(lambda head, *of_tokens: token_scores(of_tokens[0], head, *of_tokens[1:]), sizes)
    found = run(weight, None, hidden, targets, wanted)
    expected = token_scores(hidden, Head(weight), targets, wanted)
    np.testing.assert_array_equal(found.likeliest_M, (np.arange(M) % 2 == 1) & np.asarray(wanted))
    np.testing.assert_array_equal(found.likeliest_M, expected.likeliest_M)
    np.testing.assert_allclose(found.nll_M, expected.nll_M, rtol=2e-6, atol=2e-6)


def test_gradients_of_a_16_bit_head_that_is_cut():
    """Factors exp(l - largest) are rounded to 16 bits, with another largest logit on each device."""
    hidden, weight = random_array(M, D).astype(jnp.bfloat16), random_array(V, D).astype(jnp.bfloat16)
    targets, wanted = jnp.arange(M, dtype=jnp.int32) % V, wanted_of(200)
    run = on_mesh(lambda head, *of_tokens: token_nll(of_tokens[0], head, *of_tokens[1:]), (2, 4))
    expected, expected_vjp = jax.vjp(lambda x: token_nll(x, Head(weight), targets, wanted), hidden)
    found, vjp = jax.vjp(lambda x: run(weight, None, x, targets, wanted), hidden)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)
    (gradient,), (expected_gradient,) = vjp(jnp.ones(M)), expected_vjp(jnp.ones(M))
    assert gradient.dtype == jnp.bfloat16
    off = np.linalg.norm(np.float32(gradient) - np.float32(expected_gradient))
    assert off <= 2**-8 * np.linalg.norm(np.float32(expected_gradient))


def test_no_row_of_a_table_crosses():
    """All arrays that devices exchange are of tokens; a gathered table would have 128 times as many rows."""
    rows, tokens = 128 * 64, 64

    def both(head, hidden, targets):
        looked_up = look_up(head.weight_VD, targets)
        return token_nll(hidden + looked_up, head, targets, targets > 0)

    arrays = jnp.zeros((tokens, D)), jnp.arange(tokens, dtype=jnp.int32)
    compiled = on_mesh(both, (1, 8)).lower(jnp.zeros((rows, D)), None, *arrays).compile()
    exchanged = read_collectives(compiled.as_text())
    assert {"all-gather", "all-reduce"} <= {one.operation for one in exchanged}
    assert max(one.elements for one in exchanged) == tokens * D


@pytest.mark.parametrize("sizes", [(1, 8)])
def test_logits_of_a_head_that_is_cut(sizes):
    """Each device gets the logits of all ids for its tokens, as decoding needs them."""
    hidden, weight, bias = whole_numbers(M, D, seed=0), whole_numbers(V, D, seed=1), whole_numbers(V, seed=2)
    run = on_mesh(lambda head, hidden: head.logits(hidden), sizes, softcap=30.0)
    expected = Head(weight, bias, 30.0).logits(hidden)
    np.testing.assert_allclose(run(weight, bias, hidden), expected, rtol=1e-6)


def test_divergence_of_a_head_that_is_cut():
    """Each device's largest logit is far from the others', for both predictions."""
    scale = jnp.repeat(jnp.arange(1.0, 9.0), V // 8)[:, None]
    hidden, other, weight = random_array(M, D), random_array(M, D, seed=3), random_array(V, D) * scale
    wanted, targets = wanted_of(250), jnp.arange(M) % V
    run = on_mesh(lambda head, x, y, *tokens: compare_tokens(x, head, y, head, *tokens), (2, 4))
    expected = compare_tokens(hidden, Head(weight), other, Head(weight), targets, wanted)
    for found, whole in zip(run(weight, None, hidden, other, targets, wanted), expected, strict=True):
        np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)
    assert np.max(expected.divergence_M) > 5
