"""Metrics of any statistic of rows, with bootstrap intervals: rows are resampled 10,000 times, seed 0.

Dimension key: R rows, S bootstrap samples.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64

from qlora_jax.evaluation.metrics import Metric
from qlora_jax.evaluation.statistics import resample_counts

Draws = Float64[np.ndarray, "S R"]  # how often each row occurs in each sample
Statistic = Callable[[Draws], Float64[np.ndarray, " S"]]


def bootstrapped(name: str, statistic: Statistic, rows: int, kind: str = "number") -> Metric:
    """Returns a metric with its bootstrap interval."""
    (value,) = statistic(np.ones((1, rows)))
    samples = np.concatenate([statistic(draws.astype(np.float64)) for draws in resample_counts(rows)])
    low, high = np.quantile(samples, (0.025, 0.975))
    return Metric(name, "share" if kind == "share" else "number", float(value), (float(low), float(high)))
