"""The numbers of a metrics record: of preferences, of routers, and of evaluations, which trackers plot.

Dimension key: R rows of a step or of the held-out data, S sparse layers, E experts.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float32, Float64, Int64, PyTree

from qlora_jax.data.batching.packing import PRESENT
from qlora_jax.measures.metrics import Metric, RowValues, perplexity
from qlora_jax.measures.statistics import bootstrap, paired_bootstrap_of, wilson_interval
from qlora_jax.models.config import ExpertsConfig
from qlora_jax.nn.router import SIGMOID
from qlora_jax.objectives.distillation import Distillation, DistilledRows
from qlora_jax.objectives.objective import LABELS, REFERENCE, Objective, PreferenceObjective
from qlora_jax.objectives.policy_gradient import SAMPLER_LOGPS, PolicyGradient, PolicyOutputs
from qlora_jax.objectives.router_losses import RoutedOutputs
from qlora_jax.objectives.sequences import ComparedLogps, SequenceLogps
from qlora_jax.training.metrics.policy_metrics import policy_metrics, sampler_gap
from qlora_jax.training.metrics.record_summaries import (
    ACCURACY,
    AUX_LOSS,
    BY_LAYER,
    CHOSEN,
    CROSS_ENTROPY,
    DEAD,
    DIVERGENCE,
    ENTROPY,
    EVAL,
    HIGH,
    KL_CHOSEN,
    KL_REJECTED,
    KTO_KL,
    LOG_RATIO,
    LOGP_CHOSEN,
    LOGP_REJECTED,
    LOSS,
    LOW,
    MARGIN,
    MAX_LOAD,
    OBJECTIVE_ROWS,
    REJECTED,
    TEACHER_TAIL,
    Z_LOSS,
)

NO_LOGPS = np.zeros(0)


def flatten_metrics(task: str, measures: Sequence[Metric]) -> dict[str, float]:
    """Returns each measure by task and name, and the ends of its interval if it has one.

    "right by letter" of `letters` becomes letters_right_by_letter, letters_right_by_letter_low and
    letters_right_by_letter_high. Text in brackets is dropped.
    """
    found: dict[str, float] = {}
    for measure in measures:
        name = f"{task}_{_key(measure.name)}"
        found[name] = measure.value
        if measure.interval is not None:
            found[name + LOW], found[name + HIGH] = measure.interval
    return found


def eval_loss_metrics(nll: Float64[np.ndarray, " rows"], tokens: Int64[np.ndarray, " rows"]) -> dict[str, float]:
    """Returns the held-out loss (the mean over tokens) and its perplexity, with an interval if the loss is finite.

    Args:
      nll: each row's sum of -log p over its `tokens`, in nats.
    """
    loss = float(nll.sum() / tokens.sum())
    found = {LOSS: loss, "eval_perplexity": perplexity(loss), "eval_tokens": int(tokens.sum())}
    if math.isfinite(loss):
        found[LOSS + LOW], found[LOSS + HIGH] = bootstrap(nll, tokens)
    return found


def objective_loss_metrics(losses: Float64[np.ndarray, " rows"]) -> dict[str, float]:
    """Returns the held-out loss of an objective (the mean over rows), with an interval if the loss is finite."""
    found = {LOSS: float(losses.mean()), OBJECTIVE_ROWS: len(losses)}
    if math.isfinite(found[LOSS]):
        found[LOSS + LOW], found[LOSS + HIGH] = bootstrap(losses, np.ones(len(losses)))
    return found


def _key(name: str) -> str:
    return re.sub(r"\W+", "_", name.partition(" (")[0])


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


# Metrics of preferences: rewards, accuracy, margin, log p per token, and its ratio to the reference.
#
# Held-out metrics have intervals. The names mean what TRL's mean; docs/preferences.md compares them. All are ratios of
# sums over rows.
#
# `kl_chosen` and `kl_rejected` are held-out metrics: KL(model || reference) over the whole vocabulary, averaged over
# the tokens of the answers. `log_ratio_per_token` is the mean of log p - log p of the reference over the tokens of the
# data's answers. It is not the KL divergence, and it may be negative.


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerScores:
    """Scores of one answer per row.

    Fields:
      logps: the sum of log p over its tokens.
      rewards: as the objective defines them.
      reference: the sum of log p under the reference; None for objectives without one.
      kl: the sum of KL(model || reference) over its tokens; None if it is not computed, as in training steps.
    """

    logps: Float64[np.ndarray, " R"]
    tokens: Float64[np.ndarray, " R"]
    rewards: Float64[np.ndarray, " R"]
    reference: Float64[np.ndarray, " R"] | None
    kl: Float64[np.ndarray, " R"] | None


def pair_values(chosen: AnswerScores, rejected: AnswerScores) -> dict[str, RowValues]:
    """Returns each row's part of the metrics of pairs. Equal rewards count as half right."""
    one_R, margin_R = np.ones(len(chosen.logps)), chosen.rewards - rejected.rewards
    found = {
        CHOSEN: RowValues(chosen.rewards, one_R),
        REJECTED: RowValues(rejected.rewards, one_R),
        ACCURACY: RowValues((1 + np.sign(margin_R)) / 2, one_R),
        MARGIN: RowValues(margin_R, one_R),
        LOGP_CHOSEN: RowValues(chosen.logps, chosen.tokens),
        LOGP_REJECTED: RowValues(rejected.logps, rejected.tokens),
    }
    if chosen.kl is not None and rejected.kl is not None:
        found[KL_CHOSEN] = RowValues(chosen.kl, chosen.tokens)
        found[KL_REJECTED] = RowValues(rejected.kl, rejected.tokens)
    if chosen.reference is None or rejected.reference is None:
        return found
    ratios_R = chosen.logps - chosen.reference + rejected.logps - rejected.reference
    return found | {LOG_RATIO: RowValues(ratios_R, chosen.tokens + rejected.tokens)}


def labelled_values(
    answers: AnswerScores, desirable: Float64[np.ndarray, " R"], kl_ratios: Float64[np.ndarray, " R"] | None
) -> dict[str, RowValues]:
    """Returns each row's part of the metrics of answers with labels (KTO).

    Args:
      desirable: 1 for a desirable answer, 0 for an undesirable one.
      kl_ratios: log p - log p of the reference of another row's answer after the row's prompt; None if the objective
        does not have them.
    """
    undesirable = 1 - desirable
    found = {
        CHOSEN: RowValues(answers.rewards * desirable, desirable),
        REJECTED: RowValues(answers.rewards * undesirable, undesirable),
        LOGP_CHOSEN: RowValues(answers.logps * desirable, answers.tokens * desirable),
        LOGP_REJECTED: RowValues(answers.logps * undesirable, answers.tokens * undesirable),
    }
    if answers.kl is not None:
        found[KL_CHOSEN] = RowValues(answers.kl * desirable, answers.tokens * desirable)
        found[KL_REJECTED] = RowValues(answers.kl * undesirable, answers.tokens * undesirable)
    if answers.reference is not None:
        found[LOG_RATIO] = RowValues(answers.logps - answers.reference, answers.tokens)
    if kl_ratios is not None:
        found[KTO_KL] = RowValues(kl_ratios, np.ones(len(kl_ratios)))
    return found


def means(values: Mapping[str, RowValues]) -> dict[str, float]:
    """Returns the metrics of one step; those that no row contributes to are left out.

    Without pairs, the margin is the difference between the mean rewards of desirable and undesirable answers.
    """
    found = {name: float(one.values.sum() / one.weights.sum()) for name, one in values.items() if one.weights.sum() > 0}
    if MARGIN not in values and CHOSEN in found and REJECTED in found:
        found[MARGIN] = found[CHOSEN] - found[REJECTED]
    if KTO_KL in found:
        found[KTO_KL] = max(0.0, found[KTO_KL])  # as in the loss
    return found


def step_metrics(objective: Objective, outputs: PyTree, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns the metrics of a step; none for an objective whose outputs are not log-probabilities.

    Args:
      arrays: those of the batch.
    """
    if isinstance(outputs, DistilledRows):
        found = means(distillation_values(outputs, arrays["weights"]))
        del found[DIVERGENCE]  # the loss
        own = cast(Distillation, objective)
        is_sampled = arrays.get(SAMPLER_LOGPS, NO_LOGPS).any()  # the completions of the data have no such numbers
        is_comparable = is_sampled and own.temperature == own.sampler_temperature
        return found | (sampler_gap(outputs.logps_BT, arrays) if is_comparable else {})
    if not isinstance(outputs, SequenceLogps | PolicyOutputs):
        return {}
    own = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), outputs)  # on a mesh they lie on all devices
    if isinstance(own, PolicyOutputs):
        return policy_metrics(cast(PolicyGradient, objective), own, arrays)
    return means(preference_values(cast(PreferenceObjective, objective), own, arrays))


def distillation_values(outputs: DistilledRows, weights: Float32[np.ndarray, "*A B T"]) -> dict[str, RowValues]:
    """Returns each row's part of the divergence, the cross-entropy, and the teacher's probability of the tail."""
    tokens = weights.sum(axis=-1, dtype=np.float64).ravel()
    named = {DIVERGENCE: outputs.divergence_B, CROSS_ENTROPY: outputs.nll_B, TEACHER_TAIL: outputs.tail_B}
    return {name: RowValues(np.asarray(each, np.float64).ravel(), tokens) for name, each in named.items()}


def means_with_intervals(values: Mapping[str, RowValues]) -> dict[str, float]:
    """Returns the held-out metrics, with 95 % intervals over rows: Wilson's for the accuracy, otherwise bootstrap.

    Ties make Wilson's interval a little too wide, because halves vary less than whole answers.
    """
    found: dict[str, float] = {}
    for name, mean in means(values).items():
        found[EVAL + name] = mean
        found[EVAL + name + LOW], found[EVAL + name + HIGH] = _interval(name, values)
    return found


def _interval(name: str, values: Mapping[str, RowValues]) -> tuple[float, float]:
    if name == ACCURACY:
        return wilson_interval(float(values[name].values.sum()), len(values[name].values))
    if name not in values:
        rejected, chosen = (np.stack(values[side], axis=1) for side in (REJECTED, CHOSEN))
        return paired_bootstrap_of(rejected, chosen, lambda mean: mean)
    counted = values[name].weights > 0
    low, high = bootstrap(values[name].values[counted], values[name].weights[counted])
    return (max(0.0, low), max(0.0, high)) if name == KTO_KL else (low, high)


def preference_values(
    objective: PreferenceObjective, outputs: SequenceLogps, arrays: Mapping[str, np.ndarray]
) -> dict[str, RowValues]:
    """Returns the rows' parts of the metrics of an objective, flat over all rows and packs.

    Args:
      outputs: sums of log p, of tokens and possibly of the divergence, [..., S].
      arrays: `present` and the objective's values, with the same shapes.
    """
    rewards_BS = objective.rewards(outputs, {name: jnp.asarray(arrays[name]) for name in objective.values})
    is_row = _of_rows(arrays[PRESENT], objective.sequences_per_row, 0) > 0

    def flat(array: ArrayLike, place: int) -> Float64[np.ndarray, " R"]:
        return _of_rows(array, objective.sequences_per_row, place)[is_row].astype(np.float64)

    def scores(place: int) -> AnswerScores:
        """Returns those of the sequence at a place of each row."""
        return AnswerScores(
            logps=flat(outputs.logps_BS, place),
            tokens=flat(outputs.tokens_BS, place),
            rewards=flat(rewards_BS, place),
            reference=flat(arrays[REFERENCE], place) if REFERENCE in arrays else None,
            kl=flat(outputs.kl_BS, place) if isinstance(outputs, ComparedLogps) else None,
        )

    if objective.row_kind == "pair":
        return pair_values(scores(0), scores(1))
    kl_ratios = None
    if objective.kl_pairs:
        others = scores(1)
        kl_ratios = others.logps - others.reference
    return labelled_values(scores(0), flat(arrays[LABELS], 0), kl_ratios)


def _of_rows(array: ArrayLike, sequences: int, place: int) -> np.ndarray:
    """Returns the values [..., R] of the sequences at a place of their rows, from those of all slots [..., S]."""
    return np.asarray(array)[..., place::sequences]
