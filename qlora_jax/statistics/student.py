"""Student's interval of a mean."""

import math
import statistics
from collections.abc import Sequence


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Returns the 95 % interval mean -+ t s / sqrt(n); None for one value."""
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def t_quantile(degrees_of_freedom: float) -> float:
    """Returns the 0.975 quantile of Student's distribution."""
    from scipy import special  # takes as long to import as JAX

    return float(special.stdtrit(degrees_of_freedom, 0.975))


def two_sided_p(t: float, degrees_of_freedom: float) -> float:
    """Returns the probability that Student's t is at least as far from 0."""
    from scipy import special

    return float(2 * special.stdtr(degrees_of_freedom, -abs(t)))
