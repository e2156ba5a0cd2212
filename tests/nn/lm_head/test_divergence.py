"""KL divergences computed tile by tile, against float64 sums over all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nn.lm_head.divergence import token_divergence
from qlora_jax.nn.lm_head.head import Head, HeadWithRows, TrainableHead
from qlora_jax.nn.lm_head.tiles import TILES, Tile
from tests.nn.gradients import random_array

M, D, V = 70, 24, 100


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TILES, "cpu", Tile(32, 32))


def definition(logits: jax.Array, others: jax.Array) -> np.ndarray:
    logps = [np.asarray(one, np.float64) for one in (logits, others)]
    logps = [one - np.log(np.exp(one).sum(axis=1, keepdims=True)) for one in logps]
    return (np.exp(logps[0]) * (logps[0] - logps[1])).sum(axis=1)


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
def test_divergence_is_that_of_all_logits(kind: str):
    hidden, near = random_array(M, D, seed=8), random_array(M, D, seed=8) + random_array(M, D, seed=9) / 20
    head, other_head = heads(kind)
    wanted = np.random.default_rng(0).random(M) < 0.6
    found = jax.jit(token_divergence)(hidden, head, near, other_head, jnp.asarray(wanted))
    expected = definition(head.logits(hidden), other_head.logits(near))
    np.testing.assert_allclose(found, np.where(wanted, expected, 0), rtol=1e-4, atol=1e-5)
    assert np.median(expected) > 0.001


def test_equal_predictions_do_not_diverge():
    hidden, head = random_array(M, D, seed=8), heads("frozen")[0]
    found = token_divergence(hidden, head, hidden, head, jnp.ones(M, bool))
    np.testing.assert_allclose(found, 0, atol=1e-6)


def test_logits_beyond_exp():
    hidden, near, head = 60 * random_array(M, D, seed=8), 60 * random_array(M, D, seed=9), heads("frozen")[0]
    found = token_divergence(hidden, head, near, head, jnp.ones(M, bool))
    logps = [np.asarray(jax.nn.log_softmax(head.logits(one)), np.float64) for one in (hidden, near)]
    np.testing.assert_allclose(found, (np.exp(logps[0]) * (logps[0] - logps[1])).sum(axis=1), rtol=1e-4, atol=1e-3)
    assert np.max(found) > 100
