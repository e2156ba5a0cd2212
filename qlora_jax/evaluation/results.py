"""Results of an evaluation: metrics by task and model, comparisons between models, and tables of both."""

import dataclasses
import io
import itertools
from collections.abc import Mapping

import rich.console
from rich import box
from rich.table import Table

from qlora_jax.evaluation.task import DetailedTask, RowValuesTask, Task
from qlora_jax.measures.metrics import Comparison, Metric, RowValues
from qlora_jax.terminal.console import Console

# How often 95 % intervals of means contained the truth in scripts/interval_coverage.py, by the least number of rows.
COVERAGE = {100: None, 32: "84 to 95 %", 16: "85 to 94 %", 8: "84 to 94 %", 1: "67 to 90 %"}
WIDTH = 120  # columns of a table, unless a terminal prints it


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Metrics and comparisons of one task.

    Attributes:
      title: one line that describes the task.
      metrics: each model's metrics by name: {"checkpoint": {"perplexity": Metric(...)}}.
      comparisons: the changes from each model to the next: {("quantized", "checkpoint"): [Comparison(...)]}.
      rows: the rows' parts of each model's metrics, by name; empty for tasks without them (`MEASURES`).
      details: further results of each model for programs, such as a confusion matrix; empty for most tasks.
    """

    title: str
    metrics: dict[str, dict[str, Metric]]
    comparisons: dict[tuple[str, str], list[Comparison]]
    rows: dict[str, dict[str, RowValues]] = dataclasses.field(default_factory=dict)
    details: dict[str, dict[str, object]] = dataclasses.field(default_factory=dict)

    def rows_to_dict(self) -> dict[str, object]:
        """Converts `rows` to plain dicts and lists, as in the file of `--json` with `--json_rows`."""
        return {
            model: {name: {"values": one.values.tolist(), "weights": one.weights.tolist()} for name, one in by.items()}
            for model, by in self.rows.items()
        }

    def to_dict(self) -> dict[str, object]:
        """Converts the metrics to plain dicts, lists, texts and numbers, as in the file of `--json`."""
        further: dict[str, object] = {"details": self.details} if self.details else {}
        return further | {
            "title": self.title,
            "columns": {
                model: {name: _given(value=metric.value, interval=metric.interval) for name, metric in metrics.items()}
                for model, metrics in self.metrics.items()
            },
            "comparisons": [
                {"from": before, "to": after, "measure": change.name}
                | _given(difference=change.difference, interval=change.interval, p=change.p)
                for (before, after), changes in self.comparisons.items()
                for change in changes
            ],
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results of one or several models on one or several tasks; `str()` gives the tables that `evaluate` prints.

    Attributes:
      labels: a description of each model, in order.
      tasks: the result of each task by its name, such as "text" or "choices".
    """

    labels: dict[str, str]
    tasks: dict[str, TaskResult]

    def to_dict(self, *, rows: bool = False) -> dict[str, object]:
        """Converts the results to plain dicts, lists, texts and numbers, as in the file of `--json`.

        Args:
          rows: include the rows' parts of the metrics.
        """
        tasks = {
            name: result.to_dict() | ({"rows": result.rows_to_dict()} if rows else {})
            for name, result in self.tasks.items()
        }
        return {"labels": self.labels, "tasks": tasks}

    def __str__(self) -> str:
        """The tables as text."""
        out = io.StringIO()
        print_tables(self, Console(file=out, width=WIDTH))
        return out.getvalue()


def task_result[Scores](task: Task[Scores], scores: Mapping[str, Scores]) -> TaskResult:
    """Turns the scores of each model, in order, into metrics, and compares each model with the next."""
    return TaskResult(
        title=task.title,
        metrics={model: {metric.name: metric for metric in task.metrics(one)} for model, one in scores.items()},
        comparisons={
            (before, after): task.compare(scores[before], scores[after]) for before, after in itertools.pairwise(scores)
        },
        rows={model: task.row_values(one) for model, one in scores.items()} if isinstance(task, RowValuesTask) else {},
        details={model: found for model, one in scores.items() if (found := task.details(one))}
        if isinstance(task, DetailedTask)
        else {},
    )


def print_tables(evaluation: Evaluation, console: rich.console.Console) -> None:
    """Prints a table per task."""
    for result in evaluation.tasks.values():
        print_table(result, evaluation.labels, console)


def print_table(result: TaskResult, labels: Mapping[str, str], console: rich.console.Console) -> None:
    """Prints one task's metrics, a column per model, followed by the comparisons."""
    console.print(result.title, style="bold", markup=False, highlight=False, soft_wrap=True)
    table = Table("", box=box.SIMPLE_HEAD)
    for model in result.metrics:
        table.add_column(labels[model], justify="right")
    for name in max(result.metrics.values(), key=len):  # a base has no metrics that need a reference
        found = (metrics.get(name) for metrics in result.metrics.values())
        table.add_row(name, *("" if metric is None else _metric_text(metric) for metric in found))
    console.print(table)
    if note := _few_rows_note(result):
        console.print(f"  {note}", markup=False, highlight=False, soft_wrap=True)
    for (before, after), comparisons in result.comparisons.items():
        changes = "; ".join(_comparison_text(comparison) for comparison in comparisons)
        text = f"  {labels[before]} to {labels[after]}: {changes}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _few_rows_note(result: TaskResult) -> str | None:
    """Returns how often intervals of means over so few rows contain the truth; None for enough rows, or no means."""
    means = {name for by in result.metrics.values() for name, one in by.items() if one.kind == "number"}
    rows = min((len(one.values) for by in result.rows.values() for name, one in by.items() if name in means), default=0)
    covered = next((share for least, share in COVERAGE.items() if rows > 0 and least <= rows), None)
    return (
        covered and f"{rows} rows: in simulations, 95 % intervals of means over so few contained the truth in {covered}"
    )


def _given(**values: object) -> dict[str, object]:
    """The values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def _metric_text(metric: Metric) -> str:
    if metric.kind == "count":
        return f"{metric.value:.0f}"
    scale, unit, digits = (1, "", 3) if metric.kind == "number" else (100, " %", 1)
    ends = [f"{scale * end:.{digits}f}" for end in metric.interval or ()]
    return f"{scale * metric.value:.{digits}f}{unit}" + (f" [{', '.join(ends)}]" if ends else "")


def _comparison_text(change: Comparison) -> str:
    scale, unit, digits = (100, " points", 1) if change.kind == "share" else (1, "", 3)
    text = f"{change.name} {scale * change.difference:+.{digits}f}{unit}"
    if change.interval is not None:
        text += " [{:+.{d}f}, {:+.{d}f}]".format(*(scale * end for end in change.interval), d=digits)
    return text if change.p is None else f"{text} (p = {change.p:.2g})"
