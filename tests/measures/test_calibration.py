"""The calibration error against a sum over bins, and the reliability diagram."""

import itertools

import numpy as np
import pytest
import scipy.special

from qlora_jax.measures.classification import calibration_error, confidences, reliability

RNG = np.random.default_rng(0)
ROWS = 60
LOGITS = RNG.normal(0, 2, (ROWS, 3))
ANSWERS = RNG.integers(0, 3, ROWS)


def test_the_calibration_error_is_the_mean_gap_over_bins():
    probabilities = scipy.special.softmax(LOGITS, axis=1)
    confidence, right = probabilities.max(1), LOGITS.argmax(1) == ANSWERS
    np.testing.assert_allclose(confidences(LOGITS), confidence)
    edges, expected = np.linspace(0, 1, 16), 0.0
    for low, high in itertools.pairwise(edges):
        there = (confidence > low) & (confidence <= high)
        expected += there.mean() * abs(right[there].mean() - confidence[there].mean()) if there.any() else 0
    assert calibration_error(LOGITS, ANSWERS)(np.ones((1, ROWS)))[0] == pytest.approx(expected)
    gaps = [bin["rows"] / ROWS * abs(bin["accuracy"] - bin["confidence"]) for bin in reliability(LOGITS, ANSWERS)]
    assert sum(gaps) == pytest.approx(expected)
