"""Tests the next-token loss and its custom VJPs against autodiff of plain cross-entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nn.lm_head.cross_entropy import token_nll, token_nll_and_entropy
from qlora_jax.nn.lm_head.head import Head, HeadWithRows, TrainableHead
from qlora_jax.nn.lm_head.sharded_vocabulary import at_temperature
from qlora_jax.nn.lm_head.tiles import TILES, Tile
from tests.nn.gradients import check_vjp, random_array


@pytest.mark.parametrize("vocab", [50, 64, 100], ids=["a tile and a rest", "two tiles", "three and a rest"])
@pytest.mark.parametrize("supervised", [0, 1, 37, 700])
def test_token_nll(supervised, vocab, monkeypatch):
    monkeypatch.setitem(TILES, "cpu", Tile(256, 32))
    m = 700
    hidden, head = random_array(m, 24), random_array(vocab, 24)
    targets = jnp.asarray(np.random.default_rng(0).integers(0, vocab, m), jnp.int32)
    mask = jnp.asarray(np.random.default_rng(1).permutation(m) < supervised)

    def plain(hidden):
        log_p = jax.nn.log_softmax(hidden @ head.T)
        return jnp.where(mask, -jnp.take_along_axis(log_p, targets[:, None], 1)[:, 0], 0.0)

    check_vjp(lambda hidden: token_nll(hidden, Head(head), targets, mask), plain, hidden)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_token_nll_with_bias_and_softcap(biased, softcap, monkeypatch):
    monkeypatch.setitem(TILES, "cpu", Tile(256, 32))
    hidden, head, bias = random_array(300, 24), random_array(100, 24), random_array(100) if biased else None
    targets = jnp.asarray(np.random.default_rng(0).integers(0, 100, 300), jnp.int32)

    def plain(hidden):
        logits = hidden @ head.T + (0 if bias is None else bias[None])
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1)[:, 0]

    check_vjp(lambda hidden: token_nll(hidden, Head(head, bias, softcap), targets, jnp.ones(300, bool)), plain, hidden)


def test_token_nll_with_scaled_logits(monkeypatch):
    """Heads that are frozen, with trainable rows, and trainable; a softcap caps scaled logits."""
    monkeypatch.setitem(TILES, "cpu", Tile(16, 32))
    hidden, table, rows = random_array(24, 8), random_array(48, 8), random_array(2, 8)
    targets, everyone = jnp.arange(0, 48, 2, dtype=jnp.int32), jnp.ones(24, bool)

    def plain(hidden, table, softcap):
        logits = 0.25 * (hidden @ table.T)
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1)[:, 0]

    def with_rows(hidden, rows):
        return token_nll(hidden, HeadWithRows.of(Head(table, scale=0.25), rows, None, (2, 40)), targets, everyone)

    frozen = Head(table, scale=0.25)
    check_vjp(lambda h: token_nll(h, frozen, targets, everyone), lambda h: plain(h, table, None), hidden)
    check_vjp(
        lambda h, t: token_nll(h, TrainableHead(t, 1.5, 0.25), targets, everyone),
        lambda h, t: plain(h, t, 1.5),
        *(hidden, table),
    )
    check_vjp(with_rows, lambda h, r: plain(h, table.at[jnp.asarray([2, 40])].set(r), None), hidden, rows)


def test_token_nll_of_logits_beyond_exp(monkeypatch):
    """exp(l) alone would overflow, and the first tile's largest logit is far below the second's."""
    monkeypatch.setitem(TILES, "cpu", Tile(256, 32))
    hidden, head = random_array(8, 24), random_array(64, 24) * jnp.where(jnp.arange(64) < 32, 0.01, 200.0)[:, None]
    targets = jnp.arange(0, 64, 8, dtype=jnp.int32)
    everyone = jnp.ones(8, bool)

    def plain(hidden):
        return -jnp.take_along_axis(jax.nn.log_softmax(hidden @ head.T), targets[:, None], 1)[:, 0]

    check_vjp(lambda hidden: token_nll(hidden, Head(head), targets, everyone), plain, hidden)


@pytest.mark.parametrize("ids", [(100, 101, 102), (98, 99, 100), (40, 7, 99)], ids=["beyond", "across", "within"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("biased", [False, True])
def test_token_nll_with_rows_that_train(ids, softcap, biased, monkeypatch):
    """Trainable rows replace and extend a head; the replaced frozen rows have no influence."""
    monkeypatch.setitem(TILES, "cpu", Tile(256, 32))
    hidden, table, rows = random_array(700, 24), random_array(100, 24), random_array(3, 24)
    bias, row_bias = (random_array(100), random_array(3)) if biased else (None, None)
    places = np.asarray(ids)
    size = max(100, *places + 1)
    targets = jnp.asarray(np.random.default_rng(0).integers(0, size, 700), jnp.int32).at[:60:2].set(ids[1])
    mask = jnp.asarray(np.random.default_rng(1).random(700) < 0.4)

    def grown(x, own):
        return jnp.pad(x, ((0, size - 100),) + ((0, 0),) * (x.ndim - 1)).at[places].set(own)

    def logits(hidden, rows):
        logits = hidden @ grown(table, rows).T + (0 if bias is None else grown(bias, row_bias)[None])
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)

    def plain(hidden, rows):
        log_p = jax.nn.log_softmax(logits(hidden, rows))
        return jnp.where(mask, -jnp.take_along_axis(log_p, targets[:, None], 1)[:, 0], 0.0)

    def head(rows):
        return HeadWithRows.of(Head(table, bias, softcap), rows, row_bias, ids)

    check_vjp(lambda hidden, rows: token_nll(hidden, head(rows), targets, mask), plain, hidden, rows)
    np.testing.assert_allclose(head(rows).logits(hidden), logits(hidden, rows), atol=2e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("supervised", [0, 1, 300])
def test_token_nll_of_a_head_that_trains_whole(supervised, softcap, monkeypatch):
    monkeypatch.setitem(TILES, "cpu", Tile(256, 32))
    hidden, weight = random_array(700, 24), random_array(100, 24)
    targets = jnp.asarray(np.random.default_rng(0).integers(0, 100, 700), jnp.int32)
    mask = jnp.asarray(np.random.default_rng(1).permutation(700) < supervised)

    def plain(hidden, weight):
        logits = hidden @ weight.T
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        return jnp.where(mask, -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1)[:, 0], 0.0)

    check_vjp(lambda h, w: token_nll(h, TrainableHead(w, softcap), targets, mask), plain, hidden, weight)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("kind", ["frozen", "with rows", "trainable"])
def test_temperature_and_entropy(kind, softcap, monkeypatch):
    """The temperature divides capped logits; entropies have no gradient, and change none."""
    monkeypatch.setitem(TILES, "cpu", Tile(16, 32))
    hidden, table, rows = random_array(40, 8), random_array(80, 8), random_array(2, 8)
    targets, wanted = jnp.arange(0, 80, 2, dtype=jnp.int32), jnp.arange(40) % 3 > 0
    scale = None if softcap is None else 1.5

    def log_p(hidden, table):
        logits = (scale or 1.0) * (hidden @ table.T)
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        return jax.nn.log_softmax(logits / 0.7)

    def plain(hidden, table):
        return jnp.where(wanted, -jnp.take_along_axis(log_p(hidden, table), targets[:, None], 1)[:, 0], 0.0)

    def head(parts):
        if kind == "trainable":
            return TrainableHead(parts, softcap, scale)
        frozen = Head(table, None, softcap, scale=scale)
        return HeadWithRows.of(frozen, parts, None, (2, 41)) if kind == "with rows" else frozen

    def of_rows(parts):
        return table.at[jnp.asarray([2, 41])].set(parts) if kind == "with rows" else parts

    parts = rows if kind == "with rows" else table
    at = {"frozen": lambda h: (h, parts)}.get(kind, lambda *both: both)
    args = (hidden,) if kind == "frozen" else (hidden, parts)

    def ours(*args):
        found, entropy = token_nll_and_entropy(args[0], at_temperature(head(at(*args)[1]), 0.7), targets, wanted)
        return found + entropy - jax.lax.stop_gradient(entropy)

    check_vjp(ours, lambda *args: plain(args[0], of_rows(at(*args)[1])), *args)
    entropy = token_nll_and_entropy(hidden, at_temperature(head(parts), 0.7), targets, wanted)[1]
    expected = log_p(hidden, of_rows(parts))
    np.testing.assert_allclose(entropy, jnp.where(wanted, -jnp.sum(jnp.exp(expected) * expected, 1), 0), atol=2e-5)
