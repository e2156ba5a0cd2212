"""Logits of chosen tokens and of the rest, and the likeliest tokens, against all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nn.lm_head.chosen_tokens import NO_TOKEN, LikeliestTokens, chosen_logits, likeliest_tokens
from qlora_jax.nn.lm_head.head import Head, HeadWithRows, TrainableHead
from qlora_jax.nn.lm_head.tiles import TILES, Tile
from tests.nn.gradients import check_vjp, random_array
from tests.nn.lm_head.test_sharded_vocabulary import on_mesh

M, D, V, K = 40, 24, 96, 6
KINDS = ["frozen", "softcap", "rows", "trainable"]
ROWS = (7, 95, 98, 96, 97)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TILES, "cpu", Tile(16, 35))


def make_head(kind: str, table: jax.Array) -> Head | HeadWithRows | TrainableHead:
    if kind == "trainable":
        return TrainableHead(table, softcap=3.0)
    if kind == "rows":
        return HeadWithRows.of(Head(table), random_array(5, D, seed=3), None, ROWS)
    return Head(table, random_array(V, seed=5), softcap=3.0 if kind == "softcap" else None, scale=0.5)


def ids_of(vocabulary: int, count: int, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.stack([rng.permutation(vocabulary)[:count] for _ in range(M)]), jnp.int32)


WANTED = jnp.asarray(np.random.default_rng(0).random(M) < 0.6)


def plain_logits(hidden: jax.Array, head: Head | HeadWithRows | TrainableHead, ids: jax.Array) -> jax.Array:
    """Logits of the chosen tokens and the log-sum-exp of the others, of all logits; 0 where not wanted."""
    logits = head.logits(hidden)
    is_chosen = jnp.any(ids[:, :, None] == jnp.arange(logits.shape[1])[None, None], axis=1)
    chosen = jnp.take_along_axis(logits, ids, axis=1)
    rest = jax.nn.logsumexp(jnp.where(is_chosen, -jnp.inf, logits), axis=1)
    return jnp.where(WANTED[:, None], jnp.concatenate([chosen, rest[:, None]], axis=1), 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_logits_and_gradients_are_those_of_all_logits(kind: str):
    hidden, table = random_array(M, D, seed=8), random_array(V, D, seed=1)
    ids = ids_of(V + 3 * (kind == "rows"), K)

    def ours(hidden, table):
        head = make_head(kind, table if kind == "trainable" else jax.lax.stop_gradient(table))
        found = chosen_logits(hidden, head, ids, WANTED)
        return jnp.concatenate([found.chosen_MK, found.rest_M[:, None]], axis=1)

    def plain(hidden, table):
        return plain_logits(
            hidden, make_head(kind, table if kind == "trainable" else jax.lax.stop_gradient(table)), ids
        )

    check_vjp(jax.jit(ours), plain, hidden, table)


def test_the_gradient_by_trained_rows():
    hidden, table, ids = random_array(M, D, seed=8), random_array(V, D, seed=1), ids_of(V + 3, 30)

    def ours(rows):
        found = chosen_logits(hidden, HeadWithRows.of(Head(table), rows, None, ROWS), ids, WANTED)
        return jnp.concatenate([found.chosen_MK, found.rest_M[:, None]], axis=1)

    def plain(rows):
        return plain_logits(hidden, HeadWithRows.of(Head(table), rows, None, ROWS), ids)

    check_vjp(ours, plain, random_array(5, D, seed=3))


def test_tokens_may_be_missing_or_repeated_or_all_of_them():
    hidden, head = random_array(M, D, seed=8), Head(random_array(V, D, seed=1))
    ids = ids_of(V, V)
    everyone = jnp.ones(M, bool)
    found, vjp = jax.vjp(lambda x: chosen_logits(x, head, ids, everyone), hidden)
    assert np.isneginf(found.rest_M).all()
    np.testing.assert_allclose(found.chosen_MK, jnp.take_along_axis(head.logits(hidden), ids, axis=1), atol=1e-5)
    (gradient,) = vjp(type(found)(jnp.ones((M, V)), jnp.zeros(M)))
    np.testing.assert_allclose(gradient, jnp.broadcast_to(head.weight_VD.sum(axis=0), (M, D)), atol=1e-4)
    few = jnp.concatenate([ids[:, :2], ids[:, :1], jnp.full((M, 1), NO_TOKEN)], axis=1)
    found, vjp = jax.vjp(lambda x: chosen_logits(x, head, few, everyone), hidden)
    np.testing.assert_array_equal(found.chosen_MK[:, 0], found.chosen_MK[:, 2])
    assert np.isneginf(found.chosen_MK[:, 3]).all() and np.isfinite(found.rest_M).all()
    assert np.isfinite(vjp(type(found)(jnp.ones((M, 4)), jnp.ones(M)))[0]).all()


def test_nothing_cancels_where_chosen_tokens_have_all_the_mass():
    """The rest has a probability of e^-60; one minus the chosen mass would be 0."""
    hidden, table = jnp.ones((1, D)), jnp.zeros((V, D)).at[3].set(60.0 / D)
    found = chosen_logits(hidden, Head(table), jnp.array([[3]]), jnp.array([True]))
    np.testing.assert_allclose(found.rest_M - found.chosen_MK[:, 0], [np.log(V - 1) - 60], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_likeliest_tokens_are_those_of_all_logits(kind: str):
    hidden, head = random_array(M, D, seed=8), make_head(kind, random_array(V, D, seed=1))
    found = jax.jit(functools.partial(likeliest_tokens, count=K))(hidden, head, WANTED)
    logps = np.asarray(jax.nn.log_softmax(head.logits(hidden)), np.float64)
    order = np.argsort(-logps, axis=1)
    np.testing.assert_array_equal(found.ids_MK, np.where(WANTED[:, None], order[:, :K], 0))
    expected = np.where(WANTED[:, None], np.take_along_axis(logps, order[:, :K], axis=1), 0)
    np.testing.assert_allclose(found.logps_MK, expected, atol=1e-5)
    rest = np.log(np.exp(np.take_along_axis(logps, order[:, K:], axis=1)).sum(axis=1))
    np.testing.assert_allclose(found.rest_M, np.where(WANTED, rest, 0), atol=1e-5)


def test_all_tokens_may_be_likeliest():
    hidden, head = random_array(M, D, seed=8), Head(random_array(V, D, seed=1))
    found = likeliest_tokens(hidden, head, jnp.ones(M, bool), V)
    assert np.isneginf(found.rest_M).all()
    np.testing.assert_array_equal(np.sort(found.ids_MK, axis=1), np.broadcast_to(np.arange(V), (M, V)))
    np.testing.assert_allclose(np.exp(found.logps_MK).sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 4)])
def test_a_head_that_is_cut_over_devices(sizes: tuple[int, int]):
    hidden, weight, ids = random_array(M, D, seed=8), random_array(V, D, seed=1), ids_of(V, K)

    def chosen(head, hidden, ids, wanted):
        return tuple(chosen_logits(hidden, head, ids, wanted))

    run = on_mesh(chosen, sizes, 3.0)
    expected, expected_vjp = jax.vjp(lambda x: chosen(Head(weight, None, 3.0), x, ids, WANTED), hidden)
    found, vjp = jax.vjp(lambda x: run(weight, None, x, ids, WANTED), hidden)
    cotangents = random_array(M, K, seed=9), random_array(M, seed=9)
    for each, wanted in zip([*found, *vjp(cotangents)], [*expected, *expected_vjp(cotangents)], strict=True):
        np.testing.assert_allclose(each, wanted, atol=2e-5)
    top = on_mesh(lambda head, hidden, wanted: tuple(likeliest_tokens(hidden, head, wanted, K)), sizes, 3.0)
    likeliest = LikeliestTokens(*top(weight, None, hidden, WANTED))
    own = likeliest_tokens(hidden, Head(weight, None, 3.0), WANTED, K)
    np.testing.assert_array_equal(likeliest.ids_MK, own.ids_MK)
    np.testing.assert_allclose(likeliest.logps_MK, own.logps_MK, atol=1e-5)
    np.testing.assert_allclose(likeliest.rest_M, own.rest_M, atol=1e-5)
