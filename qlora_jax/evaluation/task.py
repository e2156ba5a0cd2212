"""Defines the interface of an evaluation task.

To add a task:

1. Write a class with the members of `Task` in a new file next to this one, and a function
   `build(settings, context) -> Task` that reads the task's file.
2. Add one line to the table in registry.py: the setting that names the task's input, and `build`.
3. Declare the setting: in QuestionArgs (config/question_settings.py) if training runs may ask it at each evaluation,
   otherwise in TaskArgs (evaluation/settings.py).

To compare several runs on the task (docs/compare.md), add `row_values` and a line in `MEASURES`.

choices.py is a short example.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from qlora_jax.config.objectives import OBJECTIVES
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference.lowering import LoweredProgram
from qlora_jax.inference.result_cache import ResultCache
from qlora_jax.measures.metrics import Comparison, Metric, RowValues
from qlora_jax.models.partition import ModelParts
from qlora_jax.objectives.head_objective import TrainedHead

ProgressCallback = Callable[[int], None]  # called with the number of rows done so far


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskContext:
    """Properties of the model that a task needs to turn its file into token ids.

    Attributes:
      tokenizer: without a chat template if questions are plain text.
      max_positions: maximum tokens of a row.
      stop_ids: ids that end a reply according to the model's files.
      head: the model's sequence head, if it has one.
    """

    tokenizer: Tokenizer
    max_positions: int
    stop_ids: Collection[int] = ()
    head: TrainedHead | None = None


@runtime_checkable
class Task[Scores](Protocol):
    """Scores a model on the rows of one file, and turns the scores into metrics.

    `Scores` is the task's own type: usually a dataclass with one array per kind of score and one element per row, so
    that two models can be compared row by row.
    """

    @property
    def name(self) -> str:
        """The setting that names the task's input, and the task's key in stored metrics."""
        ...

    @property
    def title(self) -> str:
        """One line for people: the file, and how many rows are scored."""
        ...

    @property
    def size(self) -> int | None:
        """The number of rows that `score` reports as done at the end; None if unknown before scoring."""
        ...

    @property
    def inputs(self) -> Sequence[Sequence[object]]:
        """For each row, everything but the model that its score depends on, such as token ids and the right answer.

        Two runs are comparable if their tasks have equal inputs.
        """
        ...

    def score(self, parts: ModelParts, progress: ProgressCallback, cache: ResultCache) -> Scores:
        """Scores one model; `cache` returns the results of batches that were scored before."""
        ...

    def metrics(self, scores: Scores) -> list[Metric]:
        """The metrics of one model, with confidence intervals."""
        ...

    def compare(self, before: Scores, after: Scores) -> list[Comparison]:
        """The changes from one model to another, with paired tests."""
        ...

    def lower(self, parts: ModelParts) -> Iterator[LoweredProgram]:
        """Lowers the programs of `score` that need the most memory; `parts` may be ShapeDtypeStructs.

        A training run reserves this memory. Yield nothing if the task is never asked during training.
        """
        ...


@runtime_checkable
class PreparedTask(Protocol):
    """A task with work to do once, before a model is loaded, such as downloading a data set."""

    def prepare(self, report: Callable[[str], object]) -> None:
        """Prepares the task; `report` is called with lines for people.

        Raises:
          ValueError: the task cannot be scored.
        """
        ...


@runtime_checkable
class RowValuesTask[Scores](Protocol):
    """A task whose measures in `MEASURES` can be compared row by row over several runs."""

    def row_values(self, scores: Scores) -> dict[str, RowValues]:
        """The parts of each of these measures that the rows contribute, by the measure's name."""
        ...


@runtime_checkable
class ReferenceTask[Scores](Protocol):
    """A task that also compares a run with its reference, the model before its training."""

    def score_with_reference(
        self, parts: ModelParts, reference: ModelParts, progress: ProgressCallback, cache: ResultCache
    ) -> Scores:
        """Scores a run together with its reference; `cache` has results of both."""
        ...


@runtime_checkable
class DetailedTask[Scores](Protocol):
    """A task with results for programs beside its metrics, such as a confusion matrix."""

    def details(self, scores: Scores) -> dict[str, object]:
        """Plain dicts, lists, texts and numbers, for the file of `--json`; empty if there are none."""
        ...


AnyTask = Task[Any]  # lists contain tasks with different types of scores


Better = Literal["higher", "lower"]

# By the setting that names a task's file, then by measure. A task with an entry here has `row_values` (task.py).
MEASURES: dict[str, dict[str, Better]] = {
    "text": {"loss per token": "lower"},
    "rows": {"loss per token": "lower", "begins with the answer": "higher", "is exactly the answer": "higher"},
    "choices": {"right by likelihood": "higher", "right by likelihood per token": "higher"},
    "letters": {"right by letter": "higher"},
    "labels": {"right label": "higher"},
    "pairs": {
        "right by reward": "higher",
        "reward margin": "higher",
        "right by likelihood": "higher",
        "right by likelihood per token": "higher",
    },
    "answers": {"exactly the answer": "higher"},
    "programs": {"pass@1": "higher"},
}


def measures_of(objective: str) -> dict[str, tuple[str, ...]]:
    """Returns the measures of a run with this objective, by task."""
    declared = OBJECTIVES[objective]
    if not declared.head:
        return {task: tuple(measures) for task, measures in MEASURES.items()}
    return {declared.task: declared.measures} if declared.measures else {}
