"""Likelihoods in padded batches equal those of each row alone, summed in float64."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.evaluation import loglikelihood
from qlora_jax.evaluation.batches import batches_by_length
from qlora_jax.evaluation.loglikelihood import score_rows, windows
from qlora_jax.evaluation.shared_prefixes import pack_rows
from qlora_jax.inference.result_cache import ResultCache
from qlora_jax.nn.rope import RopeScaling
from tests.evaluation.reference import expected_scores, greedy_row, options
from tests.inference.tiny import VOCAB, tiny_config, tiny_parts


@pytest.fixture(scope="module")
def parts():
    return tiny_parts()


def row(rng: np.random.Generator, length: int, share: float = 0.5):
    scored = rng.random(length) < share
    scored[-1] = True
    return rng.integers(0, VOCAB, length).astype(np.int32), scored


def changed(ids: np.ndarray, at: int) -> np.ndarray:
    other = ids.copy()
    other[at] = (ids[at] + 1) % VOCAB
    return other


def test_rows_of_many_lengths(parts):
    rng = np.random.default_rng(0)
    rows = [row(rng, length) for length in (2, 33, 20, 600, 7, 350, 64, 2)]
    scores = score_rows(parts, rows)
    for index, (ids, scored) in enumerate(rows):
        nll, hits = expected_scores(parts, ids, scored)
        assert scores.nll[index] == pytest.approx(nll, rel=1e-5)
        assert scores.tokens[index] == len(hits)
        assert (scores.exact[index], scores.begins[index]) == (all(hits), all(hits[:-1]))
    assert scores.mean_nll == pytest.approx(scores.nll.sum() / scores.tokens.sum())


def test_exact_and_begins(parts):
    prompt = np.random.default_rng(1).integers(0, VOCAB, 9).astype(np.int32)
    ids, scored = greedy_row(parts, prompt, 4)
    rows = [(ids, scored), (changed(ids, -1), scored), (changed(ids, -2), scored), (changed(ids, 9), scored)]
    scores = score_rows(parts, rows)
    assert scores.exact.tolist() == [True, False, False, False]
    assert scores.begins.tolist() == [True, True, False, False]


def test_a_score_does_not_depend_on_its_batch(parts):
    rng = np.random.default_rng(2)
    rows = [row(rng, length) for length in (40, 35, 48, 44)]
    together, done = score_rows(parts, rows), []
    alone = [score_rows(parts, [one], done.append).nll[0] for one in rows]
    np.testing.assert_allclose(together.nll, alone, rtol=1e-6)
    assert done == [1] * 4


def test_equal_rows_are_computed_once(parts, tmp_path):
    """Rounding may depend on the place in a batch, but copies of a text must not differ."""
    rng, cache, done = np.random.default_rng(7), ResultCache(tmp_path), []
    rows = [row(rng, length) for length in (40, 35, 90)]
    once = score_rows(parts, rows, cache=cache)
    order, misses = [0, 1, 0, 2, 2], cache.misses
    copies = score_rows(parts, [rows[index] for index in order], done.append, cache)
    for field in dataclasses.fields(copies):
        np.testing.assert_array_equal(getattr(copies, field.name), getattr(once, field.name)[order])
    assert cache.misses == misses and done[-1] == 5
    other_mask = [(ids, np.arange(len(ids)) > 5) for ids, _ in rows[:1]]
    assert score_rows(parts, [*rows[:1], *other_mask]).tokens.tolist() == [once.tokens[0], len(rows[0][0]) - 6]


def test_one_compilation_for_each_shape(parts):
    rng = np.random.default_rng(3)
    rows = [row(rng, length) for length in (30, *rng.integers(65, 129, 100), 500, 500)]
    shapes = {(batch.size, batch.length) for batch in batches_by_length([len(ids) - 1 for ids, _ in rows])}
    loglikelihood.score_tokens.plain.clear_cache()
    for _ in range(2):
        score_rows(parts, rows)
    assert loglikelihood.score_tokens.plain._cache_size() == len(shapes) == 2


def test_rows_that_share_a_prompt_have_the_scores_that_each_has_alone(parts):
    rng = np.random.default_rng(8)
    prompts = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (30, 90, 9)]
    rows = [*options(rng, prompts[0], (1, 3, 20)), *options(rng, prompts[1], (1, 1, 1)), row(rng, 40)]
    rows += [*options(rng, prompts[2], (30, 4)), *options(rng, prompts[0], (6,))]
    packed = pack_rows(rows, share=True)
    assert [None if one.branches is None else one.branches.max() for one in packed] == [4, 0, None, None, None]
    assert [len(one.ids) for one in packed] == [30 + 19 + 2 + 5, 90, 39, 38, 12]
    scores = score_rows(parts, rows)
    for index, (ids, scored) in enumerate(rows):
        nll, hits = expected_scores(parts, ids, scored)
        assert scores.nll[index] == pytest.approx(nll, rel=1e-5), index
        assert (scores.tokens[index], scores.exact[index]) == (len(hits), all(hits))


def test_where_rotations_depend_on_the_length_prompts_are_not_shared():
    plain = tiny_config()
    scaling = RopeScaling(kind="dynamic", numbers=(("factor", 2.0),))
    turned = dataclasses.replace(plain, rope=dataclasses.replace(plain.rope, scaling=scaling))
    assert turned.rotations_depend_on_length and not plain.rotations_depend_on_length


def test_windows_do_not_overlap_and_leave_nothing_out():
    rows = windows(range(11), 4)
    assert [ids.tolist() for ids, _ in rows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert all(scored.all() for _, scored in rows)
    assert len(windows(range(11), 4, count=2)) == 2
    assert len(windows(range(9), 4)) == 2  # a ninth id alone has nothing before it
    with pytest.raises(ValueError, match="at least 2"):
        windows([3], 4)


@pytest.mark.parametrize("outside", [VOCAB, -1])
def test_ids_without_a_row_are_errors(parts, outside: int):
    rows = [(np.array([1, token], np.int32), np.ones(2, bool)) for token in (VOCAB - 1, outside)]
    with pytest.raises(
        ValueError, match=rf"row 1: an id has no row in the embedding .found ids .*expected 0 to {VOCAB - 1}"
    ):
        score_rows(parts, rows)


def test_rows_that_cannot_be_scored_are_reported_together(parts):
    score_rows(parts, [(np.zeros(601, np.int32), np.ones(601, bool))])  # the last one is only predicted
    rows = [(np.zeros(602, np.int32), np.ones(602, bool)), (np.zeros(3, np.int32), np.array([True, False, False]))]
    with pytest.raises(ValueError, match=r"row 0: too long .found 602 tokens(?s:.*)row 1: no token to score"):
        score_rows(parts, rows)


@given(length=st.integers(2, 60), size=st.integers(2, 20), data=st.data())
def test_windows_score_each_id_once_with_enough_before_it(length, size, data):
    stride = data.draw(st.integers(1, size))
    rows = windows(range(length), size, stride)
    scored = [int(ids[at]) for ids, mask in rows for at in np.flatnonzero(mask[1:]) + 1]
    overlap = stride < size
    assert scored == ([*range(1, length)] if overlap else [n for n in range(1, length) if n % size])
    for ids, mask in rows:
        at = np.flatnonzero(mask[1:]) + 1
        assert len(ids) <= size and np.array_equal(np.diff(ids), np.ones(len(ids) - 1))
        assert ids[0] == 0 or not overlap or (at >= size - stride).all()
    assert all(mask[1:].any() for _, mask in rows)


def test_strided_perplexity_is_that_of_the_plain_definition(parts):
    ids = np.random.default_rng(2).integers(0, VOCAB, 50).tolist()
    scores = score_rows(parts, windows(ids, 16, 5))
    nll = 0.0
    for at in range(1, 50):
        start = 0 if at < 16 else 5 * (-(-(at - 15) // 5))  # start of the first window that holds it
        window = np.array(ids[start : start + 16], np.int32)
        nll += expected_scores(parts, window, np.arange(len(window)) == at - start)[0]
    assert scores.tokens.sum() == 49 and scores.nll.sum() == pytest.approx(nll, rel=1e-5)
