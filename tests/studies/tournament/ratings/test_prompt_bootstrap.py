"""Standard errors against statsmodels, and the coverage of the intervals in simulated tournaments."""

import itertools

import numpy as np
import pytest

from qlora_jax.studies.tournament.ratings.games import read_games
from qlora_jax.studies.tournament.ratings.mle import (
    LARGE_WEIGHT,
    POINTS,
    SMALL_SHARE,
    SMALL_WEIGHT,
    bradley_terry,
    davidson_model,
    fit,
    standard_errors,
)
from tests.studies.tournament.simulated import tournament

STRENGTHS = (0.9, 0.2, -0.3, -0.8)
# A fair judge and a biased one; games that are independent, and games that share the prompt's difficulty.
JUDGES = {
    "fair": {"position": 0.0, "tie_weight": None, "prompt_sd": 0.0},
    "fair, ties, prompts differ": {"position": 0.0, "tie_weight": -0.7, "prompt_sd": 1.0},
    "biased": {"position": 0.8, "tie_weight": -0.7, "prompt_sd": 0.0},
    "biased, prompts differ": {"position": 0.8, "tie_weight": -0.7, "prompt_sd": 1.0},
}


@pytest.mark.slow
def test_standard_errors_are_near_the_clustered_ones_of_statsmodels():
    import statsmodels.api as sm

    found = tournament(np.random.default_rng(2), STRENGTHS, prompts=80, position=0.5, prompt_sd=1.0)
    games = read_games(found)
    model = davidson_model(games, position_bias=True, prior_sd=None)
    params = fit(model, model.counts.sum(axis=0)[None], np.zeros((1, 5)))[0]
    x = np.eye(4)[games.first] - np.eye(4)[games.second]
    design = np.column_stack([x[:, 1:], np.ones(len(x))])  # differences to system 0, and the bias
    logit = sm.Logit(games.outcome, design)
    theirs = logit.fit(disp=0, tol=1e-12, cov_type="cluster", cov_kwds={"groups": games.prompt})
    quantities = np.array([[-1, 1, 0, 0, 0], [-1, 0, 1, 0, 0], [-1, 0, 0, 1, 0], [0, 0, 0, 0, 1]], float)
    assert quantities @ params == pytest.approx(theirs.params, abs=1e-6)
    errors = standard_errors(model, params, quantities, seed=0)
    assert errors == pytest.approx(theirs.bse, rel=0.1)
    assert (errors[:3] > 1.2 * logit.fit(disp=0).bse[:3]).all()  # single games are not independent


def test_weights_have_the_moments_of_counts_of_drawing_with_replacement():
    values = np.array([SMALL_WEIGHT, LARGE_WEIGHT])
    shares = np.array([SMALL_SHARE, 1 - SMALL_SHARE])
    assert [shares @ values, *(shares @ (values - 1) ** power for power in (2, 3))] == pytest.approx([1.0, 1.0, 1.0])


def truth(judge):
    """Strengths and bias that maximize the expected likelihood over all prompts.

    If strengths differ between prompts, these are nearer to 0 than the mean strengths.
    """
    pairs = list(itertools.permutations(range(4), 2))
    at, weight = np.polynomial.hermite_e.hermegauss(60)
    difference = np.array([STRENGTHS[a] - STRENGTHS[b] + judge["position"] for a, b in pairs])
    x = difference[:, None] + np.sqrt(2) * judge["prompt_sd"] * at
    tie = np.full(x.shape, 0.0 if judge["tie_weight"] is None else np.exp(judge["tie_weight"]))
    odds = np.stack([np.exp(x / 2), np.exp(-x / 2), tie])
    shares = (odds / odds.sum(axis=0)) @ weight / weight.sum()
    kinds = 2 if judge["tie_weight"] is None else 3
    model = davidson_model(
        read_games(tournament(np.random.default_rng(0), STRENGTHS, prompts=9, **judge)),
        position_bias=True,
        prior_sd=None,
    )
    params = fit(model, shares[:kinds].T[None], np.zeros((1, len(model.names))))[0]
    return np.append(params[:4] - params[:4].mean(), params[4]) * POINTS


def coverage(judge, simulations, seed=0, prompts=40):
    """Share of simulations whose interval holds the truth: of each rating, the bias, and the best pair's difference."""
    rng, true = np.random.default_rng(seed), truth(judge)
    hits = []
    for number in range(simulations):
        ratings = bradley_terry(tournament(rng, STRENGTHS, prompts=prompts, **judge), seed=number)
        intervals = [one.interval for one in sorted(ratings.systems, key=lambda one: one.system)]
        assert ratings.position is not None
        expected = [*(1000 + true[:4]), true[4]]
        intervals.append(ratings.position.interval)
        for one in ratings.differences:
            a, b = int(one.better[-1]), int(one.worse[-1])
            if {a, b} == {1, 2}:
                expected.append(true[a] - true[b])
                intervals.append(one.interval)
        hits.append([low <= value <= high for value, (low, high) in zip(expected, intervals, strict=True)])
    return np.mean(hits, axis=0)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("judge", JUDGES)
def test_a_thousand_simulations_cover_the_truth_in_93_to_97_percent(judge):
    found = coverage(JUDGES[judge], 1_000)
    assert (found >= 0.93).all() and (found <= 0.97).all(), found


@pytest.mark.slow
def test_intervals_cover_the_truth_of_a_biased_judge_on_prompts_that_differ():
    assert 0.91 < coverage(JUDGES["biased, prompts differ"], 40).mean() < 0.985
