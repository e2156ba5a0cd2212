"""The engine's sampler equals references in NumPy and transformers, and a row's token depends on that row alone."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from qlora_jax.inference.engine.token_sampler import (
    Row,
    RowState,
    apply_penalties,
    row_settings,
    row_state,
    sample_tokens,
    top_k_top_p_min_p_mask,
)
from qlora_jax.inference.sampling_params import GREEDY, Sampling
from tests.marks import EXHAUSTIVE

ORACLE = Path(__file__).parents[2] / "oracle/sampling_processors.py"
VOCAB = 5000


def logits_of(seed: int, rows: int = 1, vocab: int = VOCAB, digits: int | None = None) -> np.ndarray:
    """Random logits; `digits` after the point make many of them equal."""
    logits = np.random.default_rng(seed).normal(0, 3, (rows, vocab)).astype(np.float32)
    return logits if digits is None else np.round(logits, digits)


def tokens_of(rows: list[Row], logits: np.ndarray, mask: np.ndarray | None = None) -> list[int]:
    vocab = logits.shape[1]
    words = None if mask is None else packed(mask)
    choice, _ = sample_tokens(jnp.asarray(logits), row_settings(rows, vocab), row_state(rows, vocab), words)
    return choice.token_R.tolist()


def packed(mask: np.ndarray) -> np.ndarray:
    """The bits of a mask of tokens, 32 to a word, the lowest bit first."""
    padded = np.pad(mask, ((0, 0), (0, -mask.shape[1] % 32)))
    return np.packbits(padded, axis=1, bitorder="little").view(np.int32)


def kept_by(sampling: Sampling, logits: np.ndarray) -> np.ndarray:
    """Returns which tokens the sampler may draw from logits that the temperature has divided."""
    filters = row_settings([Row(sampling)] * len(logits), logits.shape[1]).filters
    assert filters is not None
    return np.asarray(jax.jit(top_k_top_p_min_p_mask)(jnp.asarray(logits), filters))


def reference_kept(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns one row's kept tokens, by sorting it, in float64, and the tokens about which float32 cannot decide.

    A mass, the whole mass, p and their product are each rounded to float32, by at most 2**-24.
    """
    values = logits.astype(np.float64)
    kept = np.isfinite(values)
    if top_k:
        kept &= values >= np.sort(values)[::-1][min(top_k, values.size) - 1]
    shares = np.where(kept, np.exp(values - values.max()), 0)
    unsure = np.zeros_like(kept)
    if top_p < 1:
        distinct, groups = np.unique(values, return_inverse=True)
        masses = np.bincount(groups, shares)[::-1]  # equal logits share one, and the largest are first
        before = (np.cumsum(masses) - masses)[::-1][groups] / shares.sum()
        kept &= (before < top_p) | (values == distinct[-1])
        unsure = np.abs(before - top_p) < 2.0**-22
    return kept & (shares >= min_p * (1 - 1e-6)), unsure


def assert_keeps(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> None:
    """Fails unless the sampler keeps what the reference does."""
    actual = kept_by(Sampling(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p), logits) & np.isfinite(logits)
    for row, each in zip(logits, actual, strict=True):
        expected, unsure = reference_kept(row, top_k, top_p, min_p)
        assert unsure.mean() < 0.01
        np.testing.assert_array_equal(each | unsure, expected | unsure)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        *[(k, 1.0, 0.0) for k in (1, 2, 50, 4999, 9000)],
        *[(0, p, 0.0) for p in (1e-6, 0.1, 0.5, 0.9, 0.99, 0.9999)],
        *[(0, 1.0, p) for p in (1e-4, 0.1, 1.0)],
        (50, 0.9, 0.0),
        (3, 0.99, 0.2),
        (1000, 0.95, 0.01),
    ],
)
def test_filters_keep_what_sorting_keeps(top_k, top_p, min_p):
    few = np.full((1, VOCAB), -np.inf, np.float32)
    few[0, [7, 4000, 4999]] = [1.0, 2.0, 1.0]
    rows = [
        *[logits_of(seed, digits=digits)[0] * scale for seed, digits in enumerate([None, 1, 0]) for scale in (1, 9)],
        *few,
        np.zeros(VOCAB, np.float32),
        np.where(np.arange(VOCAB) % 2, np.float32(-0.0), np.float32(0.0)),
        logits_of(4)[0] + np.float32(500),
    ]
    assert_keeps(np.stack(rows), top_k, top_p, min_p)


@pytest.mark.parametrize("vocab", [1, 31, 49_153, 262_144])
def test_filters_of_small_and_large_vocabularies(vocab):
    logits = np.concatenate([logits_of(5, 2, vocab), logits_of(6, 1, vocab, 2)])
    logits[1] -= np.float32(18)
    logits[1, 0] = 3  # one token, and very many that are rare
    for top_k, top_p in [(0, 0.999), (vocab // 2, 0.9), (40, 1.0)]:
        assert_keeps(logits, top_k, top_p, 1e-12)


def test_processors_equal_those_of_transformers(oracle):
    logits, ids = logits_of(0, 8, 2000), np.random.default_rng(1).integers(0, 2000, (8, 60))
    settings = {
        "temperature": (0.7, 0, 1.0, 1e-9),
        "top_k": (1.0, 40, 1.0, 0.0),
        "top_p": (1.0, 0, 0.9, 0.0),
        "min_p": (1.0, 0, 1.0, 0.05),
        "all": (1.6, 100, 0.8, 0.02),
        "cold": (0.2, 20, 0.95, 0.01),
    }
    expected = oracle(ORACLE, logits=logits, ids=ids, settings=settings, repetition_penalty=1.3)
    for name, (temperature, top_k, top_p, min_p) in settings.items():
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        np.testing.assert_array_equal(kept_by(sampling, logits / np.float32(temperature)), expected[name], name)
    rows = [Row(Sampling(repetition_penalty=1.3), 0, each[:30], each[30:]) for each in ids.tolist()]
    actual = apply_penalties(jnp.asarray(logits), row_settings(rows, 2000), row_state(rows, 2000).history_RV)
    np.testing.assert_allclose(actual, expected["repetition"], rtol=2.5e-7)  # a product with 1 / 1.3, and a quotient


def reference_adjusted(logits: np.ndarray, row: Row) -> np.ndarray:
    """One row's logits after penalties and biases, token by token."""
    sampling, found = row.sampling, logits.astype(np.float64)
    for token in {*row.prompt, *row.reply}:
        found[token] *= sampling.repetition_penalty if found[token] < 0 else 1 / sampling.repetition_penalty
    for token in set(row.reply):
        count = list(row.reply).count(token)
        found[token] -= sampling.presence_penalty + count * sampling.frequency_penalty
    for token, value in sampling.logit_bias:
        found[token] += value
    return found


PENALTIES = [
    Sampling(repetition_penalty=1.7),
    Sampling(presence_penalty=0.8),
    Sampling(frequency_penalty=-0.3),
    Sampling(repetition_penalty=0.9, presence_penalty=-1, frequency_penalty=0.4, logit_bias=((3, 5.0), (9, -100.0))),
    Sampling(logit_bias=((0, 1.5), (VOCAB - 1, 2.5))),
    GREEDY,
]


def test_penalties_and_biases_equal_a_loop_over_tokens():
    generator = np.random.default_rng(2)
    rows = [
        Row(sampling, 0, generator.integers(0, 40, 30).tolist(), generator.integers(20, 60, 25).tolist())
        for sampling in PENALTIES
    ]
    logits = logits_of(3, len(rows))
    logits[:, 30] = -np.inf
    actual = apply_penalties(jnp.asarray(logits), row_settings(rows, VOCAB), row_state(rows, VOCAB).history_RV)
    expected = [reference_adjusted(each, row) for each, row in zip(logits, rows, strict=True)]
    np.testing.assert_allclose(actual, np.stack(expected), rtol=4e-7, atol=2e-6)
    np.testing.assert_array_equal(actual[-1], logits[-1])


def test_the_state_follows_the_reply():
    rows = [Row(sampling, 0, [1, 2, 2], [5, 5]) for sampling in PENALTIES]
    settings, state = row_settings(rows, VOCAB), row_state(rows, VOCAB)
    for step in range(3):
        choice, state = sample_tokens(jnp.asarray(logits_of(step, len(rows))), settings, state)
        grown = zip(rows, choice.token_R.tolist(), strict=True)
        rows = [row._replace(reply=[*row.reply, token]) for row, token in grown]
    rebuilt, needs = row_state(rows, VOCAB), slice(0, 4)  # the others' rows of the history are not read
    assert state.index_R.tolist() == rebuilt.index_R.tolist() == [5] * len(rows)
    assert state.history_RV is not None and rebuilt.history_RV is not None
    np.testing.assert_array_equal(state.history_RV[needs], rebuilt.history_RV[needs])


def test_greedy_takes_the_first_of_equals():
    logits = np.array([[1, 3, 3], [5, 3, 4], [-0.0, 0.0, -1], [-np.inf, -2, -np.inf]], np.float32)
    assert tokens_of([Row()] * 4, logits) == [1, 0, 0, 1]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0.8), Sampling(temperature=1.5, top_k=5), Sampling(temperature=1.0, top_p=0.8, min_p=0.1)],
)
def test_draws_have_the_probabilities_of_the_kept_tokens(sampling):
    logits = np.array([0.0, 1.0, 2.0, 0.5, -1.0, 1.5, -np.inf, 2.0], np.float32)
    count = 8000
    divided = logits / np.float32(sampling.temperature)
    kept, _ = reference_kept(divided, sampling.top_k, sampling.top_p, sampling.min_p)
    shares = np.where(kept, np.exp(divided.astype(np.float64)), 0)
    settings = row_settings([Row(sampling)], 8)
    settings = jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), settings)
    state = RowState(jnp.arange(count, dtype=jnp.int32), None)
    choice, _ = sample_tokens(jnp.tile(logits, (count, 1)), settings, state)
    found = np.bincount(np.asarray(choice.token_R), minlength=8)
    assert not found[~kept].any()
    assert stats.chisquare(found[kept], count * shares[kept] / shares.sum()).pvalue > 0.01


def test_a_mask_leaves_only_its_tokens():
    logits = logits_of(8, 3, 100)
    mask = np.zeros((3, 100), bool)
    mask[0, [31, 32, 99]], mask[1, :] = True, True
    mask[2, 63] = True
    first = [31, 32, 99][int(np.argmax(logits[0, [31, 32, 99]]))]
    drawn = Sampling(temperature=5.0, top_k=60, top_p=0.99)
    assert tokens_of([Row(), Row(), Row(drawn)], logits, mask) == [first, int(np.argmax(logits[1])), 63]


MANY = [
    GREEDY,
    Sampling(temperature=0.7, seed=1),
    Sampling(temperature=1.2, top_k=40, seed=2),
    Sampling(temperature=0.9, top_p=0.85, seed=3),
    Sampling(temperature=2.0, min_p=0.05, seed=4),
    Sampling(temperature=1.1, top_k=200, top_p=0.9, min_p=0.01, seed=5),
    Sampling(repetition_penalty=1.3, frequency_penalty=0.2),
    Sampling(temperature=0.8, presence_penalty=0.5, logit_bias=((11, 4.0),), seed=6),
    Sampling(logit_bias=((12, 3.0), (13, -3.0))),
]


def answers(rows: list[Row], logits: np.ndarray, masks: np.ndarray | None) -> list[tuple]:
    """Each row's token and log-probabilities."""
    settings, state = row_settings(rows, logits.shape[1]), row_state(rows, logits.shape[1])
    choice, _ = sample_tokens(jnp.asarray(logits), settings, state, masks, likeliest=4)
    return list(zip(*(np.asarray(leaf).tolist() for leaf in choice), strict=True))


EVERY_SIZE = [pytest.param(49_152, [(size, size) for size in range(2, 17)], marks=EXHAUSTIVE)]


@pytest.mark.parametrize(("vocab", "batches"), [(9001, [(3, 4), (16, 7)]), *EVERY_SIZE])
def test_a_row_does_not_depend_on_the_others(vocab, batches):
    """Tokens and log-probabilities are equal to the bit for any number of rows, place, and settings of others."""
    generator = np.random.default_rng(9)
    rows = [
        Row(each, index, [1, 2, 11], generator.integers(0, vocab, 20).tolist())
        for index, each in enumerate(MANY + [MANY[5]] * 7)
    ]
    logits = logits_of(10, len(rows), vocab)
    logits[3:5] = np.round(logits[3:5], 1)
    masks = packed(generator.random((len(rows), vocab)) < 0.7)
    masks[:9] = -1  # a mask that allows every token is like none
    alone = [
        answers([row], logits[[index]], masks[[index]] if index >= 9 else None)[0] for index, row in enumerate(rows)
    ]
    for size, shift in batches:
        chosen = [(index + shift) % len(rows) for index in range(size)]
        assert answers([rows[index] for index in chosen], logits[chosen], masks[chosen]) == [alone[i] for i in chosen]


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_row_without_a_token_changes_no_other(value):
    rows = [Row(Sampling(temperature=1.0, top_k=40, top_p=0.9, min_p=0.01, seed=seed)) for seed in range(3)]
    logits = logits_of(13, 3)
    alone = tokens_of(rows, logits)
    logits[1] = value
    found = tokens_of(rows, logits)
    assert [found[0], found[2]] == [alone[0], alone[2]] and 0 <= found[1] < VOCAB


def test_log_probabilities_equal_the_softmax_of_the_logits_that_nothing_changed():
    rows = [Row(sampling, 0, [1], [2]) for sampling in MANY]
    logits = logits_of(11, len(rows), 30_000)
    logits[0, 5] = 40  # a probability of almost 1
    logits[1] = 0
    choice, _ = sample_tokens(jnp.asarray(logits), row_settings(rows, 30_000), row_state(rows, 30_000), likeliest=20)
    wide = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_p = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    token = np.asarray(choice.token_R)[:, None]
    np.testing.assert_allclose(choice.log_p_R, np.take_along_axis(log_p, token, 1)[:, 0], rtol=5e-7, atol=4e-7)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(choice.likeliest_RN, order)
    np.testing.assert_allclose(choice.likeliest_log_p_RN, np.take_along_axis(log_p, order, 1), rtol=5e-7, atol=4e-7)


def test_no_likeliest_tokens_leave_the_log_probability():
    choices = [
        sample_tokens(jnp.zeros((1, 8)), row_settings([Row()], 8), row_state([Row()], 8), likeliest=n)[0]
        for n in (0, 3)
    ]
    assert [choice.likeliest_RN.shape for choice in choices if choice.likeliest_RN is not None] == [(1, 0), (1, 3)]
    np.testing.assert_allclose([choice.log_p_R for choice in choices], -np.log(8), rtol=2e-7)


def test_a_part_that_no_row_needs_is_absent():
    assert row_settings([Row(), Row(Sampling(top_k=4, top_p=0.5))], 8) == (None,) * 5  # both are greedy
    drawn = row_settings([Row(), Row(Sampling(temperature=1.0))], 8)
    assert drawn.draws is not None and drawn.filters is None
    assert row_state([Row()], 8).history_RV is None


def test_rows_with_one_seed_and_prompt_draw_differently():
    sampling, logits = Sampling(temperature=3.0, seed=1), np.tile(logits_of(12), (8, 1))
    places = itertools.product((0, 1), range(4))
    drawn = tokens_of([Row(sampling, repeat, (), [0] * index) for repeat, index in places], logits)
    assert len(set(drawn)) == 8
