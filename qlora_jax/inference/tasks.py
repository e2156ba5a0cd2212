"""What can be scored: a text, multiple-choice questions, rows with answers; how each is summed up and compared."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from qlora_jax.inference.choices import Choice, ChoiceScores, choice_scores
from qlora_jax.inference.decode import Parts
from qlora_jax.inference.harness_task import HarnessTask
from qlora_jax.inference.letters import Lettered, LetterScores, letter_scores, mean_over_subjects
from qlora_jax.inference.measures import Comparison, Measure, Progress
from qlora_jax.inference.scoring import RowScores, ScoredIds, answer_scores
from qlora_jax.inference.statistics import bootstrap, mcnemar, paired_bootstrap, stratified_bootstrap, wilson_interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTask:
    """Perplexity of windows of a text.

    Fields of every task:
      title: what it is, for people.
      name: the setting that asks for it.
    """

    title: str
    rows: Sequence[ScoredIds]
    name: str = "text"

    @property
    def size(self) -> int:
        """Rows that `score` reports as done, in all."""
        return len(self.rows)

    def score(self, parts: Parts, progress: Progress) -> RowScores:
        """The scores of one model."""
        return answer_scores(*parts, self.rows, progress)

    def measures(self, scores: RowScores) -> list[Measure]:
        """What the scores say."""
        return _losses(scores)

    def compare(self, before: RowScores, after: RowScores) -> list[Comparison]:
        """What changed from one model to another."""
        return [_loss_change(before, after)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsTask(TextTask):
    """Loss of answers, and whether greedy decoding would write them."""

    name: str = "rows"

    def measures(self, scores: RowScores) -> list[Measure]:
        """What the scores say."""
        hits = {"begins with the answer": scores.begins, "is exactly the answer": scores.exact}
        return [*_losses(scores), *(_share(name, right) for name, right in hits.items())]

    def compare(self, before: RowScores, after: RowScores) -> list[Comparison]:
        """What changed from one model to another."""
        hits = {
            "begins with the answer": (before.begins, after.begins),
            "is exactly the answer": (before.exact, after.exact),
        }
        return [_loss_change(before, after), *(_share_change(name, *pair) for name, pair in hits.items())]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceTask:
    """Accuracy of the likeliest option."""

    title: str
    choices: Sequence[Choice]
    name: str = "choices"

    @property
    def size(self) -> int:
        """Rows that `score` reports as done, in all."""
        return sum(len(choice.options) for choice in self.choices)

    def score(self, parts: Parts, progress: Progress) -> ChoiceScores:
        """The scores of one model."""
        return choice_scores(*parts, self.choices, progress)

    def measures(self, scores: ChoiceScores) -> list[Measure]:
        """What the scores say."""
        ties = int((scores.tied_by_sum | scores.tied_by_mean).sum())
        return [
            _share("right by likelihood", scores.by_sum),
            _share("right by likelihood a token", scores.by_mean),
            Measure("ties (counted as wrong)", "count", ties),
        ]

    def compare(self, before: ChoiceScores, after: ChoiceScores) -> list[Comparison]:
        """What changed from one model to another."""
        return [
            _share_change("right by likelihood", before.by_sum, after.by_sum),
            _share_change("right by likelihood a token", before.by_mean, after.by_mean),
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LettersTask:
    """Accuracy of the likeliest letter; where every question has a subject, their mean too, as MMLU is told."""

    title: str
    questions: Sequence[Lettered]
    subjects: Sequence[str] | None
    name: str = "letters"

    @property
    def size(self) -> int:
        """Rows that `score` reports as done, in all."""
        return len(self.questions)

    def score(self, parts: Parts, progress: Progress) -> LetterScores:
        """The scores of one model."""
        return letter_scores(*parts, self.questions, progress)

    def measures(self, scores: LetterScores) -> list[Measure]:
        """What the scores say."""
        by_subject = []
        if self.subjects is not None:
            mean = mean_over_subjects(scores.right, self.subjects)
            interval = stratified_bootstrap(scores.right, self.subjects)
            by_subject = [Measure(f"mean over {len(set(self.subjects))} subjects", "share", mean, interval)]
        ties = Measure("ties (counted as wrong)", "count", int(scores.tied.sum()))
        return [_share("right by letter", scores.right), *by_subject, ties]

    def compare(self, before: LetterScores, after: LetterScores) -> list[Comparison]:
        """What changed from one model to another."""
        return [_share_change("right by letter", before.right, after.right)]


Task = TextTask | ChoiceTask | LettersTask | HarnessTask


def _losses(scores: RowScores) -> list[Measure]:
    low, high = interval = bootstrap(scores.nll, scores.tokens)
    perplexities = math.exp(low), math.exp(high)
    return [
        Measure("perplexity", "number", scores.perplexity, perplexities),
        Measure("loss a token", "number", scores.mean_nll, interval),
    ]


def _loss_change(before: RowScores, after: RowScores) -> Comparison:
    interval = paired_bootstrap(before.nll, after.nll, after.tokens)
    return Comparison("loss a token", "number", after.mean_nll - before.mean_nll, interval=interval)


def _share(name: str, right: np.ndarray) -> Measure:
    return Measure(name, "share", float(right.mean()), wilson_interval(int(right.sum()), len(right)))


def _share_change(name: str, before: np.ndarray, after: np.ndarray) -> Comparison:
    return Comparison(name, "share", float(after.mean() - before.mean()), p=mcnemar(before, after))
