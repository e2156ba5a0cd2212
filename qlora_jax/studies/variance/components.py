"""Variance components of a table of scores, prompts by levels of one factor, from its mean squares.

    score[prompt, level] = mean + prompt's effect + level's effect + residual,    all three random.

The layout is balanced, so the expected mean squares give unbiased estimates in closed form, which are those of
restricted maximum likelihood (REML) where all are positive. An estimate may be negative; the variance is then about 0.
Intervals: of the residual from its chi-squared distribution, of the others the modified large-sample intervals of Ting,
Burdick, Graybill, Jeyaratnam and Lu (1990), which are close to 95 % for few levels too, where effects are normal.

Dimension key: P prompts, L levels.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy import special

from qlora_jax.studies.statistics import MeanEstimate, crossed_mean

Interval = tuple[float, float]  # 95 %
TAIL = 0.025


class Component(NamedTuple):
    """A variance, with its interval."""

    value: float
    interval: Interval


class Components(NamedTuple):
    """Variances of a table.

    Fields:
      prompts: between prompts, the same at every level.
      levels: between levels, the same for every prompt.
      residual: levels matter on some prompts more than on others.
    """

    prompts: Component
    levels: Component
    residual: Component


class DifferenceComponents(NamedTuple):
    """The difference between two models on one prompt at one level, in parts whose squares add up.

    Fields:
      mean: the mean over all prompts and levels, which is the difference between the models themselves.
      model: square of the mean without what chance adds to it; its interval follows from that of the mean.
    """

    mean: MeanEstimate
    model: Component
    prompts: Component
    levels: Component
    residual: Component


def variance_components(scores_PL: Float64[np.ndarray, "P L"]) -> Components:
    """Estimates the three variances; needs two prompts and two levels."""
    prompts, levels = scores_PL.shape
    row_P, column_L = scores_PL.mean(axis=1), scores_PL.mean(axis=0)
    residual_PL = scores_PL - row_P[:, None] - column_L + scores_PL.mean()
    degrees_of_freedom = (prompts - 1) * (levels - 1)
    by_prompt, by_level = levels * float(row_P.var(ddof=1)), prompts * float(column_L.var(ddof=1))
    residual = float((residual_PL**2).sum()) / degrees_of_freedom
    chi_low, chi_high = (float(special.chdtri(degrees_of_freedom, tail)) for tail in (1 - TAIL, TAIL))
    return Components(
        prompts=_surplus((by_prompt, prompts - 1), (residual, degrees_of_freedom), levels),
        levels=_surplus((by_level, levels - 1), (residual, degrees_of_freedom), prompts),
        residual=Component(
            residual, (degrees_of_freedom * residual / chi_high, degrees_of_freedom * residual / chi_low)
        ),
    )


def difference_components(
    first_PL: Float64[np.ndarray, "P L"], second_PL: Float64[np.ndarray, "P L"]
) -> DifferenceComponents:
    """Splits second - first, on the same prompts at the same levels."""
    difference_PL = second_PL - first_PL
    mean, parts = crossed_mean(difference_PL.T), variance_components(difference_PL)
    low, high = sorted(abs(end) for end in mean.interval)
    excludes_zero = mean.interval[0] * mean.interval[1] > 0
    model = Component(mean.value**2 - mean.error**2, (low**2 if excludes_zero else 0.0, high**2))
    return DifferenceComponents(mean, model, *parts)


MeanSquare = tuple[float, int]  # (mean square, degrees of freedom)


def _surplus(larger: MeanSquare, smaller: MeanSquare, copies: int) -> Component:
    """The variance (E larger - E smaller) / copies, and its modified large-sample interval."""
    (a, n), (b, m) = larger, smaller
    g_n, g_m = (1 - df / special.chdtri(df, TAIL) for df in (n, m))
    h_n, h_m = (df / special.chdtri(df, 1 - TAIL) - 1 for df in (n, m))
    f_low, f_high = special.fdtri(n, m, TAIL), special.fdtri(n, m, 1 - TAIL)
    g_nm = ((f_high - 1) ** 2 - (g_n * f_high) ** 2 - h_m**2) / f_high
    h_nm = ((1 - f_low) ** 2 - (h_n * f_low) ** 2 - g_m**2) / f_low
    below = np.sqrt(max(0.0, (g_n * a) ** 2 + (h_m * b) ** 2 + g_nm * a * b))
    above = np.sqrt(max(0.0, (h_n * a) ** 2 + (g_m * b) ** 2 + h_nm * a * b))
    ends = (max(0.0, float(a - b - below) / copies), max(0.0, float(a - b + above) / copies))
    return Component((a - b) / copies, ends)
