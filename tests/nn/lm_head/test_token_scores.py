"""Tests -log p and argmax of tokens, computed tile by tile, against all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nn.lm_head.head import Head, HeadWithRows, TrainableHead
from qlora_jax.nn.lm_head.tiles import TILES, Tile
from qlora_jax.nn.lm_head.token_scores import token_scores

M, D = 700, 24


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TILES, "cpu", Tile(256, 32))


def _whole_numbers(*shape: int, seed: int) -> jax.Array:
    """Draws values whose products are exact in f32, in any order of sums."""
    return jnp.asarray(np.random.default_rng(seed).integers(-2, 3, shape), jnp.float32)


def _check(head, targets: np.ndarray, wanted: np.ndarray, tied: bool = True) -> np.ndarray:
    """Compares scores with the definition, and argmaxes among tied logits if these are bit-identical."""
    hidden = _whole_numbers(M, D, seed=0)
    logits = np.asarray(head.logits(hidden))
    found = jax.jit(token_scores)(hidden, head, jnp.asarray(targets, jnp.int32), jnp.asarray(wanted))
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[:, None], 1)[:, 0]
    likeliest = logits.argmax(axis=1) == targets
    np.testing.assert_allclose(found.nll_M, np.where(wanted, nll, 0), rtol=1e-5, atol=2e-5)
    compared = tied | (np.sum(logits > logits.max(axis=1, keepdims=True) - 1e-5, axis=1) == 1)
    np.testing.assert_array_equal(found.likeliest_M[compared], (likeliest & wanted)[compared])
    assert 0 < likeliest[compared].sum() < np.sum(compared)
    return likeliest


def _likely(head, vocabulary: int) -> np.ndarray:
    """Draws targets: a third are argmaxes, and a third tie with an earlier id."""
    logits = np.asarray(head.logits(_whole_numbers(M, D, seed=0)))
    last = vocabulary - 1 - logits[:, ::-1].argmax(axis=1)
    drawn = np.random.default_rng(2).integers(0, vocabulary, M)
    return np.select([np.arange(M) % 3 == 0, np.arange(M) % 3 == 1], [logits.argmax(axis=1), last], drawn)


@pytest.mark.parametrize("vocabulary", [20, 64, 100], ids=["one tile", "two tiles", "three and a rest"])
@pytest.mark.parametrize("wanted", [0, 1, 37, M])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_frozen_head(vocabulary, wanted, softcap):
    table = _whole_numbers(vocabulary, D, seed=1)
    head = Head(table.at[vocabulary // 2].set(table[3]), _whole_numbers(vocabulary, seed=3), softcap)
    mask = np.random.default_rng(1).permutation(M) < wanted
    _check(head, _likely(head, vocabulary), mask, tied=softcap is None)  # a tanh's rounding depends on its place


@pytest.mark.parametrize("ids", [(100, 101, 102), (98, 99, 100), (40, 7, 99)], ids=["beyond", "across", "within"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_head_with_rows_that_train(ids, softcap):
    """Creates rows with all kinds of ties: one equals another row, and one a frozen row."""
    table, rows = _whole_numbers(100, D, seed=1), _whole_numbers(3, D, seed=4)
    rows = rows.at[2].set(rows[0]).at[1].set(table[50])
    head = HeadWithRows.of(Head(table, None, softcap), rows, None, ids)
    targets = _likely(head, max(100, max(ids) + 1))
    targets[2::9] = ids[1]
    likeliest = _check(head, targets, np.random.default_rng(1).random(M) < 0.8, tied=softcap is None)
    assert any((likeliest & (targets == id)).any() for id in ids)


def test_a_head_that_trains_whole():
    head = TrainableHead(_whole_numbers(100, D, seed=1))
    _check(head, _likely(head, 100), np.ones(M, bool))


def test_logits_of_all_ids_exist_nowhere():
    """Uses 700 tokens and 1,000 ids, in chunks of 256 tokens."""
    head = Head(_whole_numbers(1000, D, seed=1))
    inputs = _whole_numbers(M, D, seed=0), head, jnp.zeros(M, jnp.int32), jnp.ones(M, bool)
    memory = jax.jit(token_scores).lower(*inputs).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 256 * 1000 * 4


def test_logits_of_a_16_bit_model_are_not_rounded_to_16_bits():
    """256 and 257 are equal in bfloat16, so rounded logits would tie."""
    hidden = jnp.zeros((2, D), jnp.bfloat16).at[:, 0].set(16).at[:, 1].set(1)
    head = Head(jnp.zeros((40, D), jnp.bfloat16).at[:, 0].set(16).at[33, 1].set(1), None, None)
    found = jax.jit(token_scores)(hidden, head, jnp.array([0, 33], jnp.int32), jnp.ones(2, bool))
    assert found.likeliest_M.tolist() == [False, True]
    np.testing.assert_allclose(found.nll_M[0] - found.nll_M[1], 1, rtol=1e-6)
