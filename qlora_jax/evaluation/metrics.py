"""Metrics of one model, and comparisons of a metric between two models."""

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

from qlora_jax.evaluation.loglikelihood import RowScores
from qlora_jax.evaluation.statistics import bootstrap, mcnemar, paired_bootstrap, wilson_interval

# A share is from 0 to 1 and shown as a percentage.
MetricKind = Literal["share", "number", "count"]


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
