"""Metrics of the routers of a mixture of experts in one step: how evenly each layer uses its experts, and losses.

Dimension key: S sparse layers, E experts.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, PyTree

from qlora_jax.models.config import ExpertsConfig
from qlora_jax.nn.router import SIGMOID
from qlora_jax.objectives.router_losses import RoutedOutputs

AUX_LOSS, Z_LOSS = "router_aux_loss", "router_z_loss"
MAX_LOAD, ENTROPY, DEAD = "router_max_load", "router_entropy", "router_dead_experts"
BY_LAYER = "_by_layer"


def router_metrics(outputs: PyTree, experts: ExpertsConfig | None) -> dict[str, float | list[float]]:
    """Returns the metrics of a step; none for a model without experts.

    Numbers are of the least balanced layer, lists have one number per sparse layer. `max_load` is the load of the
    busiest expert over the mean load: 1 if all are used equally, E if only one is used. `entropy` is that of the loads
    over its maximum: 1 and 0. A dead expert has no token in this step.

    Sigmoids of logits do not add up to 1, so the load-balancing loss is not defined for them.
    """
    if experts is None:
        return {}
    assert isinstance(outputs, RoutedOutputs), "a mixture has a Routed objective"
    routing = outputs.routing
    counts_SE, probs_SE = (_sum_of_rows(each, 2) for each in (routing.counts_BSE, routing.probs_BSE))
    z_S, tokens = _sum_of_rows(routing.z_BS, 1), float(np.asarray(routing.tokens_B, np.float64).sum())
    layers, count = counts_SE.shape
    max_load_S, entropy_S, dead_S = loads(counts_SE)
    f_E, p_E = counts_SE.sum(axis=0) / (layers * tokens), probs_SE.sum(axis=0) / (layers * tokens)
    return ({} if experts.score == SIGMOID else {AUX_LOSS: float(count * f_E @ p_E)}) | {
        Z_LOSS: float(z_S.mean() / tokens),
        MAX_LOAD: float(max_load_S.max()),
        ENTROPY: float(entropy_S.min()),
        DEAD: float(dead_S.sum()),
        MAX_LOAD + BY_LAYER: _rounded(max_load_S),
        ENTROPY + BY_LAYER: _rounded(entropy_S),
        DEAD + BY_LAYER: dead_S.tolist(),
    }


def loads(
    counts_SE: Float64[np.ndarray, "S E"],
) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " S"], Float64[np.ndarray, " S"]]:
    """Returns per layer the busiest expert's load over the mean, the relative entropy, and the dead experts."""
    experts = counts_SE.shape[1]
    shares_SE = counts_SE / counts_SE.sum(axis=1, keepdims=True)
    logs_SE = np.log(np.where(shares_SE > 0, shares_SE, 1.0))
    entropy_S = -(shares_SE * logs_SE).sum(axis=1) / np.log(max(experts, 2))
    return shares_SE.max(axis=1) * experts, entropy_S, (counts_SE == 0).sum(axis=1).astype(np.float64)


def _sum_of_rows(values: PyTree, kept: int) -> Float64[np.ndarray, "..."]:
    """Returns the sum over all axes but the last `kept`."""
    array = np.asarray(values, np.float64)
    return array.reshape(-1, *array.shape[-kept:]).sum(axis=0)


def _rounded(values: Sequence[float] | np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]
