"""The task `labels` for a run that trained a head: classes, several labels at once, or numbers.

Dimension key: R rows, C outputs of the head.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from qlora_jax.config import QuestionArgs
from qlora_jax.config.objectives import OBJECTIVES, ValueKind
from qlora_jax.evaluation.heads.metrics import RIGHT, class_details, class_metrics, multi_label_metrics, number_metrics
from qlora_jax.evaluation.heads.rows import HeadRows, head_of_task, lower_outputs, read_head_rows
from qlora_jax.evaluation.task import ProgressCallback, TaskContext
from qlora_jax.inference.lowering import LoweredProgram
from qlora_jax.inference.result_cache import ResultCache
from qlora_jax.measures.metrics import Comparison, Metric, RowValues, share_change, share_of_rows
from qlora_jax.models.partition import ModelParts
from qlora_jax.objectives.head_objective import TrainedHead

OF_LIKELIHOOD = ("label_prompt", "label_texts", "label_score")  # settings of scoring without a head

Outputs = Float64[np.ndarray, "R C"]
Answers = Float64[np.ndarray, "R _"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadLabelsTask:
    """Metrics of a head's outputs for texts with labels; see evaluation/task.py for the members.

    Attributes:
      rows: the texts, one of each row.
      answers: the index of each text's class, its number, or 1 for each label that applies, [R, 1] or [R, C].
    """

    title: str
    head: TrainedHead
    rows: HeadRows
    answers: Answers
    name: str = "labels"

    @property
    def size(self) -> int:
        """The number of texts."""
        return len(self.rows.texts)

    @property
    def inputs(self) -> Sequence[Sequence[object]]:
        """Each text's ids and its label."""
        return [[ids, answer] for ids, answer in zip(self.rows.texts, self.answers, strict=True)]

    def score(self, parts: ModelParts, progress: ProgressCallback, cache: ResultCache) -> Outputs:
        """Returns the head's outputs for each text; raises ValueError if some are not finite."""
        return self.rows.outputs(parts, progress, cache)[:, 0]

    def metrics(self, scores: Outputs) -> list[Metric]:
        """The metrics of the head's objective."""
        return self.form.metrics(self.head, scores, self.answers)

    def compare(self, before: Outputs, after: Outputs) -> list[Comparison]:
        """The change of the share of right rows; none for numbers."""
        right = self.form.right
        return [] if right is None else [share_change(RIGHT, *(right(one, self.answers) for one in (before, after)))]

    def row_values(self, scores: Outputs) -> dict[str, RowValues]:
        """The rows' parts of the measures in `MEASURES`; numbers are neither right nor wrong."""
        right = self.form.right
        return {} if right is None else {RIGHT: share_of_rows(right(scores, self.answers))}

    def details(self, scores: Outputs) -> dict[str, object]:
        """The confusion matrix and the reliability diagram of classes."""
        return self.form.details(self.head, scores, self.answers)

    @property
    def form(self) -> "LabelForm":
        """The form of the labels."""
        return form_of_labels(self.head)

    def lower(self, parts: ModelParts) -> Iterator[LoweredProgram]:
        """Lowers the program of the largest batch."""
        return lower_outputs(parts, self.rows.texts)


class LabelForm(NamedTuple):
    """The measures of labels of one form: a class, several labels, or a number.

    Fields:
      metrics: (head, outputs, answers) -> the metrics.
      right: (outputs, answers) -> True for rows whose labels are right, [R]; None: numbers are neither.
      details: (head, outputs, answers) -> tables for report.json.
    """

    metrics: Callable[[TrainedHead, Outputs, Answers], list[Metric]]
    right: Callable[[Outputs, Answers], np.ndarray] | None
    details: Callable[[TrainedHead, Outputs, Answers], dict[str, object]] = lambda head, outputs, answers: {}


FORMS: dict[ValueKind, LabelForm] = {
    "class": LabelForm(
        lambda head, outputs, answers: class_metrics(outputs, answers[:, 0].astype(np.int64), head.labels),
        lambda outputs, answers: outputs.argmax(axis=1) == answers[:, 0],
        lambda head, outputs, answers: class_details(outputs, answers[:, 0].astype(np.int64), head.labels),
    ),
    "classes": LabelForm(
        lambda head, outputs, answers: multi_label_metrics(outputs, answers > 0),
        lambda outputs, answers: ((outputs > 0) == (answers > 0)).all(axis=1),
    ),
    "number": LabelForm(lambda head, outputs, answers: number_metrics(outputs[:, 0], answers[:, 0]), None),
}


def form_of_labels(head: TrainedHead) -> LabelForm:
    """Returns the form of the labels that a head predicts."""
    return FORMS[OBJECTIVES[head.objective].values]


def build(settings: QuestionArgs, context: TaskContext) -> HeadLabelsTask:
    """Builds the task that the settings describe.

    Raises:
      ValueError: the head's outputs are not labels, or settings of scoring by likelihood are given.
    """
    assert settings.labels is not None
    head = head_of_task(context, "labels", tuple(n for n, each in OBJECTIVES.items() if each.task == "labels"))
    plain = QuestionArgs()
    if given := [name for name in OF_LIKELIHOOD if getattr(settings, name) != getattr(plain, name)]:
        raise ValueError(
            f"{', '.join(given)}: the run's head scores whole texts (found a head of objective={head.objective}). "
            "Remove these settings"
        )
    rows = read_head_rows(settings.labels, settings, context)
    answers = np.array([np.reshape(values["labels"], -1) for values in rows.values], np.float64)
    outputs = f"{len(head.labels)} labels" if head.labels else "numbers"
    title = f"{settings.labels}: {len(answers)} rows, {outputs}, by the run's head"
    return HeadLabelsTask(title=title, head=head, rows=rows, answers=answers)
