"""Metrics of sequence heads against scipy and scikit-learn, on the rows and on a bootstrap sample of them."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from qlora_jax.evaluation.heads.metrics import (
    _correlation,
    _ranks,
    class_details,
    class_metrics,
    multi_label_metrics,
    number_metrics,
)
from qlora_jax.measures.statistics import resample_counts

RNG = np.random.default_rng(0)
ROWS = 60
LOGITS = RNG.normal(0, 2, (ROWS, 3))
ANSWERS = RNG.integers(0, 3, ROWS)


def by_name(metrics):
    return {metric.name.partition(" (")[0]: metric for metric in metrics}


def test_class_metrics_equal_those_of_scikit_learn():
    found, predicted = by_name(class_metrics(LOGITS, ANSWERS, ("a", "b", "c"))), LOGITS.argmax(1)
    assert found["right label"].value == pytest.approx(sklearn.metrics.accuracy_score(ANSWERS, predicted))
    assert found["F1"].value == pytest.approx(sklearn.metrics.f1_score(ANSWERS, predicted, average="macro"))
    assert found["Matthews correlation"].value == pytest.approx(sklearn.metrics.matthews_corrcoef(ANSWERS, predicted))
    for metric in found.values():
        assert metric.interval is not None and metric.interval[0] <= metric.value <= metric.interval[1] + 0.1


def test_details_have_all_rows():
    details = class_details(LOGITS, ANSWERS, ("a", "b", "c"))
    expected = sklearn.metrics.confusion_matrix(ANSWERS, LOGITS.argmax(1), labels=range(3)).tolist()
    assert details["confusion"] == expected
    reliability = details["reliability"]
    assert isinstance(reliability, list) and sum(each["rows"] for each in reliability) == ROWS


def test_multi_label_metrics_equal_those_of_scikit_learn():
    applies = RNG.random((ROWS, 3)) < 0.4
    found, predicted = by_name(multi_label_metrics(LOGITS, applies)), LOGITS > 0
    assert found["right label"].value == pytest.approx(sklearn.metrics.accuracy_score(applies, predicted))
    assert found["F1"].value == pytest.approx(sklearn.metrics.f1_score(applies, predicted, average="micro"))
    assert found["F1 by label"].value == pytest.approx(sklearn.metrics.f1_score(applies, predicted, average="macro"))


def test_correlations_equal_those_of_scipy_also_in_bootstrap_samples():
    x, y = RNG.integers(0, 9, ROWS).astype(np.float64), RNG.normal(0, 1, ROWS)
    found = by_name(number_metrics(x, y))
    assert found["Spearman correlation"].value == pytest.approx(scipy.stats.spearmanr(x, y)[0])
    assert found["Pearson correlation"].value == pytest.approx(scipy.stats.pearsonr(x, y)[0])
    assert found["mean squared error"].value == pytest.approx(np.mean((x - y) ** 2))
    draws = next(iter(resample_counts(ROWS)))[:3].astype(np.float64)
    ours = _correlation(draws, _ranks(draws, x), _ranks(draws, y))
    for sample, value in zip(draws.astype(int), ours, strict=True):
        rows = np.repeat(np.arange(ROWS), sample)
        assert value == pytest.approx(scipy.stats.spearmanr(x[rows], y[rows])[0])
