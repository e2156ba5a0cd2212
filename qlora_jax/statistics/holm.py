"""Holm's correction of p-values for many comparisons."""

from collections.abc import Sequence

import numpy as np


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns adjusted p-values, in the order given (Holm 1979).

    If every adjusted p-value below 0.05 counts as a difference, the chance of any false one is at most 0.05, however
    the tests depend on each other. The smallest of n p-values is multiplied by n, the next by n - 1, and so on; an
    adjusted value is never below one before it, and at most 1.
    """
    p = np.array(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted.tolist()
