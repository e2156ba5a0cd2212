"""The task `choices`: multiple choice by likelihood; the model's answer is the option that it finds likeliest."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Bool

from qlora_jax.config import QuestionArgs
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.loglikelihood import ScoredIds, lower_scoring, score_rows
from qlora_jax.evaluation.task import ProgressCallback, TaskContext
from qlora_jax.evaluation.task_file import check_lengths, read_each, read_task_rows
from qlora_jax.evaluation.tasks.question_rows import Question, read_question
from qlora_jax.evaluation.tasks.rows import encode_continuations
from qlora_jax.inference.lowering import LoweredProgram
from qlora_jax.inference.result_cache import NO_CACHE, ResultCache
from qlora_jax.measures.metrics import Comparison, Metric, RowValues, share, share_change, share_of_rows
from qlora_jax.models.partition import ModelParts


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceQuestion:
    """One question: its options as rows in which the option's tokens are scored, and the index of the right one."""

    options: Sequence[ScoredIds]
    answer: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceScores:
    """The questions that a model has right, by the sum of log p of each option's tokens, and by its mean.

    A question is right if the right option is likelier than every other. If it shares first place, the question is tied
    and not right.
    """

    by_sum: Bool[np.ndarray, " questions"]
    tied_by_sum: Bool[np.ndarray, " questions"]
    by_mean: Bool[np.ndarray, " questions"]
    tied_by_mean: Bool[np.ndarray, " questions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoicesTask:
    """Share of questions whose likeliest option is right; see evaluation/task.py for the members."""

    title: str
    choices: Sequence[ChoiceQuestion]
    name: str = "choices"

    @property
    def size(self) -> int:
        """The number of options of all questions."""
        return sum(len(choice.options) for choice in self.choices)

    @property
    def inputs(self) -> Sequence[Sequence[object]]:
        """Each question's right option, and the ids of all options."""
        return [[choice.answer, *itertools.chain.from_iterable(choice.options)] for choice in self.choices]

    def score(self, parts: ModelParts, progress: ProgressCallback, cache: ResultCache) -> ChoiceScores:
        """Scores one model on each question."""
        return score_choices(parts, self.choices, progress, cache)

    def metrics(self, scores: ChoiceScores) -> list[Metric]:
        """Both shares of right answers, and the number of ties."""
        ties = int((scores.tied_by_sum | scores.tied_by_mean).sum())
        return [
            share("right by likelihood", scores.by_sum),
            share("right by likelihood per token", scores.by_mean),
            Metric("ties (counted as wrong)", "count", ties),
        ]

    def compare(self, before: ChoiceScores, after: ChoiceScores) -> list[Comparison]:
        """The changes of both shares."""
        return [
            share_change("right by likelihood", before.by_sum, after.by_sum),
            share_change("right by likelihood per token", before.by_mean, after.by_mean),
        ]

    def row_values(self, scores: ChoiceScores) -> dict[str, RowValues]:
        """The rows' parts of the measures in `MEASURES`."""
        return {
            "right by likelihood": share_of_rows(scores.by_sum),
            "right by likelihood per token": share_of_rows(scores.by_mean),
        }

    def lower(self, parts: ModelParts) -> Iterator[LoweredProgram]:
        """Lowers the programs of the largest batches."""
        return lower_scoring(parts, _options(self.choices))


def build(settings: QuestionArgs, context: TaskContext) -> ChoicesTask:
    """Builds the task that the settings describe."""
    assert settings.choices is not None
    return choices_task(
        settings.choices,
        context.tokenizer,
        max_rows=settings.max_rows,
        max_positions=context.max_positions,
        file_columns=settings.file_columns,
    )


def choices_task(
    path: str,
    tokenizer: Tokenizer,
    *,
    max_rows: int | None,
    max_positions: int,
    file_columns: Mapping[str, str] | None = None,
) -> ChoicesTask:
    """Reads the questions of a file; each option is scored as the reply to the question.

    Args:
      file_columns: see `task_file.read_task_rows`.

    Raises:
      ValueError: rows that are not questions, or too long for the model; the message lists them.
    """
    rows = read_task_rows(path, "choices", file_columns, max_rows)
    questions = read_each(path, rows, lambda row: read_question(row.data))
    options = read_each(path, rows, lambda row: _encode_options(read_question(row.data), tokenizer))
    check_lengths(path, rows, options, max_positions)
    choices = [
        ChoiceQuestion(options=encoded, answer=question.answer)
        for encoded, question in zip(options, questions, strict=True)
    ]
    return ChoicesTask(title=f"{path}: {len(choices)} questions", choices=choices)


def score_choices(
    parts: ModelParts,
    choices: Sequence[ChoiceQuestion],
    progress: Callable[[int], None] = lambda options_done: None,
    cache: ResultCache = NO_CACHE,
) -> ChoiceScores:
    """Scores each question; `progress` is called with the number of options scored so far."""
    scores = score_rows(parts, _options(choices), progress, cache)
    starts = np.cumsum([len(choice.options) for choice in choices])[:-1]
    sums, means = np.split(-scores.nll, starts), np.split(-scores.nll / scores.tokens, starts)
    answers = [choice.answer for choice in choices]
    (by_sum, tied_by_sum), (by_mean, tied_by_mean) = _grade(sums, answers), _grade(means, answers)
    return ChoiceScores(by_sum=by_sum, tied_by_sum=tied_by_sum, by_mean=by_mean, tied_by_mean=tied_by_mean)


def _options(choices: Sequence[ChoiceQuestion]) -> list[ScoredIds]:
    """All options of all questions, in order."""
    return [option for choice in choices for option in choice.options]


def _grade(likelihoods: Sequence[np.ndarray], answers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(right, tied) of each question, given the likelihoods of its options."""
    lead = np.array([x[answer] - np.delete(x, answer).max() for x, answer in zip(likelihoods, answers, strict=True)])
    return lead > 0, lead == 0


def _encode_options(question: Question, tokenizer: Tokenizer) -> list[ScoredIds]:
    plain_prompt = f"Question: {question.prompt}\nAnswer:"
    return encode_continuations(question.prompt, plain_prompt, question.options, tokenizer)
