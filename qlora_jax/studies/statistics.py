"""Statistics of studies: means over training seeds and held-out rows, Holm's correction, the Pareto front.

Every seed is scored on the same rows, so seeds and rows are crossed. A score is modelled as

    score[seed, row] = mean + seed's effect + row's effect + residual,    all three random,

which is a two-way layout without replication. With S seeds and R rows, the variance of the mean is

    var_seed / S + var_row / R + var_residual / (S R),

and the mean squares are expected to be MS_seed = R var_seed + var_residual and MS_row = S var_row + var_residual. So
(MS_seed + MS_row) / (S R) estimates the variance and counts var_residual / (S R) twice. Subtracting MS_residual would
count it once, but a difference of mean squares can be far too small, or negative, with few seeds: in simulations of 3
seeds its intervals contained the truth in 91 to 95 % of trials, and these in 94.5 to 98.7 %. The degrees of freedom
are Satterthwaite's (1946): with a large seed effect they approach S - 1, as in Student's interval over seeds, and
without one R - 1, as in an interval over rows.

A bootstrap over seeds and rows was not used: resampling 3 seeds underestimates their variance by a third, and its
percentiles do not widen for so few.

Dimension key: S seeds, R rows.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from qlora_jax.measures.statistics import t_quantile, two_sided_p


class MeanEstimate(NamedTuple):
    """A mean over seeds and rows.

    Fields:
      error: its standard error.
      degrees_of_freedom: of that error.
    """

    value: float
    error: float
    degrees_of_freedom: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        half = t_quantile(self.degrees_of_freedom) * self.error
        return self.value - half, self.value + half

    @property
    def p(self) -> float:
        """The two-sided p-value of the hypothesis that the mean is 0."""
        if self.error == 0:
            return float(self.value == 0)
        return two_sided_p(self.value / self.error, self.degrees_of_freedom)

    def p_at_least(self, margin: float) -> float:
        """The p-value of the hypothesis that the mean is at least `margin` away from 0.

        The larger p-value of two one-sided tests (Schuirmann 1987): a small one shows that the mean is nearer to 0.
        """
        inside = margin - abs(self.value)
        if self.error == 0:
            return float(inside <= 0)
        tail = two_sided_p(inside / self.error, self.degrees_of_freedom) / 2
        return tail if inside > 0 else 1 - tail


def ratio_scores(values_SR: Float64[np.ndarray, "S R"], weights_R: Float64[np.ndarray, " R"]) -> np.ndarray:
    """Returns scores [S, R] whose mean over rows is (sum of values) / (sum of weights) for each seed.

    Shares and means have weights of 1, and the scores are the values. A loss per token has each row's number of tokens.
    Scores are then linear around the ratio of all seeds (the delta method), because the number of tokens varies with
    the rows, too.
    """
    ratio = values_SR.sum() / (len(values_SR) * weights_R.sum())
    return ratio + (values_SR - ratio * weights_R) / weights_R.mean()


def crossed_mean(scores_SR: Float64[np.ndarray, "S R"]) -> MeanEstimate:
    """Estimates the mean score over the seeds and rows that these were drawn from.

    With one seed the estimate is only for that seed, and the error is that of the rows.

    Raises:
      ValueError: there are fewer than two rows, or a score is not finite.
    """
    seeds, rows = scores_SR.shape
    finite = int(np.isfinite(scores_SR).all(axis=0).sum())
    if rows < 2 or finite < rows:
        found = f"found {finite} of {rows}, expected all of 2 or more"
        raise ValueError(f"evaluate: intervals need rows with finite scores ({found}). Add rows, or correct them.")
    mean = float(scores_SR.mean())
    by_row = seeds * float(scores_SR.mean(axis=0).var(ddof=1))
    if seeds == 1:
        return MeanEstimate(mean, math.sqrt(by_row / rows), rows - 1)
    by_seed = rows * float(scores_SR.mean(axis=1).var(ddof=1))
    total = by_seed + by_row
    spread = by_seed**2 / (seeds - 1) + by_row**2 / (rows - 1)
    degrees_of_freedom = total**2 / spread if spread else float(min(seeds, rows) - 1)
    return MeanEstimate(mean, math.sqrt(total / (seeds * rows)), degrees_of_freedom)


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


def pareto_front(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Returns the indices of the points that no other beats, by rising cost.

    A point beats another if neither its cost nor its loss is higher, and one of them is lower. A quality that should be
    high is given as a negative loss.
    """
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda index: (costs[index], losses[index])):
        same = front and (costs[index], losses[index]) == (costs[front[-1]], losses[front[-1]])
        if not front or losses[index] < losses[front[-1]] or same:
            front.append(index)
    return front
