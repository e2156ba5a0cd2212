"""Losses of a preference pair, by its margin h: log p(chosen) - log p(rejected), minus that of the reference if any.

With b = beta, e = label_smoothing, s the logistic function:

  sigmoid  -(1 - e) log s(b h) - e log s(-b h)                  Rafailov et al. 2023 (DPO), Mitchell 2023 (e > 0: cDPO)
  robust   (-(1 - e) log s(b h) + e log s(-b h)) / (1 - 2 e)    Chowdhury et al. 2024
  hinge    max(0, 1 - b h)                                      Zhao et al. 2023 (SLiC)
  ipo      (h - 1 / (2 b))^2, with means per token in h         Azar et al. 2023 (IPO)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Margins = Float[Array, "*P"]


def sigmoid_loss(margin: Margins, beta: float, label_smoothing: float) -> Margins:
    """Returns the cross-entropy of a preference that is flipped with probability `label_smoothing`."""
    scaled = beta * margin
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(scaled) - label_smoothing * jax.nn.log_sigmoid(-scaled)


def robust_loss(margin: Margins, beta: float, label_smoothing: float) -> Margins:
    """Returns the loss whose mean over flips, of probability `label_smoothing`, is the sigmoid loss without flips."""
    scaled = beta * margin
    kept, flipped = jax.nn.log_sigmoid(scaled), jax.nn.log_sigmoid(-scaled)
    return (-(1 - label_smoothing) * kept + label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge_loss(margin: Margins, beta: float, label_smoothing: float) -> Margins:
    """Returns the hinge loss of the scaled margin."""
    return jnp.maximum(0.0, 1 - beta * margin)


def ipo_loss(margin: Margins, beta: float, label_smoothing: float) -> Margins:
    """Returns the squared distance of the margin from 1 / (2 beta)."""
    return (margin - 1 / (2 * beta)) ** 2


MARGIN_LOSSES: dict[str, Callable[[Margins, float, float], Margins]] = {
    "sigmoid": sigmoid_loss,
    "robust": robust_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
}
