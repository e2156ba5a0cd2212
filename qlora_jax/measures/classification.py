"""Metrics of classification: from counts of (right class, predicted class), and the calibration of classes.

Dimension key: K or C classes, P = K + 1 predictions, the last of which is "none"; R rows, B bins of confidence; `...`
bootstrap samples.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import ArrayLike

from qlora_jax.measures.metrics import Statistic
from qlora_jax.measures.statistics import SAMPLES

Counts = Int64[np.ndarray, "... K P"]
ClassMetric = Callable[[Counts], Float64[np.ndarray, "..."]]


def count_pairs(
    answers: Int64[np.ndarray, " rows"], predicted: Int64[np.ndarray, " rows"], classes: int
) -> Int64[np.ndarray, "K P"]:
    """Returns the number of rows of each right class and each prediction; `classes` as a prediction is "none"."""
    counts = np.zeros((classes, classes + 1), np.int64)
    np.add.at(counts, (answers, predicted), 1)
    return counts


def f1(counts: Counts) -> Float64[np.ndarray, "..."]:
    """Returns F1 of the last of two classes, or the mean of the F1 of several; 0 for a class that does not occur."""
    true = np.diagonal(counts, axis1=-2, axis2=-1)
    of_class = _ratio(2 * true, counts.sum(-1) + counts.sum(-2)[..., :-1])
    return np.asarray(of_class[..., -1] if counts.shape[-2] == 2 else of_class.mean(-1))


def matthews(counts: Counts) -> Float64[np.ndarray, "..."]:
    """Returns the Matthews correlation, for several classes Gorodkin's R_K (2004); 0 if one side is constant."""
    rows = counts.sum((-2, -1)).astype(np.float64)
    right_K, predicted_P = counts.sum(-1).astype(np.float64), counts.sum(-2).astype(np.float64)
    true = np.trace(counts, axis1=-2, axis2=-1)
    covariance = true * rows - (right_K * predicted_P[..., :-1]).sum(-1)
    variances = (rows**2 - (predicted_P**2).sum(-1)) * (rows**2 - (right_K**2).sum(-1))
    return _ratio(covariance, np.sqrt(variances))


def class_interval(metric: ClassMetric, counts: Int64[np.ndarray, "K P"]) -> tuple[float, float]:
    """95 % interval of a metric; rows are resampled 10,000 times, seed 0, which is a multinomial draw of the counts."""
    return _interval(metric(_resampled(counts)))


def class_change_interval(
    metric: ClassMetric,
    answers: Int64[np.ndarray, " rows"],
    before: Int64[np.ndarray, " rows"],
    after: Int64[np.ndarray, " rows"],
    classes: int,
) -> tuple[float, float]:
    """95 % interval of the change of a metric from the predictions `before` to `after`, by the same draws of rows."""
    triples = np.zeros((classes, classes + 1, classes + 1), np.int64)
    np.add.at(triples, (answers, before, after), 1)
    draws = _resampled(triples)
    return _interval(metric(draws.sum(-2)) - metric(draws.sum(-1)))


def _resampled(counts: Int64[np.ndarray, "*cells"]) -> Int64[np.ndarray, "samples *cells"]:
    rows = int(counts.sum())
    draws = np.random.default_rng(0).multinomial(rows, counts.ravel() / rows, size=SAMPLES)
    return draws.reshape(SAMPLES, *counts.shape)


def _interval(samples: Float64[np.ndarray, " samples"]) -> tuple[float, float]:
    low, high = np.quantile(samples, (0.025, 0.975))
    return float(low), float(high)


def _ratio(numerator: ArrayLike, denominator: ArrayLike) -> Float64[np.ndarray, "..."]:
    """Returns numerator / denominator, and 0 where the denominator is 0."""
    above, below = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(above, below, out=np.zeros(above.shape), where=below != 0)


BINS = 15  # intervals of confidence of equal width, as in Guo et al. 2017


def calibration_error(logits_RC: Float64[np.ndarray, "R C"], answers_R: Int64[np.ndarray, " R"]) -> Statistic:
    """Returns the statistic sum over bins of |rows that are right - sum of confidences| / rows."""
    confidence_R, right_R = confidences(logits_RC), logits_RC.argmax(axis=1) == answers_R
    gaps_RB = np.zeros((len(answers_R), BINS))
    gaps_RB[np.arange(len(answers_R)), _bins(confidence_R)] = right_R - confidence_R
    return lambda draws: np.abs(draws @ gaps_RB).sum(axis=1) / draws.sum(axis=1)


def reliability(logits_RC: Float64[np.ndarray, "R C"], answers_R: Int64[np.ndarray, " R"]) -> list[dict[str, float]]:
    """Returns the bins of the reliability diagram: the number of their rows, their mean confidence and accuracy."""
    confidence_R, right_R = confidences(logits_RC), logits_RC.argmax(axis=1) == answers_R
    bins_R = _bins(confidence_R)
    return [
        {
            "from": index / BINS,
            "to": (index + 1) / BINS,
            "rows": int(there.sum()),
            "confidence": float(confidence_R[there].mean()),
            "accuracy": float(right_R[there].mean()),
        }
        for index in range(BINS)
        if (there := bins_R == index).any()
    ]


def confidences(logits_RC: Float64[np.ndarray, "R C"]) -> Float64[np.ndarray, " R"]:
    """Returns the probability of the likeliest class of each row."""
    return 1 / np.exp(logits_RC - logits_RC.max(axis=1, keepdims=True)).sum(axis=1)


def _bins(confidence_R: Float64[np.ndarray, " R"]) -> Int64[np.ndarray, " R"]:
    """Returns the bin of each confidence; bin b is (b / BINS, (b + 1) / BINS]."""
    return np.clip(np.ceil(confidence_R * BINS).astype(np.int64) - 1, 0, BINS - 1)
