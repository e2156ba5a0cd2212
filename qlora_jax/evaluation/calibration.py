"""Calibration of classes: the expected calibration error and the reliability diagram.

Dimension key: R rows, C classes, B bins of confidence.
"""

import numpy as np
from jaxtyping import Float64, Int64

from qlora_jax.evaluation.bootstrapped import Statistic

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
