"""Maximum-likelihood ratings: Bradley-Terry, with Davidson's ties and a term for position; intervals over prompts."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from qlora_jax.measures.statistics import t_quantile
from qlora_jax.studies.tournament.matches import Game
from qlora_jax.studies.tournament.ratings.games import (
    OUTCOMES,
    BradleyTerryRatings,
    Difference,
    Estimate,
    Games,
    Interval,
    SystemRating,
    check_several_prompts,
    read_games,
)

# The Bradley-Terry model with ties (Davidson 1970) and position bias, and its maximum-likelihood fit.
#
# With x = strength of the first system - strength of the second + position bias, the log odds of the outcomes are
#
#     first better: x / 2        second better: -x / 2        tie: tie weight
#
# The order effect of Davidson and Beaver (1977) is the same model: theirs adds the bias only to the first outcome,
# which only shifts the tie weight. Without ties the model is Bradley-Terry's, p(first better) = 1 / (1 + exp(-x)).
#
# Suffixes: P parameters (a strength per system, then the position bias, then the tie weight), M ordered pairs of
# systems, K outcomes (first better, second better, tie), G prompts, B fits at the same time. Natural units (nats).

TOLERANCE, MAX_STEPS, MAX_HALVINGS = 1e-10, 100, 40

Parameters = Float64[np.ndarray, "B P"]
Features = Float64[np.ndarray, "M K P"]


class Model(NamedTuple):
    """The likelihood of a tournament: features of its outcomes, and their counts.

    Fields:
      names: of the parameters: the systems, then "position bias" and "tie weight" where they are estimated.
      systems: number of systems.
      features: derivative of the log odds of each outcome of each ordered pair by each parameter.
      counts: how often each outcome occurred on each prompt.
      has_prior: whether all parameters have a normal prior with mean 0.
      penalty: precision of the prior; also fixes the mean of the strengths at 0, which the likelihood leaves open.
    """

    names: list[str]
    systems: int
    features: Features
    counts: Float64[np.ndarray, "G M K"]
    has_prior: bool
    penalty: Float64[np.ndarray, "P P"]


def davidson_model(games: Games, *, position_bias: bool, prior_sd: float | None) -> Model:
    """Returns the model of a tournament; without ties it has no tie weight.

    Args:
      prior_sd: standard deviation of the normal prior with mean 0 of every parameter; None for no prior.
    """
    systems, ties = len(games.systems), bool((games.outcome == 0.5).any())
    names = [*games.systems, *["position bias"] * position_bias, *["tie weight"] * ties]
    pairs_M2, pair_of_game = np.unique(np.stack([games.first, games.second], 1), axis=0, return_inverse=True)
    difference_MP = np.zeros((len(pairs_M2), len(names)))
    difference_MP[np.arange(len(pairs_M2)), pairs_M2[:, 0]] = 1.0
    difference_MP[np.arange(len(pairs_M2)), pairs_M2[:, 1]] = -1.0
    if position_bias:
        difference_MP[:, systems] = 1.0
    features = [difference_MP / 2, -difference_MP / 2]
    if ties:
        features.append(np.broadcast_to(np.eye(len(names))[-1], difference_MP.shape))
    counts = np.zeros((len(games.prompts), len(pairs_M2), len(features)))
    outcome_of_game = np.select([games.outcome == outcome for outcome in OUTCOMES], np.arange(len(OUTCOMES)))
    np.add.at(counts, (games.prompt, pair_of_game.ravel(), outcome_of_game), 1.0)
    mean_strength = np.arange(len(names)) < systems
    penalty = np.outer(mean_strength, mean_strength) + (0 if prior_sd is None else 1 / prior_sd**2) * np.eye(len(names))
    return Model(names, systems, np.stack(features, axis=1), counts, prior_sd is not None, penalty)


def fit(model: Model, counts_BMK: Float64[np.ndarray, "B M K"], start_BP: Parameters) -> Parameters:
    """Maximizes the penalized likelihood of several tables of counts with Newton's method.

    The negative objective is convex. A step that makes it larger is halved.

    Raises:
      ValueError: no maximum was reached, because the counts hardly determine a parameter.
    """
    params = start_BP
    for _ in range(MAX_STEPS):
        gradient_BP, curvature_BPP = _derivatives(model, counts_BMK, params)
        step_BP = np.linalg.solve(curvature_BPP, gradient_BP[..., None])[..., 0]
        if np.abs(step_BP).max() < TOLERANCE:
            return params + step_BP
        params = _ascend(model, counts_BMK, params, step_BP)
    unsettled = [name for name, size in zip(model.names, np.abs(step_BP).max(axis=0), strict=True) if size > TOLERANCE]
    raise ValueError(
        f"comparisons: the fit did not converge in {MAX_STEPS} steps (undetermined: {', '.join(unsettled)}). "
        "Judge more prompts, or set prior_sd."
    )


def log_probabilities(features: Features, params_BP: Parameters) -> Float64[np.ndarray, "B M K"]:
    """Log probability of each outcome of each ordered pair."""
    odds_BMK = np.einsum("mkp,bp->bmk", features, params_BP)
    odds_BMK -= odds_BMK.max(axis=-1, keepdims=True)
    return odds_BMK - np.log(np.exp(odds_BMK).sum(axis=-1, keepdims=True))


def curvature(
    features: Features, probability_BMK: Float64[np.ndarray, "B M K"], games_BM: Float64[np.ndarray, "B M"]
) -> Float64[np.ndarray, "B P P"]:
    """Negative second derivative of the log likelihood: the covariance of the features, summed over games."""
    size = features.shape[-1]
    squares = np.einsum("mkp,mkq->mkpq", features, features).reshape(-1, size * size)
    weights_BK = (probability_BMK * games_BM[..., None]).reshape(len(probability_BMK), -1)
    mean_BMP = np.einsum("bmk,mkp->bmp", probability_BMK, features)
    outer_BPP = (mean_BMP * games_BM[..., None]).swapaxes(1, 2) @ mean_BMP
    return (weights_BK @ squares).reshape(-1, size, size) - outer_BPP


def _objective(model: Model, counts_BMK: Float64[np.ndarray, "B M K"], params: Parameters) -> Float64[np.ndarray, " B"]:
    likelihood_B = (counts_BMK * log_probabilities(model.features, params)).sum(axis=(1, 2))
    return likelihood_B - np.einsum("bp,pq,bq->b", params, model.penalty, params) / 2


def _derivatives(
    model: Model, counts_BMK: Float64[np.ndarray, "B M K"], params: Parameters
) -> tuple[Parameters, Float64[np.ndarray, "B P P"]]:
    """Gradient of the objective, and the negative of its second derivative."""
    probability_BMK = np.exp(log_probabilities(model.features, params))
    games_BM = counts_BMK.sum(axis=-1)
    surplus_BMK = counts_BMK - games_BM[..., None] * probability_BMK
    gradient_BP = np.einsum("bmk,mkp->bp", surplus_BMK, model.features) - params @ model.penalty
    return gradient_BP, curvature(model.features, probability_BMK, games_BM) + model.penalty


def _ascend(
    model: Model, counts_BMK: Float64[np.ndarray, "B M K"], params: Parameters, step_BP: Parameters
) -> Parameters:
    """Takes the step of each fit, halved until its objective does not fall by more than rounding."""
    before_B, scale_B = _objective(model, counts_BMK, params), np.ones(len(params))
    for _ in range(MAX_HALVINGS):
        after_B = _objective(model, counts_BMK, params + scale_B[:, None] * step_BP)
        worse_B = after_B < before_B - 1e-12 * (1 + np.abs(before_B))
        if not worse_B.any():
            break
        scale_B = np.where(worse_B, scale_B / 2, scale_B)
    return params + scale_B[:, None] * step_BP


# Checks that a tournament determines every parameter of its model, and names those that it does not.
#
# A maximum of the likelihood exists, and is the only one, unless some direction in the space of parameters makes no
# observed outcome less likely than another outcome of its game (Albert and Anderson 1984). Ford's condition for
# Bradley-Terry, that no group of systems wins all its games against the others, is the case without ties and bias.

FIX = "Compare more, or set prior_sd (for instance 400), a normal prior in Elo points that keeps ratings finite."
_INFEASIBLE = 2  # status of scipy's linprog


def check_estimates_exist(games: Games, model: Model) -> None:
    """Raises ValueError if the maximum-likelihood estimate of a parameter is not a single finite number."""
    points_SS = _points_of_pairs(games)
    if problem := _never_compared(games, points_SS) or _one_sided(games, points_SS) or _undetermined(model):
        raise ValueError(f"comparisons: {problem}. {FIX}")


def _points_of_pairs(games: Games) -> Float64[np.ndarray, "systems systems"]:
    """Points that each system (column) took from each other one (row): 1 for a win, 0.5 for a tie."""
    points_SS = np.zeros((len(games.systems),) * 2)
    np.add.at(points_SS, (games.second, games.first), games.outcome)
    np.add.at(points_SS, (games.first, games.second), 1 - games.outcome)
    return points_SS


def _never_compared(games: Games, points_SS: Float64[np.ndarray, "systems systems"]) -> str | None:
    groups = _groups(points_SS, connection="weak")
    if len(groups) == 1:
        return None
    named = "; ".join(_named(games.systems, group) for group in groups)
    return f"groups of systems were never compared with each other (found {len(groups)} groups, expected 1): {named}"


def _one_sided(games: Games, points_SS: Float64[np.ndarray, "systems systems"]) -> str | None:
    """Describes groups that took all points, or none, from the systems outside."""
    problems = []
    groups = _groups(points_SS, connection="strong")
    for group in groups if len(groups) > 1 else []:
        inside = np.isin(np.arange(len(games.systems)), group)
        taken, given = points_SS[np.ix_(~inside, inside)].sum(), points_SS[np.ix_(inside, ~inside)].sum()
        if not given:
            problems.append(f"{_named(games.systems, group)} won all {taken:.0f} games against the others")
        elif not taken:
            problems.append(f"{_named(games.systems, group)} lost all {given:.0f} games against the others")
    return "; ".join(problems) + ", so their strength has no finite estimate" if problems else None


def _undetermined(model: Model) -> str | None:
    """Names the parameters in a direction that never makes an observed outcome relatively less likely."""
    rows_P = _advantages(model)
    if np.linalg.matrix_rank(rows_P) < len(model.names) - 1:  # all strengths may rise by the same amount
        _, _, directions = np.linalg.svd(np.vstack([rows_P, model.penalty]))
        return f"they do not determine {_moving(model, directions[-1])}"
    separating = _sparse_direction(rows_P)
    return None if separating is None else f"no finite estimate exists for {_moving(model, separating)}"


def _sparse_direction(rows_P: Float64[np.ndarray, "rows P"]) -> Float64[np.ndarray, " P"] | None:
    """The direction of smallest absolute sum along which all rows are at least 0 and sum to 1; None if none exists."""
    from scipy.optimize import linprog

    both_ways = np.hstack([rows_P, -rows_P])  # a direction is the difference of two vectors that are not negative
    found = linprog(
        np.ones(both_ways.shape[1]),
        A_ub=-both_ways,
        b_ub=np.zeros(len(rows_P)),
        A_eq=both_ways.sum(axis=0)[None],
        b_eq=[1.0],
    )
    if found.status == _INFEASIBLE:
        return None
    if not found.success:
        raise RuntimeError(f"the linear program of the existence check failed: {found.message}")
    return np.subtract(*np.split(found.x, 2))


def _advantages(model: Model) -> Float64[np.ndarray, "rows P"]:
    """Derivative of the log odds of each observed outcome against each other outcome of the same pair."""
    observed_MK = model.counts.sum(axis=0) > 0
    against = model.features[:, :, None, :] - model.features[:, None, :, :]
    return np.unique(against[observed_MK].reshape(-1, len(model.names)), axis=0)


def _moving(model: Model, direction_P: Float64[np.ndarray, " P"]) -> str:
    """Names the parameters that differ along a direction; strengths count relative to their median."""
    moved = direction_P.copy()
    moved[: model.systems] -= np.median(moved[: model.systems])
    return ", ".join(
        name for name, size in zip(model.names, moved, strict=True) if abs(size) > 1e-6 * np.abs(moved).max()
    )


def _groups(points_SS: Float64[np.ndarray, "systems systems"], connection: str) -> list[Int[np.ndarray, " _"]]:
    from scipy.sparse.csgraph import connected_components

    count, label_S = connected_components(points_SS > 0, connection=connection)
    return [np.flatnonzero(label_S == label) for label in range(count)]


def _named(systems: Sequence[str], group: Int[np.ndarray, " _"]) -> str:
    return ", ".join(systems[int(index)] for index in group)


# Intervals of Bradley-Terry estimates over prompts: Student's t with the standard error of a bootstrap.
#
# A prompt's games share its difficulty, so prompts are reweighted, not single games. Each prompt gets one of Mammen's
# (1993) two weights, which have mean 1, variance 1 and third moment 1, as counts of drawing with replacement do.
# Neither is 0, so a resample has a finite estimate whenever the tournament has one; without that, a system whose only
# defeat is not drawn would have none.
#
# In simulations of 40 prompts percentiles of the resampled estimates covered the truth less often than
# 95 %, as did percentiles of studentized estimates and the normal quantile.

RESAMPLES = 1_000
SMALL_WEIGHT, LARGE_WEIGHT = (3 - math.sqrt(5)) / 2, (3 + math.sqrt(5)) / 2
SMALL_SHARE = (math.sqrt(5) + 1) / (2 * math.sqrt(5))  # probability of the small weight
_AT_ONCE = 100  # resamples, to bound memory


def standard_errors(
    model: Model, params_P: Float64[np.ndarray, " P"], quantities_QP: Float64[np.ndarray, "Q P"], seed: int
) -> Float64[np.ndarray, " Q"]:
    """Standard errors over prompts of linear functions of the parameters.

    With a prior they are at least those of the posterior: prompts that all agree have no spread.
    """
    rng, start_BP = np.random.default_rng(seed), np.repeat(params_P[None], _AT_ONCE, axis=0)
    resampled = []
    for _ in range(0, RESAMPLES, _AT_ONCE):
        weights_BG = _weights(rng, len(model.counts))
        counts_BMK = np.tensordot(weights_BG, model.counts, axes=1)
        resampled.append(fit(model, counts_BMK, start_BP) @ quantities_QP.T)
    variance_Q = np.concatenate(resampled).var(axis=0, ddof=1)
    if model.has_prior:
        variance_Q = np.maximum(variance_Q, _posterior_variance(model, params_P, quantities_QP))
    return np.sqrt(variance_Q)


def _weights(rng: np.random.Generator, prompts: int) -> Float64[np.ndarray, "B G"]:
    """Weights of the prompts in some resamples; those of each resample sum to the number of prompts."""
    small_BG = rng.uniform(size=(_AT_ONCE, prompts)) < SMALL_SHARE
    weights_BG = np.where(small_BG, SMALL_WEIGHT, LARGE_WEIGHT)
    return weights_BG * (prompts / weights_BG.sum(axis=1, keepdims=True))


def _posterior_variance(
    model: Model, params_P: Float64[np.ndarray, " P"], quantities_QP: Float64[np.ndarray, "Q P"]
) -> Float64[np.ndarray, " Q"]:
    probability_BMK = np.exp(log_probabilities(model.features, params_P[None]))
    games_BM = model.counts.sum(axis=(0, 2))[None]
    (curvature_PP,) = curvature(model.features, probability_BMK, games_BM) + model.penalty
    return np.einsum("qp,pq->q", quantities_QP, np.linalg.solve(curvature_PP, quantities_QP.T))


MEAN = 1000.0
POINTS = 400 / math.log(10)  # Elo points per nat


def bradley_terry(
    comparisons: Sequence[Game], *, position_bias: bool = True, prior_sd: float | None = None, seed: int = 0
) -> BradleyTerryRatings:
    """Rates the systems of a tournament by maximum likelihood (`davidson_model`).

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
    estimate_Q = quantities_QP @ params_P
    error_Q = standard_errors(model, params_P, quantities_QP, seed)
    half_Q = t_quantile(len(model.counts) - 1) * error_Q
    intervals_Q2 = np.stack([estimate_Q - half_Q, estimate_Q + half_Q], axis=1)
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
