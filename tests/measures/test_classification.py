"""Metrics of classification equal scikit-learn's; their intervals are those of resampled rows."""

import numpy as np
import pytest
from sklearn import metrics

from qlora_jax.measures.classification import class_change_interval, class_interval, count_pairs, f1, matthews


def rows(classes: int, count: int, seed: int, ties: bool = False):
    rng = np.random.default_rng(seed)
    answers = rng.integers(0, classes, count)
    guesses = rng.integers(0, classes + ties, count)
    return answers, np.where(rng.random(count) < 0.6, answers, guesses)


@pytest.mark.parametrize(("classes", "ties"), [(2, False), (2, True), (3, False), (5, True)])
def test_equal_scikit_learn(classes, ties):
    for seed in range(5):
        answers, predicted = rows(classes, 60, seed, ties)
        counts = count_pairs(answers, predicted, classes)
        labels = [classes - 1] if classes == 2 else range(classes)
        expected = metrics.f1_score(answers, predicted, labels=labels, average="macro", zero_division=0)
        assert float(f1(counts)) == pytest.approx(expected, abs=1e-12)
        assert float(matthews(counts)) == pytest.approx(metrics.matthews_corrcoef(answers, predicted), abs=1e-12)


@pytest.mark.parametrize("predicted", [[1, 1, 1, 1], [0, 0, 0, 0], [2, 2, 2, 2]])
def test_constant_predictions_have_no_correlation(predicted):
    answers = np.array([0, 1, 1, 0])
    counts = count_pairs(answers, np.array(predicted), 2)
    assert float(matthews(counts)) == metrics.matthews_corrcoef(answers, predicted) == 0
    expected = metrics.f1_score(answers, predicted, labels=[1], average="macro", zero_division=0)
    assert float(f1(counts)) == pytest.approx(expected)


def test_intervals_are_those_of_resampled_rows():
    (answers, before), (_, after) = rows(3, 80, 0), rows(3, 80, 0, ties=True)
    rng = np.random.default_rng(1)
    samples = [rng.integers(0, 80, 80) for _ in range(1000)]

    def values(metric, predicted):
        return np.array([float(metric(count_pairs(answers[rows], predicted[rows], 3))) for rows in samples])

    for metric in (f1, matthews):
        old, new = values(metric, before), values(metric, after)
        expected = np.quantile(old, (0.025, 0.975)), np.quantile(new - old, (0.025, 0.975))
        assert class_interval(metric, count_pairs(answers, before, 3)) == pytest.approx(expected[0], abs=0.03)
        found = class_change_interval(metric, answers, before, after, 3)
        assert found == pytest.approx(expected[1], abs=0.03)
    assert class_change_interval(f1, answers, before, before, 3) == (0, 0)
