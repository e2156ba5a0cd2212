"""What the harness says of each document, and a paired test between two models from it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from qlora_jax.evaluation.metrics import Comparison
from qlora_jax.evaluation.statistics import mcnemar, paired_bootstrap_of

Documents = Float64[np.ndarray, "documents 2"]  # a metric's value and weight of each document

# How the harness makes one figure of many documents, from (sum of values) / (sum of weights); elsewhere it is that.
OF_MEAN: dict[str, Callable[[Any], Any]] = {
    "perplexity": lambda mean: np.exp(-mean),
    "word_perplexity": lambda mean: np.exp(-mean),
    "byte_perplexity": lambda mean: np.exp(-mean),
    "bits_per_byte": lambda mean: -mean / math.log(2),
}


def by_document(samples: Sequence[Mapping[str, Any]]) -> dict[str, Documents]:
    """By "metric,filter": of each document, in order; metrics that are not numbers of a document are left out."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            if (pair := _pair(sample[metric])) is not None:
                found.setdefault(f"{metric},{sample['filter']}", {})[sample["doc_id"]] = pair
    return {key: np.array([each[doc] for doc in sorted(each)], np.float64) for key, each in found.items()}


def _pair(value: Any) -> tuple[float, float] | None:
    match value:
        case bool() | int() | float() | np.number() | np.bool_():
            return float(value), 1.0
        case (int() | float() as total, int() | float() as weight):
            return float(total), float(weight)
    return None


def compared(
    name: str, key: str, kind: str, values: tuple[float, float], documents: tuple[Documents | None, Documents | None]
) -> Comparison:
    """A figure's change, and where it follows from the documents: McNemar's p where each is right or wrong, else a
    bootstrap over them.

    Args:
      key: "metric,filter".
      values: what the harness says of either model; documents: None where it says nothing of them.
    """
    before, after = documents
    difference = values[1] - values[0]
    of_mean = OF_MEAN.get(key.partition(",")[0], lambda mean: mean)
    if not (_gives(of_mean, before, values[0]) and _gives(of_mean, after, values[1])):
        return Comparison(name, kind, difference)
    assert before is not None and after is not None, "what gives a figure is there"
    if all(np.isin(each[:, 0], (0, 1)).all() and (each[:, 1] == 1).all() for each in (before, after)):
        return Comparison(name, kind, difference, p=mcnemar(before[:, 0] == 1, after[:, 0] == 1))
    return Comparison(name, kind, difference, interval=paired_bootstrap_of(before, after, of_mean))


def _gives(of_mean: Callable[[Any], Any], documents: Documents | None, value: float) -> bool:
    """Whether the harness made its figure of the documents as we do; of an F1, for instance, it did not."""
    if documents is None:
        return False
    total, weight = documents.sum(axis=0)
    return bool(weight) and math.isclose(float(of_mean(total / weight)), value, rel_tol=1e-6, abs_tol=1e-9)
