"""Losses of pairs against their formulas in NumPy, and limits that follow from them."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.objectives.preference_losses import MARGIN_LOSSES

MARGINS = np.array([-40.0, -3.0, -0.1, 0.0, 0.7, 5.0, 60.0], np.float32)
BETA, SMOOTHING = 0.3, 0.2


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -x.astype(np.float64))


EXPECTED = {
    "sigmoid": lambda h: -0.8 * log_sigmoid(BETA * h) - 0.2 * log_sigmoid(-BETA * h),
    "robust": lambda h: (-0.8 * log_sigmoid(BETA * h) + 0.2 * log_sigmoid(-BETA * h)) / 0.6,
    "hinge": lambda h: np.maximum(0, 1 - BETA * h),
    "ipo": lambda h: (h - 1 / 0.6) ** 2,
}


@pytest.mark.parametrize("name", MARGIN_LOSSES)
def test_losses_are_their_formulas(name: str):
    found = MARGIN_LOSSES[name](jnp.asarray(MARGINS), BETA, SMOOTHING)
    np.testing.assert_allclose(found, EXPECTED[name](MARGINS), rtol=1e-6, atol=1e-6)


def test_robust_is_unbiased_under_flips():
    """The mean robust loss of preferences flipped with probability e is the sigmoid loss of the true ones."""
    margins, loss = jnp.asarray(MARGINS), MARGIN_LOSSES["robust"]
    mean = 0.8 * loss(margins, BETA, 0.2) + 0.2 * loss(-margins, BETA, 0.2)
    np.testing.assert_allclose(mean, MARGIN_LOSSES["sigmoid"](margins, BETA, 0.0), rtol=1e-5, atol=1e-6)
