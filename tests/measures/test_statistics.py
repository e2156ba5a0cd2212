"""Intervals and tests against their definitions, and against figures from textbooks."""

import itertools

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from qlora_jax.evaluation.tasks.programs import pass_at_k
from qlora_jax.measures.statistics import (
    Z_95,
    bootstrap,
    mcnemar,
    mean_change_interval,
    mean_interval,
    paired_bootstrap,
    paired_bootstrap_of,
    resample_counts,
    wilson_interval,
)
from scripts.interval_coverage import coverage, simulated
from tests.marks import some_in_ci


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (130, 400), (1, 2850)])
def test_wilson_bounds_are_where_the_share_is_just_plausible(successes, trials):
    for p in wilson_interval(successes, trials):
        distance = successes / trials - p
        assert distance**2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / trials, abs=1e-12)


def test_wilson_published():
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, method 3.
    for (successes, trials), bounds in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
    }.items():
        assert wilson_interval(successes, trials) == pytest.approx(bounds, abs=5e-5)


@pytest.mark.parametrize(("a", "b"), [(0, 10), (3, 10), (10, 10), (130, 400), (1, 2850)])
def test_intervals_and_tests_equal_those_of_scipy(a, b):
    interval = stats.binomtest(a, b).proportion_ci(method="wilson")
    assert wilson_interval(a, b) == pytest.approx((interval.low, interval.high), rel=1e-12, abs=1e-15)
    only_a, only_b = np.arange(b) < a, np.arange(b) >= a
    assert mcnemar(only_a, only_b) == pytest.approx(stats.binomtest(a, b).pvalue, rel=1e-12)


@pytest.mark.parametrize(("right", "rows"), [(0, 10), (3, 10), (10, 10), (130, 400), (1, 2850)])
def test_an_interval_of_zeros_and_ones_is_that_of_statsmodels(right, rows):
    expected = proportion_confint(right, rows, method="agresti_coull")
    assert mean_interval((np.arange(rows) < right).astype(float)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("better", "worse", "rows"), [(0, 0, 20), (3, 1, 10), (10, 0, 10), (16, 59, 794)])
def test_an_interval_of_changed_shares_is_that_of_agresti_and_min(better, worse, rows):
    b, c, n = better + 0.5, worse + 0.5, rows + 2
    half = Z_95 * np.sqrt(b + c - (b - c) ** 2 / n) / n
    expected = max(-1, (b - c) / n - half), min(1, (b - c) / n + half)
    places = np.arange(rows)
    changes = (places < better).astype(float) - (places >= rows - worse)
    assert mean_change_interval(changes) == pytest.approx(expected, rel=1e-9)


CHANCES = [(2, 0.1), (0.02, 0.98), (0.05, 1), (1, 1), (50, 50), (5, 95), (0.2, 0.2)]
STUDIES = itertools.product([10, 24, 164], [(20, 10), (3, 1), (20, 1)], CHANCES)


@pytest.mark.parametrize(("rows", "replies", "chances"), some_in_ci([*STUDIES], lambda index: index < 2))
def test_intervals_of_pass_at_k_cover_the_truth(rows, replies, chances):
    """Problems whose chances to be solved are drawn from a beta distribution; a bootstrap covers 7 to 96 %."""
    rng, studies, (samples, k) = np.random.default_rng(0), 1000, replies
    drawn, others = rng.beta(*chances, (2, 164_000)) * np.array([[1], [0.8]])
    at_k = np.array([pass_at_k(samples, passed, k) for passed in range(samples + 1)])
    p, q = (every[: studies * rows].reshape(studies, rows) for every in (drawn, others))
    values, after = at_k[rng.binomial(samples, p)], at_k[rng.binomial(samples, q)]
    truth, changed = (float((1 - (1 - every) ** k).mean()) for every in (drawn, others))
    for intervals, wanted in (
        ([mean_interval(each) for each in values], truth),
        ([mean_change_interval(each) for each in after - values], changed - truth),
    ):
        low, high = np.array(intervals).T
        assert np.mean((low <= wanted) & (wanted <= high)) > 0.93


def rows_of(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Each row's -log p and number of tokens."""
    rng = np.random.default_rng(count)
    tokens = rng.integers(5, 50, count)
    return tokens * rng.lognormal(0.0, 0.8, count), tokens


def test_intervals_are_those_of_t_in_every_sample():
    nll, tokens = rows_of(20)

    def with_error(draws):
        loss = (draws @ nll) / (draws @ tokens)
        squares = [count @ (nll - mean * tokens) ** 2 for count, mean in zip(draws, loss, strict=True)]
        return loss, np.sqrt(squares) / (draws @ tokens)

    (loss,), (error,) = with_error(np.ones((1, 20)))
    losses, errors = with_error(np.concatenate([*resample_counts(20)]))
    low, high = np.quantile((losses - loss) / errors, (0.025, 0.975))
    assert bootstrap(nll, tokens) == pytest.approx((loss - high * error, loss - low * error), rel=1e-3)
    perplexities = paired_bootstrap_of(
        np.stack([0 * nll, tokens], axis=1), np.stack([nll, tokens], axis=1), lambda mean: np.exp(mean)
    )
    t = (np.exp(losses) - np.exp(loss)) / (np.exp(losses) * errors)
    low, high = np.quantile(t, (0.025, 0.975))
    expected = np.exp(loss) - 1 - np.array([high, low]) * np.exp(loss) * error
    assert perplexities == pytest.approx(expected, rel=1e-3)


def test_few_rows_and_rows_without_spread_take_students_quantiles():
    few, one_of_forty = np.array([1.0, 2.0, 2.5, 4.0]), (np.arange(40) == 0).astype(float)
    for values in (few, one_of_forty):
        low, high = paired_bootstrap(np.zeros(len(values)), values, np.ones(len(values)))
        assert (low, high) == pytest.approx(stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values)))
    assert bootstrap(one_of_forty, np.ones(40))[0] == 0  # no value is negative
    assert bootstrap(np.full(9, 2.0), np.ones(9)) == (2, 2) and bootstrap(few[:1], np.ones(1)) == (1, 1)


def test_few_rows_with_long_tails_are_covered_better_than_by_percentiles():
    percentiles, _, _, used = coverage(*simulated("medium", 100, 8, np.random.default_rng(2)))
    assert percentiles < 0.87 and used > 0.87


def test_mcnemar_counts_coin_throws():
    a = np.array([True] * 7 + [False] * 2 + [True] * 5 + [False] * 4)
    b = np.array([False] * 7 + [True] * 2 + [True] * 5 + [False] * 4)
    throws = [sum(throw) for throw in itertools.product([0, 1], repeat=9)]
    as_far = sum(heads <= 2 or heads >= 7 for heads in throws)
    assert mcnemar(a, b) == mcnemar(b, a) == as_far / len(throws)
    assert mcnemar(a, a) == 1.0


def test_paired_bootstrap_has_the_width_of_the_normal_approximation():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 15, 400)
    a = rng.normal(2.0, 1.0, 400) * tokens
    difference = rng.normal(0.1, 0.3, 400) * tokens
    low, high = paired_bootstrap(a, a + difference, tokens)
    mean = difference.sum() / tokens.sum()
    error = np.sqrt(((difference - mean * tokens) ** 2).sum()) / tokens.sum()
    assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)
