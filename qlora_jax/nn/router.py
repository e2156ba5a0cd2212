"""The router of a mixture of experts: which experts a token uses, with which weights, and statistics of the choice.

Dimension key: B rows of the batch, T positions, M = B T tokens, S sparse layers, E experts, k experts per token, G
groups of experts, D embed.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.row_moments import row_moments

SOFTMAX, SOFTMAX_OF_CHOSEN, SIGMOID = "softmax", "softmax of chosen", "sigmoid"
SMALLEST_SUM = 1e-20  # added to a sum of sigmoids, as transformers does
BEST_OF_GROUP = 2  # the experts whose scores, summed, are the score of a group


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """Chooses some experts by the scores of all, and weighs them.

    Attributes:
      per_token: k, the experts that one token uses.
      score: SOFTMAX over all experts, then the k largest; SOFTMAX_OF_CHOSEN: the k largest logits, and the softmax over
        those; SIGMOID: of each logit.
      normalize: True if the weights of the chosen experts are divided by their sum.
      scale: factor of the weights.
      groups: number of equal groups of neighbouring experts; an expert is chosen from the best groups only.
      groups_per_token: number of the best groups.
    """

    per_token: int
    score: str = SOFTMAX
    normalize: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_per_token: int = 1


def route(
    logits_ME: Float[Array, "M E"],
    rule: RoutingRule,
    selection_bias_E: Float[Array, " E"] | None = None,
    by_row: bool = False,
) -> tuple[Int[Array, "M k"], Float[Array, "M k"]]:
    """Returns (chosen experts, their weights in f32), in descending order of the scores.

    Of experts with equal scores, the one with the lower number comes first. torch.topk leaves this order open, so a
    comparison with torch is exact where no two scores at the limit of the choice are equal. The choice has no gradient.

    Args:
      logits_ME: f32.
      selection_bias_E: added to the scores for the choice, not to the weights.
      by_row: a token's bits may not depend on the other tokens; without a gradient.
    """
    scores_ME = router_probabilities(logits_ME, rule.score, by_row)
    ranked_ME = logits_ME if rule.score == SOFTMAX_OF_CHOSEN else scores_ME
    if selection_bias_E is not None:
        ranked_ME = ranked_ME + selection_bias_E[None]
    ranked_ME = _within_best_groups(jax.lax.stop_gradient(ranked_ME), rule)
    experts_Mk = jax.lax.top_k(ranked_ME, rule.per_token)[1]
    if rule.score == SOFTMAX_OF_CHOSEN:
        weights_Mk = _softmax(jnp.take_along_axis(logits_ME, experts_Mk, axis=1), by_row)
    else:
        weights_Mk = jnp.take_along_axis(scores_ME, experts_Mk, axis=1)
    if rule.normalize:
        least = SMALLEST_SUM if rule.score == SIGMOID else 0.0
        weights_Mk = weights_Mk / (_sum(weights_Mk, by_row) + least)
    return experts_Mk, weights_Mk * rule.scale


def router_probabilities(logits_ME: Float[Array, "M E"], score: str, by_row: bool = False) -> Float[Array, "M E"]:
    """Returns the score of every expert, between 0 and 1; for `by_row` see `route`."""
    return jax.nn.sigmoid(logits_ME) if score == SIGMOID else _softmax(logits_ME, by_row)


def _softmax(x_ME: Float[Array, "M E"], by_row: bool) -> Float[Array, "M E"]:
    if not by_row:
        return jax.nn.softmax(x_ME, axis=1)
    # In one loop with a reduction, XLA computes some exponentials as scalars, which round otherwise.
    below_ME = jax.lax.optimization_barrier(x_ME - x_ME.max(axis=1, keepdims=True))
    shares_ME = jax.lax.optimization_barrier(jnp.exp(below_ME))
    return shares_ME / _sum(shares_ME, by_row)


def _sum(x_ME: Float[Array, "M E"], by_row: bool) -> Float[Array, "M 1"]:
    return row_moments(x_ME, centered=True)[0] * x_ME.shape[1] if by_row else x_ME.sum(axis=1, keepdims=True)


def _within_best_groups(scores_ME: jax.Array, rule: RoutingRule) -> jax.Array:
    """Returns the scores, with -inf for experts outside of a token's best groups."""
    if rule.groups == 1:
        return scores_ME
    scores_MGe = scores_ME.reshape(len(scores_ME), rule.groups, -1)
    best_MG = jax.lax.top_k(scores_MGe, BEST_OF_GROUP)[0].sum(axis=2)
    chosen_Mg = jax.lax.top_k(best_MG, rule.groups_per_token)[1]
    is_chosen_MG = jax.nn.one_hot(chosen_Mg, rule.groups, dtype=jnp.bool_).any(axis=1)
    return jnp.where(is_chosen_MG[:, :, None], scores_MGe, -jnp.inf).reshape(scores_ME.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """Sums over the counted tokens of each row of a batch, for losses and metrics of the routers; all in f32.

    Attributes:
      counts_BSE: pairs of a token and an expert that it chose; no gradient.
      probs_BSE: the routers' probabilities: the softmax, or the sigmoid, of the logits.
      z_BS: squares of logsumexp(logits).
      tokens_B: counted tokens.
    """

    counts_BSE: Float[Array, "*A B S E"]
    probs_BSE: Float[Array, "*A B S E"]
    z_BS: Float[Array, "*A B S"]
    tokens_B: Float[Array, "*A B"]


def routing_sums(
    logits_ME: Float[Array, "M E"], experts_Mk: Int[Array, "M k"], score: str, counted_BT: Float[Array, "B T"]
) -> tuple[Float[Array, "B E"], Float[Array, "B E"], Float[Array, " B"]]:
    """Returns one layer's (counts, sums of probabilities, sums of squared logsumexp) per row, as in `Routing`.

    Args:
      counted_BT: 1 for tokens that count, 0 for padding.
    """
    shape_BT, counted_M1 = counted_BT.shape, counted_BT.reshape(-1, 1)
    chosen_ME = jax.nn.one_hot(experts_Mk, logits_ME.shape[1], dtype=jnp.float32).sum(axis=1)
    z_M1 = jax.nn.logsumexp(logits_ME, axis=1, keepdims=True) ** 2
    sums = (
        (of_token * counted_M1).reshape(*shape_BT, -1).sum(axis=1)
        for of_token in (chosen_ME, router_probabilities(logits_ME, score), z_M1)
    )
    counts_BE, probs_BE, z_B1 = sums
    return jax.lax.stop_gradient(counts_BE), probs_BE, z_B1[:, 0]
