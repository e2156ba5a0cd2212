"""Metrics of the outputs of sequence heads, with 95 % intervals: rows are resampled 10,000 times, seed 0.

The functions serve `evaluate` and the held-out metrics of training.

Dimension key: R rows, C classes or labels, U distinct values, S bootstrap samples.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64

from qlora_jax.measures.classification import calibration_error, class_interval, count_pairs, f1, matthews, reliability
from qlora_jax.measures.metrics import Draws, Metric, bootstrapped, share
from qlora_jax.measures.statistics import bootstrap

RIGHT = "right label"  # for rows with several labels: all of them are right


def class_metrics(
    logits_RC: Float64[np.ndarray, "R C"], answers_R: Int64[np.ndarray, " R"], labels: Sequence[str]
) -> list[Metric]:
    """Returns accuracy, F1, Matthews correlation and the expected calibration error of classes."""
    counts = count_pairs(answers_R, logits_RC.argmax(axis=1), len(labels))
    of = repr(labels[-1]) if len(labels) == 2 else f"mean over {len(labels)} labels"
    return [
        share(RIGHT, logits_RC.argmax(axis=1) == answers_R),
        Metric(f"F1 ({of})", "share", float(f1(counts)), class_interval(f1, counts)),
        Metric("Matthews correlation", "number", float(matthews(counts)), class_interval(matthews, counts)),
        bootstrapped("calibration error (ECE)", calibration_error(logits_RC, answers_R), len(answers_R)),
    ]


def class_details(
    logits_RC: Float64[np.ndarray, "R C"], answers_R: Int64[np.ndarray, " R"], labels: Sequence[str]
) -> dict[str, object]:
    """Returns the confusion matrix and the reliability diagram as plain lists."""
    predicted_R = logits_RC.argmax(axis=1)
    confusion = count_pairs(answers_R, predicted_R, len(labels))[:, :-1].tolist()
    return {"labels": [*labels], "confusion": confusion, "reliability": reliability(logits_RC, answers_R)}


def multi_label_metrics(logits_RC: Float64[np.ndarray, "R C"], applies_RC: Bool[np.ndarray, "R C"]) -> list[Metric]:
    """Returns the share of rows with all labels right, and F1 over all decisions and as a mean over labels."""
    predicted_RC = logits_RC > 0
    both_RC, sums_RC = predicted_RC & applies_RC, predicted_RC.astype(np.float64) + applies_RC
    hits_RC = 2.0 * both_RC

    def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
        return np.divide(above, below, out=np.zeros_like(above), where=below != 0)

    def micro(draws: Draws) -> np.ndarray:
        return ratio((draws @ hits_RC).sum(axis=1), (draws @ sums_RC).sum(axis=1))

    def macro(draws: Draws) -> np.ndarray:
        return ratio(draws @ hits_RC, draws @ sums_RC).mean(axis=1)

    return [
        share(RIGHT, (predicted_RC == applies_RC).all(axis=1)),
        bootstrapped("F1 (all decisions)", micro, len(logits_RC), "share"),
        bootstrapped(f"F1 by label (mean over {logits_RC.shape[1]} labels)", macro, len(logits_RC), "share"),
    ]


def number_metrics(predicted_R: Float64[np.ndarray, " R"], answers_R: Float64[np.ndarray, " R"]) -> list[Metric]:
    """Returns Spearman's and Pearson's correlation, and the mean squared error."""
    errors_R = (predicted_R - answers_R) ** 2
    return [
        spearman_metric(predicted_R, answers_R),
        bootstrapped("Pearson correlation", lambda draws: _correlation(draws, predicted_R, answers_R), len(errors_R)),
        Metric("mean squared error", "number", float(errors_R.mean()), bootstrap(errors_R, np.ones(len(errors_R)))),
    ]


def spearman_metric(x_R: Float64[np.ndarray, " R"], y_R: Float64[np.ndarray, " R"]) -> Metric:
    """Returns Spearman's rank correlation; ranks are taken anew in each sample, and ties share the mean rank."""

    def statistic(draws: Draws) -> np.ndarray:
        return _correlation(draws, _ranks(draws, x_R), _ranks(draws, y_R))

    return bootstrapped("Spearman correlation", statistic, len(x_R))


def _ranks(draws: Draws, values_R: Float64[np.ndarray, " R"]) -> Float64[np.ndarray, "S R"]:
    """Returns the mean rank of each row's value in each sample."""
    _, inverse_R = np.unique(values_R, return_inverse=True)
    order = np.argsort(inverse_R, kind="stable")
    starts = np.flatnonzero(np.diff(inverse_R[order], prepend=-1))
    counts_SU = np.add.reduceat(draws[:, order], starts, axis=1)
    ranks_SU = np.cumsum(counts_SU, axis=1) - (counts_SU - 1) / 2
    return ranks_SU[:, inverse_R]


def _correlation(draws: Draws, x: Float64[np.ndarray, "*S R"], y: Float64[np.ndarray, "*S R"]) -> np.ndarray:
    """Returns the correlation of x and y in each sample; 0 if one of them is constant."""
    weights = draws / draws.sum(axis=1, keepdims=True)
    x, y = (v - (weights * v).sum(axis=1, keepdims=True) for v in (x, y))
    covariance, *variances = ((weights * product).sum(axis=1) for product in (x * y, x * x, y * y))
    scale = np.sqrt(variances[0] * variances[1])
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)
