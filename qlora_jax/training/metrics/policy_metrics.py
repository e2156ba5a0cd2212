"""Metrics of policy gradients, with TRL's meanings: entropy, divergence, clipped ratios, and the gap to the sampler.

All are of a whole step. A share of clipped ratios is one of tokens, or of replies if ratios are those of replies.

Dimension key: A micro-batches, B rows, S slots, T positions.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from qlora_jax.data.batching.packing import PRESENT
from qlora_jax.objectives.objective import read_by_losses
from qlora_jax.objectives.policy_gradient import ADVANTAGES, SAMPLER_LOGPS, PolicyGradient, PolicyOutputs, TokenTerms
from qlora_jax.objectives.sequences import spread_to_tokens, sum_by_slot
from qlora_jax.training.metrics.record_summaries import (
    CISPO_CLIPPED,
    CLIPPED,
    CLIPPED_HIGH,
    CLIPPED_HIGH_MAX,
    CLIPPED_LOW,
    CLIPPED_LOW_MIN,
    POLICY_ENTROPY,
    POLICY_KL,
    SAMPLER_GAP,
    SAMPLER_GAP_MAX,
)

Numbers = Float[np.ndarray, "A B T"]


def policy_metrics(
    objective: PolicyGradient, outputs: PolicyOutputs, arrays: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Returns the metrics of a step; none for a step without tokens that train."""
    is_trained = arrays["weights"] > 0
    if not is_trained.any():
        return {}
    read = {name: jnp.asarray(arrays[name]) for name in read_by_losses(objective)}
    terms: TokenTerms = jax.tree.map(np.asarray, objective.token_terms(outputs, read))
    found = {POLICY_ENTROPY: _mean(outputs.entropy_BT, is_trained)}
    found |= {} if terms.kl_BT is None else {POLICY_KL: _mean(terms.kl_BT, is_trained)}
    found |= _clipped(objective, np.asarray(terms.ratios_BT), read)
    return found | sampler_gap(objective.old_logps(outputs, read), arrays)


def sampler_gap(logps: jax.typing.ArrayLike, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns |log p of the sampler - log p| of the drawn tokens that train: the same weights, computed in two ways."""
    gaps = np.abs(np.asarray(logps) - arrays[SAMPLER_LOGPS])[arrays["weights"] > 0]
    return {SAMPLER_GAP: float(gaps.mean(dtype=np.float64)), SAMPLER_GAP_MAX: float(gaps.max())}


def _mean(values: jax.typing.ArrayLike, is_trained: Bool[np.ndarray, "A B T"]) -> float:
    return float(np.asarray(values)[is_trained].mean(dtype=np.float64))


def _clipped(objective: PolicyGradient, ratios: Numbers, read: Mapping[str, jax.Array]) -> dict[str, float]:
    """Returns the shares of ratios whose clipping stops or truncates the gradient."""
    advantages = np.asarray(spread_to_tokens(read[ADVANTAGES], read["sequences"]))
    slots, weights_BT = read[PRESENT].shape[-1], read["weights"]
    tokens = np.asarray(sum_by_slot(weights_BT, read["sequences"], slots), np.float64)
    counted = tokens if objective.level == "token" else np.asarray(read[PRESENT], np.float64)

    def shares(is_clipped: Bool[np.ndarray, "A B T"]) -> tuple[float, float, float]:
        """Returns the (mean, smallest, largest) share of each reply."""
        sums = sum_by_slot(jnp.asarray(is_clipped, jnp.float32) * weights_BT, read["sequences"], slots)
        of_replies = np.asarray(sums, np.float64) / np.maximum(tokens, 1.0)
        own = of_replies[counted > 0]
        return float((of_replies * counted).sum() / counted.sum()), float(own.min()), float(own.max())

    if objective.loss == "cispo":
        return {CISPO_CLIPPED: shares((ratios > objective.epsilon_high) & (advantages > 0))[0]}
    is_low = (ratios < 1 - objective.epsilon) & (advantages < 0)
    is_high = (ratios > 1 + objective.epsilon_high) & (advantages > 0)
    (low, low_min, _), (high, _, high_max) = shares(is_low), shares(is_high)
    found = {CLIPPED_LOW: low, CLIPPED_LOW_MIN: low_min, CLIPPED_HIGH: high, CLIPPED_HIGH_MAX: high_max}
    return found | {CLIPPED: shares(is_low | is_high)[0]}
