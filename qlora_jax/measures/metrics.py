"""Metrics of one model, with intervals, and comparisons of a metric between two models.

Dimension key: R rows, S bootstrap samples.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from qlora_jax.measures.statistics import bootstrap, mcnemar, paired_bootstrap, resample_counts, wilson_interval

# A share is from 0 to 1 and shown as a percentage.
MetricKind = Literal["share", "number", "count"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowScores:
    """Scores of each row's scored tokens.

    Fields:
      nll: sum of their -log p, in nats.
      tokens: their number.
      exact: True if each is the likeliest token after those before it, so greedy decoding generates exactly them.
      begins: the same without the last one, the end-of-turn token of an answer, so greedy decoding begins with them.
    """

    nll: Float64[np.ndarray, " rows"]
    tokens: Int64[np.ndarray, " rows"]
    exact: Bool[np.ndarray, " rows"]
    begins: Bool[np.ndarray, " rows"]

    @property
    def mean_nll(self) -> float:
        """The mean of -log p over all scored tokens of all rows, in nats."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """exp(mean_nll)."""
        return math.exp(self.mean_nll)

    def of(self, rows: Int64[np.ndarray, " some"]) -> "RowScores":
        """The scores of some rows, by index."""
        return RowScores(nll=self.nll[rows], tokens=self.tokens[rows], exact=self.exact[rows], begins=self.begins[rows])


class Metric(NamedTuple):
    """One metric of one model.

    Fields:
      interval: 95 % confidence interval, or None.
    """

    name: str
    kind: MetricKind
    value: float
    interval: tuple[float, float] | None = None


class Comparison(NamedTuple):
    """The change of a metric from one model to another, scored on the same rows.

    Fields:
      interval: 95 % confidence interval of the difference (paired bootstrap over rows), or None.
      p: p-value of the hypothesis that both models are equally good (McNemar's exact test), or None.
    """

    name: str
    kind: MetricKind
    difference: float
    interval: tuple[float, float] | None = None
    p: float | None = None


class RowValues(NamedTuple):
    """The parts of a metric that each row contributes; the metric is the sum of `values` over the sum of `weights`."""

    values: Float64[np.ndarray, " rows"]
    weights: Float64[np.ndarray, " rows"]


def share_of_rows(right: Bool[np.ndarray, " rows"]) -> RowValues:
    """Each row's part of a share: 1 if it is right, with a weight of 1."""
    return RowValues(right.astype(np.float64), np.ones(len(right)))


def loss_of_rows(scores: RowScores) -> RowValues:
    """Each row's part of the loss per token: its -log p, weighted by its number of tokens."""
    return RowValues(scores.nll, scores.tokens.astype(np.float64))


def share(name: str, right: Bool[np.ndarray, " rows"]) -> Metric:
    """The share of rows that are right, with its Wilson interval."""
    return Metric(name, "share", float(right.mean()), wilson_interval(int(right.sum()), len(right)))


def share_change(name: str, before: Bool[np.ndarray, " rows"], after: Bool[np.ndarray, " rows"]) -> Comparison:
    """The change of the share of rows that are right, with McNemar's p-value."""
    return Comparison(name, "share", float(after.mean() - before.mean()), p=mcnemar(before, after))


def loss_metrics(scores: RowScores) -> list[Metric]:
    """The perplexity, and the loss in nats per token; each scored token has the same weight."""
    low, high = interval = bootstrap(scores.nll, scores.tokens)
    perplexities = perplexity(low), perplexity(high)
    return [
        Metric("perplexity", "number", scores.perplexity, perplexities),
        Metric("loss per token", "number", scores.mean_nll, interval),
    ]


def perplexity(loss: float) -> float:
    """Returns exp(loss), infinite if it overflows a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def loss_change(before: RowScores, after: RowScores) -> Comparison:
    """The change of the loss, in nats per token."""
    interval = paired_bootstrap(before.nll, after.nll, after.tokens)
    return Comparison("loss per token", "number", after.mean_nll - before.mean_nll, interval=interval)


Draws = Float64[np.ndarray, "S R"]  # how often each row occurs in each sample
Statistic = Callable[[Draws], Float64[np.ndarray, " S"]]


def bootstrapped(name: str, statistic: Statistic, rows: int, kind: str = "number") -> Metric:
    """Returns a metric with its bootstrap interval."""
    (value,) = statistic(np.ones((1, rows)))
    samples = np.concatenate([statistic(draws.astype(np.float64)) for draws in resample_counts(rows)])
    low, high = np.quantile(samples, (0.025, 0.975))
    return Metric(name, "share" if kind == "share" else "number", float(value), (float(low), float(high)))
