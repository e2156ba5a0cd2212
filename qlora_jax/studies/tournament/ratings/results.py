"""Results of a tournament's ratings; `dataclasses.asdict` gives them as plain dicts, lists and numbers.

All ratings and differences are in Elo points: 400 points are odds of 10 to 1 to be preferred, ties left out.
"""

import dataclasses

Interval = tuple[float, float]  # 95 %


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """An estimated number with its 95 % interval over prompts."""

    value: float
    interval: Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class EloRating:
    """Elo rating of one system.

    Attributes:
      rating: mean over random orderings of the comparisons.
      interval: 95 % interval of that mean, over prompts.
      ordering_sd: standard deviation of the rating that a single ordering gives.
      ordering_range: 2.5 % and 97.5 % quantiles of the rating that a single ordering gives.
    """

    system: str
    rating: float
    interval: Interval
    ordering_sd: float
    ordering_range: Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class EloRatings:
    """Elo ratings, the best system first."""

    systems: list[EloRating]
    comparisons: int
    prompts: int
    orderings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SystemRating:
    """Bradley-Terry strength of one system in Elo points; the mean over systems is 1000."""

    system: str
    rating: float
    interval: Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Difference in Elo points between two systems; an interval that includes 0 leaves open which one is better."""

    better: str
    worse: str
    points: float
    interval: Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class BradleyTerryRatings:
    """Bradley-Terry strengths with ties and position bias, the best system first.

    Attributes:
      differences: between all pairs of systems, in the order of `systems`.
      position: Elo points that a reply gains from being seen first; None if it was not estimated.
      tie_share: probability of a tie between equal systems; None if there were no ties.
      prior_sd: standard deviation, in Elo points, of the normal prior; None for maximum likelihood.
    """

    systems: list[SystemRating]
    differences: list[Difference]
    position: Estimate | None
    tie_share: Estimate | None
    comparisons: int
    prompts: int
    prior_sd: float | None
