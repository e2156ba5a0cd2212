"""The Bradley-Terry model with ties (Davidson 1970) and position bias, and its maximum-likelihood fit.

With x = strength of the first system - strength of the second + position bias, the log odds of the outcomes are

    first better: x / 2        second better: -x / 2        tie: tie weight

The order effect of Davidson and Beaver (1977) is the same model: theirs adds the bias only to the first outcome,
which only shifts the tie weight. Without ties the model is Bradley-Terry's, p(first better) = 1 / (1 + exp(-x)).

Suffixes: P parameters (a strength per system, then the position bias, then the tie weight), M ordered pairs of
systems, K outcomes (first better, second better, tie), G prompts, B fits at the same time. Natural units (nats).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from qlora_jax.studies.tournament.ratings.games import OUTCOMES, Games

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
