"""Comparisons of two models computed tile by tile, against float64 sums over all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nn.lm_head.divergence import compare_tokens
from qlora_jax.nn.lm_head.head import Head, HeadWithRows, TrainableHead
from qlora_jax.nn.lm_head.tiles import TILES, Tile
from tests.nn.gradients import random_array

M, D, V = 70, 24, 100


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TILES, "cpu", Tile(32, 32))


def definition(logits: jax.Array, others: jax.Array, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(-log p of the targets, -log q of them, KL(p || q))."""
    logps = [np.asarray(one, np.float64) for one in (logits, others)]
    logps = [one - np.log(np.exp(one).sum(axis=1, keepdims=True)) for one in logps]
    nll, other_nll = (-one[np.arange(len(targets)), targets] for one in logps)
    return nll, other_nll, (np.exp(logps[0]) * (logps[0] - logps[1])).sum(axis=1)


def heads(kind: str) -> tuple[Head | HeadWithRows | TrainableHead, Head | HeadWithRows | TrainableHead]:
    table, other = random_array(V, D, seed=1), random_array(V, D, seed=2)
    if kind == "trainable":
        return TrainableHead(table), TrainableHead(table + other / 10)
    if kind == "rows":
        frozen, ids = Head(table), (7, 99, 102, 100, 101)
        one, two = (HeadWithRows.of(frozen, random_array(5, D, seed=seed), None, ids) for seed in (3, 4))
        return one, two
    head = Head(table, random_array(V, seed=5), softcap=3.0 if kind == "softcap" else None)
    return head, head


@pytest.mark.parametrize("kind", ["frozen", "softcap", "rows", "trainable"])
def test_a_comparison_is_that_of_all_logits(kind: str):
    hidden, near = random_array(M, D, seed=8), random_array(M, D, seed=8) + random_array(M, D, seed=9) / 20
    head, other_head = heads(kind)
    wanted = np.random.default_rng(0).random(M) < 0.6
    targets = np.arange(M) + (V + 3 - M) * (kind == "rows")  # the last of these are trainable rows
    found = jax.jit(compare_tokens)(hidden, head, near, other_head, jnp.asarray(targets), jnp.asarray(wanted))
    expected = definition(head.logits(hidden), other_head.logits(near), targets)
    for of_token, of_all in zip(found, expected, strict=True):
        np.testing.assert_allclose(of_token, np.where(wanted, of_all, 0), rtol=1e-4, atol=1e-5)
    assert np.median(expected[-1]) > 0.001


@pytest.mark.parametrize("kind", ["frozen", "softcap", "rows"])
@pytest.mark.parametrize(("tokens", "tile"), [(70, Tile(32, 32)), (13, Tile(256, 2048)), (66, Tile(17, 23))])
def test_equal_predictions_do_not_diverge(monkeypatch, kind, tokens, tile):
    """Equal logits of two programs have equal sums to the bit, whichever way a processor vectorizes these."""
    monkeypatch.setitem(TILES, "cpu", tile)
    hidden, head = 3 * random_array(tokens, D, seed=8), heads(kind)[0]
    found = jax.jit(compare_tokens)(hidden, head, hidden, head, jnp.arange(tokens), jnp.ones(tokens, bool))
    np.testing.assert_array_equal(found.divergence_M, np.zeros(tokens))
    np.testing.assert_array_equal(found.nll_M, found.other_nll_M)


def test_logits_beyond_exp():
    hidden, near, head = 60 * random_array(M, D, seed=8), 60 * random_array(M, D, seed=9), heads("frozen")[0]
    found = compare_tokens(hidden, head, near, head, jnp.arange(M), jnp.ones(M, bool)).divergence_M
    logps = [np.asarray(jax.nn.log_softmax(head.logits(one)), np.float64) for one in (hidden, near)]
    np.testing.assert_allclose(found, (np.exp(logps[0]) * (logps[0] - logps[1])).sum(axis=1), rtol=1e-4, atol=1e-3)
    assert np.max(found) > 100
