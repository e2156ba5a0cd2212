"""Bradley-Terry ratings with ties, without the judge's position bias, and with intervals over prompts."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from qlora_jax.studies.tournament.matches import Game
from qlora_jax.studies.tournament.ratings.davidson import Model, davidson_model, fit
from qlora_jax.studies.tournament.ratings.games import check_several_prompts, read_games
from qlora_jax.studies.tournament.ratings.mle_existence import check_estimates_exist
from qlora_jax.studies.tournament.ratings.prompt_bootstrap import prompt_intervals
from qlora_jax.studies.tournament.ratings.results import (
    BradleyTerryRatings,
    Difference,
    Estimate,
    Interval,
    SystemRating,
)

MEAN = 1000.0
POINTS = 400 / math.log(10)  # Elo points per nat


def bradley_terry(
    comparisons: Sequence[Game], *, position_bias: bool = True, prior_sd: float | None = None, seed: int = 0
) -> BradleyTerryRatings:
    """Rates the systems of a tournament by maximum likelihood (`davidson.py`).

    Args:
      position_bias: estimate what a reply gains from being seen first, so that ratings are free of it.
      prior_sd: standard deviation, in Elo points, of a normal prior with mean 0 on every strength (relative to the
        mean), on the position bias and on the tie weight; None for no prior.
      seed: of the bootstrap over prompts.

    Raises:
      ValueError: without a prior, the comparisons do not determine a finite estimate of every parameter; or there is
        one prompt, or a comparison is malformed.
    """
    if prior_sd is not None and not prior_sd > 0:
        raise ValueError(f"prior_sd: must be positive (found {prior_sd}). Set it to about 400, or leave it out.")
    games = read_games(comparisons)
    check_several_prompts(games)
    model = davidson_model(games, position_bias=position_bias, prior_sd=None if prior_sd is None else prior_sd / POINTS)
    if prior_sd is None:
        check_estimates_exist(games, model)
    params_P = fit(model, model.counts.sum(axis=0)[None], np.zeros((1, len(model.names))))[0]
    best_first = [int(index) for index in np.argsort(-params_P[: model.systems], kind="stable")]
    pairs = list(itertools.combinations(best_first, 2))
    quantities_QP = np.concatenate([np.eye(len(model.names)), _differences(model, pairs)])
    intervals_Q2 = prompt_intervals(model, params_P, quantities_QP, seed)
    of_pairs_Q2 = intervals_Q2[len(model.names) :]
    return BradleyTerryRatings(
        systems=[_rating(model, params_P, intervals_Q2, index) for index in best_first],
        differences=[
            _difference(model, params_P, interval, pair) for pair, interval in zip(pairs, of_pairs_Q2, strict=True)
        ],
        position=_position(model, params_P, intervals_Q2),
        tie_share=_tie_share(model, params_P, intervals_Q2),
        comparisons=len(comparisons),
        prompts=len(games.prompts),
        prior_sd=prior_sd,
    )


def _rating(
    model: Model, params_P: Float64[np.ndarray, " P"], intervals_Q2: Float64[np.ndarray, "Q 2"], index: int
) -> SystemRating:
    return SystemRating(
        system=model.names[index],
        rating=MEAN + POINTS * float(params_P[index]),
        interval=_points(intervals_Q2[index], MEAN),
    )


def _difference(
    model: Model, params_P: Float64[np.ndarray, " P"], interval: Float64[np.ndarray, "2"], pair: tuple[int, int]
) -> Difference:
    better, worse = pair
    return Difference(
        better=model.names[better],
        worse=model.names[worse],
        points=POINTS * float(params_P[better] - params_P[worse]),
        interval=_points(interval),
    )


def _differences(model: Model, pairs: Sequence[tuple[int, int]]) -> Float64[np.ndarray, "pairs P"]:
    rows = np.zeros((len(pairs), len(model.names)))
    for row, (a, b) in zip(rows, pairs, strict=True):
        row[a], row[b] = 1.0, -1.0
    return rows


def _points(interval: Float64[np.ndarray, "2"], origin: float = 0.0) -> Interval:
    low, high = origin + POINTS * interval
    return float(low), float(high)


def _position(
    model: Model, params_P: Float64[np.ndarray, " P"], intervals_Q2: Float64[np.ndarray, "Q 2"]
) -> Estimate | None:
    if "position bias" not in model.names[model.systems :]:
        return None
    return Estimate(value=POINTS * float(params_P[model.systems]), interval=_points(intervals_Q2[model.systems]))


def _tie_share(
    model: Model, params_P: Float64[np.ndarray, " P"], intervals_Q2: Float64[np.ndarray, "Q 2"]
) -> Estimate | None:
    """Probability of a tie between equal systems, to a judge without position bias."""
    if "tie weight" not in model.names[model.systems :]:
        return None
    last = len(model.names) - 1
    value, low, high = (float(1 / (1 + 2 * np.exp(-weight))) for weight in (params_P[last], *intervals_Q2[last]))
    return Estimate(value=value, interval=(low, high))
