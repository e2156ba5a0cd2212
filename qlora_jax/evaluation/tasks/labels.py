"""The task `labels`: classification by likelihood; the model's answer is the label whose text it finds likeliest.

Dimension key: R rows, K labels.
"""

import dataclasses
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from qlora_jax.config import QuestionArgs
from qlora_jax.config.question_settings import LabelScore
from qlora_jax.data.formats.columns import list_columns
from qlora_jax.data.readers.files import Place, raise_problems
from qlora_jax.evaluation.loglikelihood import ScoredIds, lower_scoring, score_rows
from qlora_jax.evaluation.task import ProgressCallback, TaskContext
from qlora_jax.evaluation.task_file import check_lengths, read_each, read_task_rows, values_of, wrong_value
from qlora_jax.evaluation.tasks import head_labels
from qlora_jax.evaluation.tasks.head_labels import HeadLabelsTask
from qlora_jax.evaluation.tasks.rows import encode_continuations
from qlora_jax.inference.lowering import LoweredProgram
from qlora_jax.inference.result_cache import ResultCache
from qlora_jax.measures.classification import (
    ClassMetric,
    class_change_interval,
    class_interval,
    count_pairs,
    f1,
    matthews,
)
from qlora_jax.measures.metrics import (
    Comparison,
    Metric,
    MetricKind,
    RowScores,
    RowValues,
    share,
    share_change,
    share_of_rows,
)
from qlora_jax.models.partition import ModelParts

WITHOUT_CONTENT = "N/A"  # stands for each column in the prompt that measures the labels' prior (Zhao et al. 2021)

Predicted = Int64[np.ndarray, " R"]  # index of the likeliest label; K, the number of labels, if several are likeliest


class LabelPrompt(NamedTuple):
    """A prompt with places for columns.

    Fields:
      pieces: texts, each followed by the column of the same index; the last by none.
    """

    pieces: tuple[str, ...]
    columns: tuple[str, ...]

    def fill(self, row: Mapping[str, object]) -> str:
        """Returns the prompt of a row; white space around values is removed.

        Raises:
          ValueError: the row lacks a column, or has one that is neither a text nor a number.
        """
        if missing := [name for name in self.columns if name not in row]:
            raise ValueError(f"label_prompt: no column {' or '.join(map(repr, missing))} (found {list_columns(row)})")
        for name in self.columns:
            if not isinstance(row[name], str) and type(row[name]) not in (int, float):
                raise wrong_value(name, row[name], "a text or a number")
        values = [str(row[name]).strip() for name in self.columns]
        return "".join(f"{piece}{value}" for piece, value in zip(self.pieces, [*values, ""], strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelsTask:
    """Accuracy, F1 and Matthews correlation of the likeliest labels; see evaluation/task.py for the members.

    Attributes:
      path, places: the file, and each row's place in it.
      labels: the text of each label.
      options: each row's labels as rows in which the label's tokens are scored.
      prior: the same after a prompt without content; None unless the score is calibrated.
      answers: the index of each row's right label.
    """

    title: str
    path: str
    places: Sequence[Place]
    labels: Sequence[str]
    options: Sequence[Sequence[ScoredIds]]
    prior: Sequence[ScoredIds] | None
    answers: Int64[np.ndarray, " R"]
    label_score: LabelScore
    name: str = "labels"

    @property
    def size(self) -> int:
        """The number of texts to score."""
        return len(self._rows)

    @property
    def inputs(self) -> Sequence[Sequence[object]]:
        """Each row's right label, and the ids of all labels, also after the prompt without content."""
        prior = [part for option in self.prior or () for part in option]
        ids = [[part for option in options for part in option] for options in self.options]
        return [[int(answer), *of_row, *prior] for answer, of_row in zip(self.answers, ids, strict=True)]

    def score(self, parts: ModelParts, progress: ProgressCallback, cache: ResultCache) -> Predicted:
        """Scores one model on each row.

        Raises:
          ValueError: likelihoods are not numbers; the message lists the rows.
        """
        scores = score_rows(parts, self._rows, progress, cache)
        likelihoods_RK = likelihoods(scores, len(self.labels), self.label_score)
        problem = "labels: a likelihood is not a number, so no label is likeliest. Check the model's weights"
        wrong = np.isnan(likelihoods_RK).any(axis=1)
        raise_problems(
            self.path, [(self.places[row], problem) for row in np.flatnonzero(wrong).tolist()], len(self.places)
        )
        return predict(likelihoods_RK)

    def metrics(self, scores: Predicted) -> list[Metric]:
        """Accuracy, F1, Matthews correlation, and the number of ties."""
        counts = count_pairs(self.answers, scores, len(self.labels))
        return [
            share("right label", scores == self.answers),
            *(
                Metric(name, kind, float(metric(counts)), class_interval(metric, counts))
                for name, kind, metric in self._class_metrics
            ),
            Metric("ties (counted as wrong)", "count", int((scores == len(self.labels)).sum())),
        ]

    def compare(self, before: Predicted, after: Predicted) -> list[Comparison]:
        """The changes of accuracy, F1 and Matthews correlation."""
        classes = len(self.labels)
        old, new = (count_pairs(self.answers, predicted, classes) for predicted in (before, after))
        return [
            share_change("right label", before == self.answers, after == self.answers),
            *(
                Comparison(
                    name,
                    kind,
                    float(metric(new)) - float(metric(old)),
                    class_change_interval(metric, self.answers, before, after, classes),
                )
                for name, kind, metric in self._class_metrics
            ),
        ]

    def row_values(self, scores: Predicted) -> dict[str, RowValues]:
        """The rows' parts of the measures in `MEASURES`."""
        return {"right label": share_of_rows(scores == self.answers)}

    def lower(self, parts: ModelParts) -> Iterator[LoweredProgram]:
        """Lowers the programs of the largest batches."""
        return lower_scoring(parts, self._rows)

    @property
    def _rows(self) -> list[ScoredIds]:
        """All labels of all rows, in order, and then those without content."""
        return [*(option for options in self.options for option in options), *(self.prior or ())]

    @property
    def _class_metrics(self) -> list[tuple[str, MetricKind, ClassMetric]]:
        of = repr(self.labels[-1]) if len(self.labels) == 2 else f"mean over {len(self.labels)} labels"
        return [(f"F1 ({of})", "share", f1), ("Matthews correlation", "number", matthews)]


def build(settings: QuestionArgs, context: TaskContext) -> LabelsTask | HeadLabelsTask:
    """Reads rows with a label: a text, a whole number, or true or false.

    A model with a sequence head is scored by the head, another by the likelihood of each label's text.

    Raises:
      ValueError: a model without a head, and no label_prompt and label_texts; the prompt is malformed; or rows lack
        columns, have other labels or are too long. The message lists them.
    """
    if context.head is not None:
        return head_labels.build(settings, context)
    if settings.label_prompt is None or settings.label_texts is None:
        raise ValueError(
            "labels: requires label_prompt and label_texts, because the model has no sequence head. Set them too"
        )
    assert settings.labels is not None
    path, texts, tokenizer, label_score = settings.labels, settings.label_texts, context.tokenizer, settings.label_score
    form, labels = parse_prompt(settings.label_prompt), [*texts.values()]
    rows = read_task_rows(path, "labels", settings.file_columns, settings.max_rows)
    answers = read_each(path, rows, lambda row: _label_index(row.data, [*texts]))
    prompts = read_each(path, rows, lambda row: form.fill(row.data))
    options = [encode_continuations(text, text, labels, tokenizer) for text in prompts]
    check_lengths(path, rows, options, context.max_positions)
    empty = form.fill(dict.fromkeys(form.columns, WITHOUT_CONTENT))
    return LabelsTask(
        title=f"{path}: {len(rows)} rows, {len(labels)} labels, by {label_score}",
        path=path,
        places=[row.place for row in rows],
        labels=labels,
        options=options,
        prior=encode_continuations(empty, empty, labels, tokenizer) if label_score == "calibrated" else None,
        answers=np.array(answers, np.int64),
        label_score=label_score,
    )


def parse_prompt(prompt: str) -> LabelPrompt:
    """Splits a prompt at its columns: {name}; {{ and }} stand for braces.

    Raises:
      ValueError: braces do not match, or no column is named.
    """
    try:
        parts = [*string.Formatter().parse(prompt)]
    except ValueError as error:
        raise _prompt_error(prompt, str(error)) from None
    if any(spec or conversion for _, _, spec, conversion in parts) or "" in [name for _, name, _, _ in parts]:
        raise _prompt_error(prompt, "not the name of a column in braces")
    pieces, text = [], ""
    for literal, name, _, _ in parts:
        text += literal
        if name is not None:
            pieces.append(text)
            text = ""
    columns = tuple(name for _, name, _, _ in parts if name is not None)
    if not columns:
        raise _prompt_error(prompt, "no column")
    return LabelPrompt((*pieces, text), columns)


def _prompt_error(prompt: str, problem: str) -> ValueError:
    return ValueError(
        f"label_prompt: {problem} (found {prompt!r}, expected columns such as {{text}}). Write {{{{ for a brace"
    )


def likelihoods(scores: RowScores, labels: int, label_score: LabelScore) -> Float64[np.ndarray, "R K"]:
    """Returns the score of each label of each row: the largest is predicted.

    Args:
      scores: scores of all labels of all rows, in order; if calibrated, those without content follow.
      label_score: "sum": log p of the label's tokens; "mean": divided by their number; "calibrated": the sum minus
        that after the prompt without content.
    """
    log_p = -scores.nll / scores.tokens if label_score == "mean" else -scores.nll
    log_p_RK = log_p.reshape(-1, labels)
    return log_p_RK[:-1] - log_p_RK[-1] if label_score == "calibrated" else log_p_RK


def predict(likelihoods_RK: Float64[np.ndarray, "R K"]) -> Predicted:
    """Returns the index of the largest value of each row, and K if several values are largest."""
    is_best_RK = likelihoods_RK == likelihoods_RK.max(axis=1, keepdims=True)
    tied_R = is_best_RK.sum(axis=1) > 1
    return np.where(tied_R, likelihoods_RK.shape[1], is_best_RK.argmax(axis=1)).astype(np.int64)


def _label_index(columns: Mapping[str, object], labels: Sequence[str]) -> int:
    (value,) = values_of(columns, ["label"])
    text = str(value).lower() if isinstance(value, bool) else str(value) if type(value) is int else value
    if text not in labels:
        raise wrong_value("label", value, f"one of label_texts: {', '.join(map(repr, labels))}")
    return labels.index(str(text))
