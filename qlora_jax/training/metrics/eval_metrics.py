"""Evaluation results as the flat numbers of a metrics record, which trackers plot, and their inverse."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from qlora_jax.measures.metrics import Metric, perplexity
from qlora_jax.measures.statistics import bootstrap
from qlora_jax.training.metrics.metrics_file import Record

LOW, HIGH = "_low", "_high"  # suffixes of an interval's ends
LOSS = "eval_loss"
OBJECTIVE_ROWS = "eval_rows"  # in records whose loss is a mean over rows, not over tokens


class TaskMetric(NamedTuple):
    """A task's metric from 0 to 1, such as its share of right answers, with its 95 % confidence interval.

    Fields:
      name: its key in records.
      label: its name for readers.
      low, high: the ends of the interval.
    """

    name: str
    label: str
    value: float
    low: float
    high: float


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


def loss_interval(record: Record) -> tuple[float, float] | None:
    """Returns the interval of a record's held-out loss; None if it has none."""
    return (record[LOSS + LOW], record[LOSS + HIGH]) if LOSS + LOW in record else None


def _key(name: str) -> str:
    return re.sub(r"\W+", "_", name.partition(" (")[0])


def task_metrics(record: Record, task: str) -> list[TaskMetric]:
    """Returns the metrics of a task in a record, in order; the inverse of `flatten_metrics`."""
    names = [name for name in record if name.startswith(f"{task}_") and name + LOW in record]
    return [
        TaskMetric(
            name, name.removeprefix(f"{task}_").replace("_", " "), *(record[name + end] for end in ("", LOW, HIGH))
        )
        for name in names
    ]
