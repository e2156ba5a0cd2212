"""Intervals over seeds and rows: special cases with a known answer, and coverage in simulations."""

import numpy as np
import pytest
from scipy import stats

from qlora_jax.measures.statistics import t_interval
from qlora_jax.studies.statistics import crossed_mean, ratio_scores
from tests.marks import EXHAUSTIVE


def drawn(rng, seeds, rows, seed_sd, row_sd, rest_sd):
    """Returns scores [seeds, rows] around a mean of 0."""
    return (
        seed_sd * rng.normal(size=(seeds, 1))
        + row_sd * rng.normal(size=(1, rows))
        + rest_sd * rng.normal(size=(seeds, rows))
    )


def test_without_differences_between_rows_it_is_students_interval_over_seeds():
    means = np.random.default_rng(0).normal(size=4)
    found = crossed_mean(np.repeat(means[:, None], 50, axis=1))
    assert found.interval == pytest.approx(t_interval(means.tolist()), rel=1e-9)
    assert found.p == pytest.approx(stats.ttest_1samp(means, 0).pvalue, rel=1e-9)


def test_without_differences_between_seeds_it_is_students_interval_over_rows():
    rows = np.random.default_rng(0).normal(size=30)
    for seeds in (1, 3):
        found = crossed_mean(np.repeat(rows[None], seeds, axis=0))
        assert found.interval == pytest.approx(t_interval(rows.tolist()), rel=1e-9)
        assert found.p == pytest.approx(stats.ttest_1samp(rows, 0).pvalue, rel=1e-9)


@pytest.mark.parametrize("margin", [0.05, 0.5, 1.0])
def test_equality_is_tested_as_two_one_sided_t_tests(margin):
    rows = np.random.default_rng(0).normal(0.1, 1.0, size=30)
    below = stats.ttest_1samp(rows, -margin, alternative="greater").pvalue
    above = stats.ttest_1samp(rows, margin, alternative="less").pvalue
    for sign in (1, -1):
        found = crossed_mean(sign * np.repeat(rows[None], 3, axis=0))
        assert found.p_at_least(margin) == pytest.approx(max(below, above), rel=1e-9)


def test_equal_scores_have_no_error():
    same = crossed_mean(np.zeros((3, 5)))
    assert same.interval == (0.0, 0.0) and same.p == 1.0 and same.p_at_least(0.1) == 0.0
    one = crossed_mean(np.ones((3, 5)))
    assert one.p == 0.0 and (one.p_at_least(1.0), one.p_at_least(1.1)) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        (np.ones((3, 1)), "found 1 of 1"),
        (np.ones((1, 1)), "found 1 of 1"),
        (np.array([[1.0, 2.0, 3.0], [1.0, np.nan, 3.0]]), "found 2 of 3"),
        (np.array([[1.0, np.inf]]), "found 1 of 2"),
    ],
)
def test_scores_without_an_interval_are_refused(scores, found):
    with pytest.raises(
        ValueError, match=rf"evaluate: intervals need rows with finite scores \({found}, expected all of 2 or more"
    ):
        crossed_mean(scores)


def test_the_mean_of_ratio_scores_is_the_ratio_of_each_seed():
    rng = np.random.default_rng(0)
    values, weights = rng.uniform(size=(3, 20)), rng.integers(1, 9, 20).astype(float)
    scores = ratio_scores(values, weights)
    np.testing.assert_allclose(scores.mean(axis=1), values.sum(axis=1) / weights.sum(), rtol=1e-12)
    np.testing.assert_allclose(ratio_scores(values, np.ones(20)), values, rtol=1e-12)


def test_the_error_of_a_ratio_is_that_of_the_delta_method():
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 9, 4000).astype(float)
    values = weights * (2 + 0.3 * rng.normal(size=4000))
    draws = rng.integers(0, 4000, size=(2000, 4000))
    bootstrap = (values[draws].sum(axis=1) / weights[draws].sum(axis=1)).std()
    assert crossed_mean(ratio_scores(values[None], weights)).error == pytest.approx(bootstrap, rel=0.06)


CASES = [  # seeds, rows, standard deviations of seeds, rows and residual
    (3, 150, 0.05, 1.0, 1.0),
    (3, 150, 0.0, 0.0, 1.0),
    (3, 40, 0.3, 0.2, 1.0),
    (5, 400, 0.02, 0.3, 0.5),
    (10, 25, 0.1, 1.0, 0.3),
    (3, 150, 1.0, 0.1, 0.1),
]


def coverage(case, trials):
    """Returns the share of intervals that contain the mean of 0."""
    rng = np.random.default_rng(0)
    intervals = (crossed_mean(drawn(rng, *case)).interval for _ in range(trials))
    return np.mean([low <= 0 <= high for low, high in intervals])


@pytest.mark.parametrize("case", CASES[:2])
def test_intervals_contain_the_truth(case):
    assert 0.93 <= coverage(case, 1000) <= 0.99


@pytest.mark.parametrize("case", [pytest.param(case, marks=EXHAUSTIVE) for case in CASES])
def test_intervals_contain_the_truth_in_ten_thousand_trials(case):
    assert 0.935 <= coverage(case, 10_000) <= 0.99
