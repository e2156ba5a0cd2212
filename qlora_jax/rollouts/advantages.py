"""Advantages of sampled replies from their rewards, and the scale of each reply's loss.

Dimension key: N replies in groups of G to one prompt, P prompts, F reward functions, K steps of a rollout phase,
A micro-batches of a step, R replies of a micro-batch.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from qlora_jax.config.policy import PolicyLossType

SMALLEST_STD = 1e-4  # added to standard deviations, as in TRL
NO_SPREAD = 1e-8  # standard deviations up to it count as 0, as in TRL

Lengths = Int64[np.ndarray, "K A R"]
IsReply = Bool[np.ndarray, "K A R"]
Scales = Float64[np.ndarray, "K A R"]


class Advantages(NamedTuple):
    """The result of comparing the replies to each prompt.

    Fields:
      rewards_N: the weighted sum of each reply's rewards; nan if no function scored it.
      advantages_N: 0 for replies without reward, and in groups of equal rewards.
      std_P: standard deviation of the rewards of each prompt's replies; nan below 2 rewards.
      has_signal_P: True for prompts whose replies have different rewards.
    """

    rewards_N: Float64[np.ndarray, " N"]
    advantages_N: Float64[np.ndarray, " N"]
    std_P: Float64[np.ndarray, " P"]
    has_signal_P: Bool[np.ndarray, " P"]


def group_advantages(
    rewards_NF: Float64[np.ndarray, "N F"],
    *,
    num_generations: int,
    scale_rewards: Literal["group", "batch", "none"] = "group",
    weights_F: Float64[np.ndarray, " F"] | None = None,
) -> Advantages:
    """Returns rewards minus their group's mean, divided by a standard deviation of n - 1 degrees of freedom.

    Args:
      rewards_NF: nan for a function that does not score a reply, which then counts 0 in the sum of the others.
      scale_rewards: "group" divides by each group's deviation, "batch" by that of all replies, "none" by 1.
      weights_F: weights of the functions; None: 1 each.
    """
    weighted_NF = rewards_NF if weights_F is None else rewards_NF * weights_F
    is_scored_NF = np.isfinite(rewards_NF)
    rewards_N = np.where(is_scored_NF.any(axis=1), np.where(is_scored_NF, weighted_NF, 0.0).sum(axis=1), np.nan)
    rewards_PG = rewards_N.reshape(-1, num_generations)
    std_P = np.array([_std(group) for group in rewards_PG])
    has_signal_P = std_P > NO_SPREAD  # False without two rewards to compare
    is_compared_PG = has_signal_P[:, None] & np.isfinite(rewards_PG)
    replies_P1 = np.maximum(is_compared_PG.sum(axis=1, keepdims=True), 1)
    means_P1 = np.where(is_compared_PG, rewards_PG, 0.0).sum(axis=1, keepdims=True) / replies_P1
    advantages_PG = rewards_PG - means_P1
    if scale_rewards != "none":
        advantages_PG /= (std_P[:, None] if scale_rewards == "group" else _std(rewards_N)) + SMALLEST_STD
    return Advantages(rewards_N, np.where(is_compared_PG, advantages_PG, 0.0).ravel(), std_P, has_signal_P)


def _std(rewards: Float64[np.ndarray, "..."]) -> float:
    """Returns the standard deviation of those that are not nan, with n - 1 degrees of freedom; nan for fewer than 2."""
    scored = rewards[np.isfinite(rewards)]
    return float(np.std(scored, ddof=1)) if len(scored) > 1 else np.nan


def token_scale(
    loss_type: PolicyLossType, lengths: Lengths, is_reply: IsReply, *, max_completion_length: int
) -> Scales:
    """Returns the factor of each reply's token losses, whose sums are averaged over the replies of a step.

    Args:
      lengths: tokens of each reply that train: 0 for a reply that is masked.
      is_reply: False for gaps, whose factor is 0. A masked reply counts as one of its step.
    """
    scales = _SCALES[loss_type](lengths.astype(np.float64), is_reply, max_completion_length)
    return np.where(is_reply, scales, 0.0)


def _of_reply(lengths: Scales, is_reply: IsReply, longest: int) -> Scales:
    return 1 / np.maximum(lengths, 1.0)


def _of_longest(lengths: Scales, is_reply: IsReply, longest: int) -> Scales:
    return np.full(lengths.shape, 1 / longest)


def _of_micro_batch(lengths: Scales, is_reply: IsReply, longest: int) -> Scales:
    """Returns replies of the step / (micro-batches x tokens of the micro-batch)."""
    replies_K11 = is_reply.sum(axis=(1, 2), keepdims=True)
    tokens_KA1 = np.maximum(lengths.sum(axis=2, keepdims=True), 1.0)
    return np.broadcast_to(replies_K11 / (lengths.shape[1] * tokens_KA1), lengths.shape)


def _of_step(lengths: Scales, is_reply: IsReply, longest: int) -> Scales:
    """Returns replies of the step / its tokens; the steps of a rollout phase share their mean number of tokens."""
    replies_K11 = is_reply.sum(axis=(1, 2), keepdims=True)
    return np.broadcast_to(replies_K11 * len(lengths) / max(lengths.sum(), 1.0), lengths.shape)


_SCALES: dict[PolicyLossType, Callable[[Scales, IsReply, int], Scales]] = {
    "grpo": _of_reply,
    "bnpo": _of_micro_batch,
    "dr_grpo": _of_longest,
    "dapo": _of_step,
    "cispo": _of_step,
}
