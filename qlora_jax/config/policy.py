"""Declares the settings of a loss of rewards: section `policy`, with TRL's names and defaults.

RLOO with one iteration is loss_type=dr_grpo and scale_rewards=none: its gradient is RLOO's times (G - 1) / (G L), for
groups of G replies and max_completion_length L, a factor that Adam cancels. It is REINFORCE, too, whose baseline is
the mean reward of a prompt's other replies.
"""

import dataclasses
from typing import Literal

from qlora_jax.config.fields import AT_LEAST_ONE, BELOW_ONE, NON_NEGATIVE, POSITIVE, Bound, setting
from qlora_jax.config.objectives import OBJECTIVES, unused_settings
from qlora_jax.config.rollouts import RolloutArgs
from qlora_jax.config.sizes import parse_bytes

PolicyLossType = Literal["dapo", "grpo", "dr_grpo", "bnpo", "cispo"]
ABOVE_ONE = Bound("more than 1", lambda value: value > 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyArgs:
    """Learning from the rewards of sampled replies."""

    loss_type: PolicyLossType = setting(
        "mean of the token losses. dapo: over all tokens of a step. grpo: over the tokens of each reply, then over "
        "replies. bnpo: over the tokens of a micro-batch. dr_grpo: sum over replies x max_completion_length. cispo: as "
        "dapo, with ratios that are truncated, not clipped",
        "dapo",
    )
    importance_sampling_level: Literal["token", "sequence"] = setting(
        "ratio of new and old probability. token: of each token; sequence: the geometric mean over a reply (GSPO)",
        "token",
    )
    scale_rewards: Literal["group", "batch", "none"] = setting(
        "divide advantages by the standard deviation of the rewards of a prompt's replies, of all replies, or not",
        "group",
    )
    epsilon: float = setting("ratios are clipped from below at 1 - epsilon", 0.2, BELOW_ONE)
    epsilon_high: float | None = setting(
        "ratios are clipped from above at 1 + epsilon_high; null: epsilon. cispo: the largest ratio, such as 5",
        None,
        POSITIVE,
    )
    delta: float | None = setting(
        "largest ratio also where clipping does not apply, for negative advantages; null: none", None, ABOVE_ONE
    )
    beta: float = setting("weight of the divergence from the model that the run starts with", 0.0, NON_NEGATIVE)
    use_bias_correction_kl: bool = setting("multiply the estimate of this divergence by the ratio", True)
    num_iterations: int = setting("passes over the replies of a rollout phase", 1, AT_LEAST_ONE)
    steps_per_generation: int = setting(
        "optimizer steps that share the prompts of a rollout phase (TRL counts micro-batches)", 1, AT_LEAST_ONE
    )
    max_redraws: int = setting(
        "further draws, at most, for prompts whose replies have equal rewards (DAPO's dynamic sampling)",
        0,
        NON_NEGATIVE,
    )
    mask_truncated_completions: bool = setting("leave out replies that were cut at max_completion_length", False)
    importance_correction: Literal["token_truncate", "sequence_mask"] | None = setting(
        "weigh losses by the ratio of the trainer's and the sampler's probability. token_truncate: of each token, at "
        "most correction_max. sequence_mask: of a whole reply, or 0 above correction_max. null: no weights",
        None,
    )
    correction_max: float = setting("largest weight of importance_correction", 3.0, ABOVE_ONE)


def policy_problems(policy: PolicyArgs, rollouts: RolloutArgs, objective: str) -> list[str]:
    """Reports settings of both sections that the objective or its loss ignores, and values that it cannot use."""
    declared = OBJECTIVES[objective]
    if declared.rows != "prompt":
        return unused_settings("policy", policy, (), objective) + unused_settings("rollouts", rollouts, (), objective)
    problems = []
    try:
        parse_bytes(rollouts.cache)
    except ValueError as error:
        problems.append(f"rollouts.cache: {error}")
    if not declared.policy:
        return problems + unused_settings("policy", policy, (), objective)
    if policy.loss_type == "cispo" and policy.epsilon_high is None:
        problems.append(
            "policy.epsilon_high: found null with policy.loss_type=cispo, expected the largest ratio. Set it, to 5 for "
            "example"
        )
    plain, unused = PolicyArgs(), dict[str, str]()
    if policy.loss_type == "cispo":
        unused |= dict.fromkeys(("epsilon", "delta"), "policy.loss_type=cispo")
    if policy.importance_correction is None:
        unused["correction_max"] = "policy.importance_correction=null"
    if policy.beta == 0.0:
        unused["use_bias_correction_kl"] = "policy.beta=0.0"
    return problems + [
        f"policy.{name}: found {getattr(policy, name)!r}, but {why} does not use it. Remove this setting"
        for name, why in unused.items()
        if getattr(policy, name) != getattr(plain, name)
    ]
