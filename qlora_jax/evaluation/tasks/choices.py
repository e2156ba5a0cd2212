"""Multiple choice by likelihood: the option that the model finds likeliest is its answer."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool

from qlora_jax.evaluation.loglikelihood import ScoredIds, answer_scores
from qlora_jax.inference.result_cache import NOTHING_KEPT, Kept
from qlora_jax.models.partition import ModelParts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """One question: its options as rows of which the option's tokens are scored, and the index of the right one."""

    options: Sequence[ScoredIds]
    answer: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceScores:
    """Which questions a model has right, by the options' sums of log p and by their means over tokens.

    A question is right where the right option is likelier than every other; where it shares the first place it is tied,
    and not right.
    """

    by_sum: Bool[np.ndarray, " questions"]
    tied_by_sum: Bool[np.ndarray, " questions"]
    by_mean: Bool[np.ndarray, " questions"]
    tied_by_mean: Bool[np.ndarray, " questions"]


def option_rows(choices: Sequence[Choice]) -> list[ScoredIds]:
    """All options of all questions, as rows."""
    return [option for choice in choices for option in choice.options]


def choice_scores(
    parts: ModelParts,
    choices: Sequence[Choice],
    progress: Callable[[int], None] = lambda rows_done: None,
    kept: Kept = NOTHING_KEPT,
) -> ChoiceScores:
    """The scores of each question; `progress` counts options."""
    scores = answer_scores(parts, option_rows(choices), progress, kept)
    starts = np.cumsum([len(choice.options) for choice in choices])[:-1]
    sums, means = np.split(-scores.nll, starts), np.split(-scores.nll / scores.tokens, starts)
    answers = [choice.answer for choice in choices]
    (by_sum, tied_by_sum), (by_mean, tied_by_mean) = _verdicts(sums, answers), _verdicts(means, answers)
    return ChoiceScores(by_sum=by_sum, tied_by_sum=tied_by_sum, by_mean=by_mean, tied_by_mean=tied_by_mean)


def _verdicts(likelihoods: Sequence[np.ndarray], answers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(right, tied) of each question."""
    lead = np.array([x[answer] - np.delete(x, answer).max() for x, answer in zip(likelihoods, answers, strict=True)])
    return lead > 0, lead == 0
