"""What can be scored: a text, multiple-choice questions, rows with answers; how each is summed up and compared."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from qlora_jax.evaluation.letters import Lettered, LetterScores, letter_scores, letters_ahead, mean_over_subjects
from qlora_jax.evaluation.lm_eval.task import HarnessTask
from qlora_jax.evaluation.loglikelihood import RowScores, ScoredIds, answer_scores, scoring_ahead
from qlora_jax.evaluation.metrics import Comparison, Measure, Progress, share, share_change
from qlora_jax.evaluation.statistics import (
    bootstrap,
    paired_bootstrap,
    stratified_bootstrap,
    stratified_paired_bootstrap,
)
from qlora_jax.evaluation.tasks.answers import AnswersTask
from qlora_jax.evaluation.tasks.choices import Choice, ChoiceScores, choice_scores, option_rows
from qlora_jax.inference.lowering import Ahead
from qlora_jax.inference.result_cache import Kept
from qlora_jax.models.partition import ModelParts


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

    @property
    def asked(self) -> list[list[Any]]:
        """Of each row, all that its score follows from beside the model."""
        return [[*row] for row in self.rows]

    def score(self, parts: ModelParts, progress: Progress, kept: Kept) -> RowScores:
        """The scores of one model."""
        return answer_scores(parts, self.rows, progress, kept)

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
        return [*_losses(scores), *(share(name, right) for name, right in hits.items())]

    def compare(self, before: RowScores, after: RowScores) -> list[Comparison]:
        """What changed from one model to another."""
        hits = {
            "begins with the answer": (before.begins, after.begins),
            "is exactly the answer": (before.exact, after.exact),
        }
        return [_loss_change(before, after), *(share_change(name, *pair) for name, pair in hits.items())]


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

    @property
    def asked(self) -> list[list[Any]]:
        """Of each question, all that its score follows from beside the model."""
        return [[choice.answer, *itertools.chain.from_iterable(choice.options)] for choice in self.choices]

    def score(self, parts: ModelParts, progress: Progress, kept: Kept) -> ChoiceScores:
        """The scores of one model."""
        return choice_scores(parts, self.choices, progress, kept)

    def ahead(self, parts: ModelParts) -> Iterator[Ahead]:
        """The programs of `score` that want most memory."""
        return scoring_ahead(parts, option_rows(self.choices))

    def measures(self, scores: ChoiceScores) -> list[Measure]:
        """What the scores say."""
        ties = int((scores.tied_by_sum | scores.tied_by_mean).sum())
        return [
            share("right by likelihood", scores.by_sum),
            share("right by likelihood a token", scores.by_mean),
            Measure("ties (counted as wrong)", "count", ties),
        ]

    def compare(self, before: ChoiceScores, after: ChoiceScores) -> list[Comparison]:
        """What changed from one model to another."""
        return [
            share_change("right by likelihood", before.by_sum, after.by_sum),
            share_change("right by likelihood a token", before.by_mean, after.by_mean),
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

    @property
    def asked(self) -> list[list[Any]]:
        """Of each question, all that its score follows from beside the model."""
        return [[one.ids, [*one.letters], one.answer] for one in self.questions]

    def score(self, parts: ModelParts, progress: Progress, kept: Kept) -> LetterScores:
        """The scores of one model."""
        return letter_scores(parts, self.questions, progress, kept)

    def ahead(self, parts: ModelParts) -> Iterator[Ahead]:
        """The programs of `score` that want most memory."""
        return letters_ahead(parts, self.questions)

    def measures(self, scores: LetterScores) -> list[Measure]:
        """What the scores say."""
        by_subject = []
        if self.subjects is not None:
            mean = mean_over_subjects(scores.right, self.subjects)
            interval = stratified_bootstrap(scores.right, self.subjects)
            by_subject = [Measure(self._over_subjects, "share", mean, interval)]
        ties = Measure("ties (counted as wrong)", "count", int(scores.tied.sum()))
        return [share("right by letter", scores.right), *by_subject, ties]

    def compare(self, before: LetterScores, after: LetterScores) -> list[Comparison]:
        """What changed from one model to another."""
        by_subject = []
        if self.subjects is not None:
            change = mean_over_subjects(after.right, self.subjects) - mean_over_subjects(before.right, self.subjects)
            interval = stratified_paired_bootstrap(before.right, after.right, self.subjects)
            by_subject = [Comparison(self._over_subjects, "share", change, interval)]
        return [share_change("right by letter", before.right, after.right), *by_subject]

    @property
    def _over_subjects(self) -> str:
        return f"mean over {len(set(self.subjects or ()))} subjects"


Task = TextTask | ChoiceTask | LettersTask | AnswersTask | HarnessTask


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
