"""Scores side by side: as a table for people, and as plain data for files."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from qlora_jax.evaluation.metrics import Comparison, Measure
from qlora_jax.evaluation.tasks.task import Task


class Scored(NamedTuple):
    """A task, and its scores by column, in order."""

    task: Task
    scores: Mapping[str, Any]

    def measures(self) -> dict[str, list[Measure]]:
        """Each column's figures."""
        return {column: self.task.measures(scores) for column, scores in self.scores.items()}

    def comparisons(self) -> dict[tuple[str, str], list[Comparison]]:
        """What changed from each column to the next."""
        pairs = itertools.pairwise(self.scores)
        return {pair: self.task.compare(*(self.scores[column] for column in pair)) for pair in pairs}


def show(scored: Scored, labels: Mapping[str, str], console: Console) -> None:
    """Prints one task's figures, a column for each model, and below it what changed."""
    console.print(scored.task.title, style="bold", markup=False, highlight=False, soft_wrap=True)
    table = Table("", box=box.SIMPLE_HEAD)
    for column in scored.scores:
        table.add_column(labels[column], justify="right")
    for row in zip(*scored.measures().values(), strict=True):
        table.add_row(row[0].name, *(_measure_text(measure) for measure in row))
    console.print(table)
    for (before, after), comparisons in scored.comparisons().items():
        changes = "; ".join(_comparison_text(comparison) for comparison in comparisons)
        text = f"  {labels[before]} to {labels[after]}: {changes}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def as_data(scored: Scored) -> dict[str, Any]:
    """The same as plain dicts: figures by column, and the comparisons."""
    return {
        "title": scored.task.title,
        "columns": {
            column: {measure.name: _values(value=measure.value, interval=measure.interval) for measure in measures}
            for column, measures in scored.measures().items()
        },
        "comparisons": [
            {"from": before, "to": after, "measure": change.name}
            | _values(difference=change.difference, interval=change.interval, p=change.p)
            for (before, after), changes in scored.comparisons().items()
            for change in changes
        ],
    }


def _values(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _measure_text(measure: Measure) -> str:
    if measure.kind == "count":
        return f"{measure.value:.0f}"
    scale, unit, digits = (1, "", 3) if measure.kind == "number" else (100, " %", 1)
    ends = [f"{scale * end:.{digits}f}" for end in measure.interval or ()]
    return f"{scale * measure.value:.{digits}f}{unit}" + (f" [{', '.join(ends)}]" if ends else "")


def _comparison_text(change: Comparison) -> str:
    scale, unit, digits = (100, " points", 1) if change.kind == "share" else (1, "", 3)
    text = f"{change.name} {scale * change.difference:+.{digits}f}{unit}"
    if change.interval is not None:
        text += " [{:+.{d}f}, {:+.{d}f}]".format(*(scale * end for end in change.interval), d=digits)
    return text if change.p is None else f"{text} (p = {change.p:.2g})"
