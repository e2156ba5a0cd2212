"""What an evaluation finds, as the flat numbers of a record, which trackers draw; and back again."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from qlora_jax.evaluation.metrics import Metric
from qlora_jax.evaluation.statistics import bootstrap

LOW, HIGH = "_low", "_high"  # ends of names: of an interval
LOSS = "eval_loss"


class TaskMetric(NamedTuple):
    """A share of right answers, from 0 to 1, with its 95 % interval.

    Fields:
      name: its key in records; `words`: what it is a share of.
    """

    name: str
    words: str
    value: float
    low: float
    high: float


def flatten_metrics(task: str, measures: Sequence[Metric]) -> dict[str, float]:
    """Each measure by its task and name; of one with an interval also its ends.

    `letters`, "right by letter" is letters_right_by_letter, letters_right_by_letter_low, letters_right_by_letter_high;
    what a name has in brackets is left out.
    """
    found: dict[str, float] = {}
    for measure in measures:
        name = f"{task}_{_key(measure.name)}"
        found[name] = measure.value
        if measure.interval is not None:
            found[name + LOW], found[name + HIGH] = measure.interval
    return found


def eval_loss_metrics(nll: Float64[np.ndarray, " rows"], tokens: Int64[np.ndarray, " rows"]) -> dict[str, float]:
    """The loss of rows, every token weighing the same, and its perplexity; the ends of an interval where all is finite.

    Args:
      nll: each row's sum of -log p over its `tokens`.
    """
    loss = float(nll.sum() / tokens.sum())
    found = {LOSS: loss, "eval_perplexity": perplexity(loss), "eval_tokens": int(tokens.sum())}
    if math.isfinite(loss):
        found[LOSS + LOW], found[LOSS + HIGH] = bootstrap(nll, tokens)
    return found


def loss_interval(record: Mapping[str, Any]) -> tuple[float, float] | None:
    """The interval of a record's held-out loss; None where it has none."""
    return (record[LOSS + LOW], record[LOSS + HIGH]) if LOSS + LOW in record else None


def _key(name: str) -> str:
    return re.sub(r"\W+", "_", name.partition(" (")[0])


def task_metrics(record: Mapping[str, Any], task: str) -> list[TaskMetric]:
    """The shares of a task that a record has, in order."""
    names = [name for name in record if name.startswith(f"{task}_") and name + LOW in record]
    return [
        TaskMetric(
            name, name.removeprefix(f"{task}_").replace("_", " "), *(record[name + end] for end in ("", LOW, HIGH))
        )
        for name in names
    ]


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is more than a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
