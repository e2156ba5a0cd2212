"""What a task says of one model, and of two."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from qlora_jax.evaluation.statistics import mcnemar, wilson_interval

Progress = Callable[[int], None]


class Measure(NamedTuple):
    """One figure of one model.

    Fields:
      kind: "share" (from 0 to 1), "number", or "count".
      interval: 95 %, or None.
    """

    name: str
    kind: str
    value: float
    interval: tuple[float, float] | None = None


class Comparison(NamedTuple):
    """A figure's change from one model to another, scored on the same rows.

    Fields:
      interval: 95 % of the difference (paired bootstrap over rows), or None.
      p: that the two are equally good (McNemar, exact), or None.
    """

    name: str
    kind: str
    difference: float
    interval: tuple[float, float] | None = None
    p: float | None = None


def share(name: str, right: Bool[np.ndarray, " rows"]) -> Measure:
    """How many rows are right."""
    return Measure(name, "share", float(right.mean()), wilson_interval(int(right.sum()), len(right)))


def share_change(name: str, before: Bool[np.ndarray, " rows"], after: Bool[np.ndarray, " rows"]) -> Comparison:
    """The same of two models, in pairs."""
    return Comparison(name, "share", float(after.mean() - before.mean()), p=mcnemar(before, after))
