"""Compares two models by the harness' results of each document."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

import numpy as np
from jaxtyping import Float64

from qlora_jax.measures.metrics import Comparison, MetricKind
from qlora_jax.measures.statistics import mcnemar, paired_bootstrap_of

Documents = Float64[np.ndarray, "documents 2"]  # a metric's value and weight of each document
MetricOfMean = Callable[[np.ndarray], np.ndarray]

# The harness' function from (sum of values) / (sum of weights) to the metric; for other metrics it is the identity.
METRIC_OF_MEAN: dict[str, MetricOfMean] = {
    "perplexity": lambda mean: np.exp(-mean),
    "word_perplexity": lambda mean: np.exp(-mean),
    "byte_perplexity": lambda mean: np.exp(-mean),
    "bits_per_byte": lambda mean: -mean / math.log(2),
}


def by_document(samples: Sequence[Mapping[str, object]]) -> dict[str, Documents]:
    """Returns the values of each document, in order, by "metric,filter".

    Metrics whose values are not numbers are dropped.

    Args:
      samples: the harness' logged samples.
    """
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for sample in samples:
        head = _head(sample)
        for metric in head["metrics"]:
            if (pair := _value_and_weight(sample[metric])) is not None:
                found.setdefault(f"{metric},{head['filter']}", {})[head["doc_id"]] = pair
    return {key: np.array([each[doc] for doc in sorted(each)], np.float64) for key, each in found.items()}


class _Head(TypedDict):
    """The fixed keys of a logged sample; each metric is another key."""

    doc_id: int
    filter: str
    metrics: Sequence[str]


def _head(sample: Mapping[str, object]) -> _Head:
    doc_id, name, metrics = sample["doc_id"], sample["filter"], sample["metrics"]
    assert isinstance(doc_id, int) and isinstance(name, str) and isinstance(metrics, list)
    return {"doc_id": doc_id, "filter": name, "metrics": metrics}


def _value_and_weight(value: object) -> tuple[float, float] | None:
    match value:
        case bool() | int() | float() | np.number() | np.bool_():
            return float(value), 1.0
        case (int() | float() as total, int() | float() as weight):
            return float(total), float(weight)
    return None


def compare_metric(
    name: str,
    key: str,
    kind: MetricKind,
    values: tuple[float, float],
    documents: tuple[Documents | None, Documents | None],
) -> Comparison:
    """Returns a metric's change, with a test if the metric is a function of the documents' mean.

    The test is McNemar's if each document is right or wrong, otherwise a bootstrap over documents.

    Args:
      key: "metric,filter".
      values: the metric of both models.
      documents: the values of both models' documents, or None if unknown.
    """
    before, after = documents
    difference = values[1] - values[0]
    metric_of_mean = METRIC_OF_MEAN.get(key.partition(",")[0], lambda mean: mean)
    if before is None or after is None:
        return Comparison(name, kind, difference)
    if not (_is_of_mean(metric_of_mean, before, values[0]) and _is_of_mean(metric_of_mean, after, values[1])):
        return Comparison(name, kind, difference)
    if all(np.isin(each[:, 0], (0, 1)).all() and (each[:, 1] == 1).all() for each in (before, after)):
        return Comparison(name, kind, difference, p=mcnemar(before[:, 0] == 1, after[:, 0] == 1))
    return Comparison(name, kind, difference, interval=paired_bootstrap_of(before, after, metric_of_mean))


def _is_of_mean(metric_of_mean: MetricOfMean, documents: Documents, value: float) -> bool:
    """True if the harness computes its value from the documents' mean; an F1 score, for instance, it does not."""
    total, weight = documents.sum(axis=0)
    return bool(weight) and math.isclose(float(metric_of_mean(total / weight)), value, rel_tol=1e-6, abs_tol=1e-9)
