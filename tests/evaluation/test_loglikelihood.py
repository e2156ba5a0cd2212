"""Likelihoods in padded batches equal those of each row alone, summed in float64."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.evaluation import loglikelihood
from qlora_jax.evaluation.batches import BATCH_TOKENS, SHAPE_COST, batches_by_length, padded_length
from qlora_jax.evaluation.loglikelihood import answer_scores, windows
from qlora_jax.evaluation.shared_prefixes import packed_rows
from qlora_jax.evaluation.tasks.choices import Choice, choice_scores
from qlora_jax.nn.rope import RopeScaling
from tests.inference.tiny import VOCAB, full_logits, tiny_config, tiny_parts


@pytest.fixture(scope="module")
def parts():
    return tiny_parts()


def row(rng: np.random.Generator, length: int, share: float = 0.5):
    scored = rng.random(length) < share
    scored[-1] = True
    return rng.integers(0, VOCAB, length).astype(np.int32), scored


def expected_scores(parts, ids: np.ndarray, scored: np.ndarray) -> tuple[float, list[bool]]:
    """(sum of -log p, whether each scored token is the likeliest) by the plain definition, in float64."""
    logits = np.asarray(full_logits(parts, ids.tolist()), np.float64)
    places = [at for at in range(1, len(ids)) if scored[at]]
    nll = sum(np.log(np.exp(logits[at - 1]).sum()) - logits[at - 1, ids[at]] for at in places)
    return nll, [logits[at - 1].argmax() == ids[at] for at in places]


def greedy_row(parts, prompt: np.ndarray, count: int):
    """A row whose `count` scored tokens are what greedy decoding writes after the prompt."""
    ids = prompt.tolist()
    for _ in range(count):
        ids.append(int(full_logits(parts, ids)[-1].argmax()))
    return np.array(ids, np.int32), np.arange(len(ids)) >= len(prompt)


def changed(ids: np.ndarray, at: int) -> np.ndarray:
    other = ids.copy()
    other[at] = (ids[at] + 1) % VOCAB
    return other


def test_rows_of_many_lengths(parts):
    rng = np.random.default_rng(0)
    rows = [row(rng, length) for length in (2, 33, 20, 600, 7, 350, 64, 2)]
    scores = answer_scores(parts, rows)
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
    scores = answer_scores(parts, rows)
    assert scores.exact.tolist() == [True, False, False, False]
    assert scores.begins.tolist() == [True, True, False, False]


def test_a_score_does_not_depend_on_its_batch(parts):
    rng = np.random.default_rng(2)
    rows = [row(rng, length) for length in (40, 35, 48, 44)]
    together, done = answer_scores(parts, rows), []
    alone = [answer_scores(parts, [one], done.append).nll[0] for one in rows]
    np.testing.assert_allclose(together.nll, alone, rtol=1e-6)
    assert done == [1] * 4


def test_one_compilation_for_each_shape(parts):
    rng = np.random.default_rng(3)
    rows = [row(rng, length) for length in (30, *rng.integers(65, 129, 100), 500, 500)]
    shapes = {(batch.size, batch.length) for batch in batches_by_length([len(ids) - 1 for ids, _ in rows])}
    loglikelihood.score_tokens.clear_cache()
    for _ in range(2):
        answer_scores(parts, rows)
    assert loglikelihood.score_tokens._cache_size() == len(shapes) == 2


def test_padded_lengths():
    assert [padded_length(n) for n in (1, 16, 17, 255, 257, 511, 513)] == [16, 16, 32, 256, 288, 512, 576]


@pytest.mark.parametrize(("rows", "size", "batches"), [(15, 5, 3), (8, 8, 1), (17, 6, 3), (9, 3, 3)])
def test_few_rows_of_a_batch_are_empty(rows, size, batches):
    made = batches_by_length([512] * rows)
    assert {(batch.size, batch.length) for batch in made} == {(size, 512)} and len(made) == batches


@given(lengths=st.lists(st.integers(1, 600), min_size=1, max_size=40))
def test_batches_hold_each_row_once_and_are_no_longer_than_one_shape_would_be(lengths):
    batches = batches_by_length(lengths)
    assert sorted(index for batch in batches for index in batch.rows) == [*range(len(lengths))]
    for batch in batches:
        assert len(batch.rows) <= batch.size and batch.size * batch.length <= max(BATCH_TOKENS, batch.length)
        assert max(lengths[index] for index in batch.rows) <= batch.length
    assert len({batch.length for batch in batches}) == len({(batch.size, batch.length) for batch in batches})
    longest, at_once = padded_length(max(lengths)), BATCH_TOKENS // padded_length(max(lengths))
    spent = sum(batch.size * batch.length for batch in batches) + SHAPE_COST * len({b.length for b in batches})
    assert spent <= SHAPE_COST + longest * (len(lengths) + -(-len(lengths) // at_once))


def options(rng: np.random.Generator, prompt: np.ndarray, lengths):
    """Rows that go on from a prompt; now and then a token of theirs is not scored."""
    more = [np.concatenate([prompt, rng.integers(0, VOCAB, n).astype(np.int32)]) for n in lengths]
    rows = [(ids, np.arange(len(ids)) >= len(prompt)) for ids in more]
    for ids, scored in rows:
        scored[len(prompt) + 1 : -1] = rng.random(max(0, len(ids) - len(prompt) - 2)) < 0.7
    return rows


def test_rows_that_share_a_prompt_have_the_scores_that_each_has_alone(parts):
    rng = np.random.default_rng(8)
    prompts = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (30, 90, 9)]
    rows = [*options(rng, prompts[0], (1, 3, 20)), *options(rng, prompts[1], (1, 1, 1)), row(rng, 40)]
    rows += [*options(rng, prompts[2], (30, 4)), *options(rng, prompts[0], (6,))]
    packed = packed_rows(rows, share=True)
    assert [None if one.branches is None else one.branches.max() for one in packed] == [4, 0, None, None, None]
    assert [len(one.ids) for one in packed] == [30 + 19 + 2 + 5, 90, 39, 38, 12]
    scores = answer_scores(parts, rows)
    for index, (ids, scored) in enumerate(rows):
        nll, hits = expected_scores(parts, ids, scored)
        assert scores.nll[index] == pytest.approx(nll, rel=1e-5), index
        assert (scores.tokens[index], scores.exact[index]) == (len(hits), all(hits))


def test_many_continuations_are_several_rows():
    rng = np.random.default_rng(9)
    rows = options(rng, rng.integers(0, VOCAB, 100).astype(np.int32), [60] * 20)
    packed = packed_rows(rows, share=True)
    assert [len(one.ids) for one in packed] == [100 + 59 * 8, 100 + 59 * 9, 100 + 59 * 3]
    assert sorted({int(index) for one in packed for index in one.row}) == [*range(20)]
    assert len(packed_rows(rows, share=False)) == 20


def test_where_windows_or_lengths_have_a_say_prompts_are_not_shared():
    plain = tiny_config()
    scaling = RopeScaling(kind="dynamic", numbers=(("factor", 2.0),))
    turned = dataclasses.replace(plain, rope=dataclasses.replace(plain.rope, scaling=scaling))
    assert plain.supports_shared_prefix and not turned.supports_shared_prefix
    assert not dataclasses.replace(plain, windows=(None, 8)).supports_shared_prefix


def test_windows_do_not_overlap_and_leave_nothing_out():
    rows = windows(range(11), 4)
    assert [ids.tolist() for ids, _ in rows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert all(scored.all() for _, scored in rows)
    assert len(windows(range(11), 4, count=2)) == 2
    assert len(windows(range(9), 4)) == 2  # a ninth id alone has nothing before it
    with pytest.raises(ValueError, match="at least 2"):
        windows([3], 4)


def test_rows_that_can_not_be_scored_are_told_all_at_once(parts):
    answer_scores(parts, [(np.zeros(601, np.int32), np.ones(601, bool))])  # the last one is only predicted
    rows = [(np.zeros(602, np.int32), np.ones(602, bool)), (np.zeros(3, np.int32), np.array([True, False, False]))]
    with pytest.raises(ValueError, match=r"row 0: 602 tokens(?s:.*)row 1: no token to score"):
        answer_scores(parts, rows)


def test_choices_by_sum_and_by_mean(parts):
    rng = np.random.default_rng(6)
    prompt = rng.integers(0, VOCAB, 6).astype(np.int32)
    options = [
        (np.concatenate([prompt, rng.integers(0, VOCAB, n).astype(np.int32)]), np.arange(6 + n) >= 6) for n in (1, 3, 9)
    ]
    nll = np.array([expected_scores(parts, *option)[0] for option in options])
    by_sum, by_mean = int(nll.argmin()), int((nll / (1, 3, 9)).argmin())
    scores = choice_scores(parts, [Choice(options=options, answer=answer) for answer in range(3)])
    assert scores.by_sum.tolist() == [answer == by_sum for answer in range(3)]
    assert scores.by_mean.tolist() == [answer == by_mean for answer in range(3)]
    assert by_sum != by_mean and not scores.tied_by_sum.any()


def test_a_tie_is_not_right_and_is_told(parts):
    likely, unlikely = (
        greedy_row(parts, np.array([5, 6], np.int32), 2),
        (np.array([5, 6, 7, 8], np.int32), np.arange(4) >= 2),
    )
    choices = [
        Choice(options=[likely, likely, unlikely], answer=0),
        Choice(options=[likely, unlikely, unlikely], answer=2),
    ]
    scores = choice_scores(parts, choices)
    assert scores.by_sum.tolist() == [False, False]
    assert scores.tied_by_sum.tolist() == [True, False]


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
    scores = answer_scores(parts, windows(ids, 16, 5))
    nll = 0.0
    for at in range(1, 50):
        start = 0 if at < 16 else 5 * (-(-(at - 15) // 5))  # of the first window that holds it
        window = np.array(ids[start : start + 16], np.int32)
        nll += expected_scores(parts, window, np.arange(len(window)) == at - start)[0]
    assert scores.tokens.sum() == 49 and scores.nll.sum() == pytest.approx(nll, rel=1e-5)
