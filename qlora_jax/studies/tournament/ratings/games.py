"""Comparisons as arrays, with the two systems in the order the judge saw them; and the ratings computed from them."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from qlora_jax.studies.tournament.matches import Game

OUTCOMES = (1.0, 0.0, 0.5)  # the first system is better, the second is, neither is
_SHOWN = 5  # problems in an error message


class Games(NamedTuple):
    """Comparisons of systems, sorted, so that ratings do not depend on the order in which they were judged.

    Fields:
      systems, prompts: names, sorted.
      first, second: index of each game's systems.
      outcome: 1, 0 or 0.5, as in `Game`.
      prompt: index of each game's prompt.
    """

    systems: list[str]
    prompts: list[str]
    first: Int64[np.ndarray, " games"]
    second: Int64[np.ndarray, " games"]
    outcome: Float64[np.ndarray, " games"]
    prompt: Int64[np.ndarray, " games"]


def read_games(comparisons: Sequence[Game]) -> Games:
    """Converts comparisons to arrays.

    Raises:
      ValueError: there is none, or one is malformed.
    """
    games = sorted(comparisons)
    _check(games)
    systems = sorted({name for game in games for name in (game.first, game.second)})
    prompts = sorted({game.prompt for game in games})
    system_index = {name: index for index, name in enumerate(systems)}
    prompt_index = {name: index for index, name in enumerate(prompts)}
    return Games(
        systems,
        prompts,
        np.array([system_index[game.first] for game in games], np.int64),
        np.array([system_index[game.second] for game in games], np.int64),
        np.array([game.outcome for game in games], np.float64),
        np.array([prompt_index[game.prompt] for game in games], np.int64),
    )


def check_several_prompts(games: Games) -> None:
    """Raises ValueError if there is one prompt, so that no interval can be estimated."""
    if (prompts := len(games.prompts)) < 2:
        raise ValueError(
            f"comparisons: intervals are over prompts (found {prompts} prompt, expected 2 or more). Judge more prompts."
        )


def _check(games: Sequence[Game]) -> None:
    problems = [
        f"comparison of {game.first!r} and {game.second!r} on prompt {game.prompt!r}: {problem}"
        for game in games
        for problem in _problems(game)
    ]
    if problems:
        more = f"\n... and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
        raise ValueError("\n".join(problems[:_SHOWN]) + more)
    if not games:
        raise ValueError("comparisons: nothing was judged (found 0, expected 1 or more). Judge some replies.")


def _problems(game: Game) -> list[str]:
    problems = []
    if game.first == game.second:
        problems.append("both are the same system (found one name, expected two). Remove it.")
    if game.outcome not in OUTCOMES:
        problems.append(f"invalid outcome (found {game.outcome}, expected 1, 0 or 0.5). Correct it.")
    return problems


# Results of a tournament's ratings; `dataclasses.asdict` gives them as plain dicts, lists and numbers.
#
# All ratings and differences are in Elo points: 400 points are odds of 10 to 1 to be preferred, ties left out.

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
