"""Bradley-Terry ratings against choix, statsmodels' log-linear fit, and closed forms."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.studies.tournament.ratings.mle import POINTS, bradley_terry
from tests.studies.tournament.simulated import from_counts, strengths, tournament

CHOIX = Path(__file__).parents[3] / "oracle/choix_strengths.py"


def test_without_ties_is_the_estimate_of_choix(oracle):
    found = tournament(np.random.default_rng(3), (1.0, 0.3, -0.2, -1.1, 0.0), prompts=12)
    played = [
        [int(name[-1]) for name in ((one.first, one.second) if one.outcome else (one.second, one.first))]
        for one in found
    ]
    sd = 0.7 * POINTS
    theirs = oracle(CHOIX, systems=5, games=np.array(played), alpha=1 / (2 * 0.7**2))
    ours = bradley_terry(found, position_bias=False)
    assert strengths(ours) == pytest.approx(theirs["likelihood"] - theirs["likelihood"].mean(), abs=1e-6)
    assert ours.position is None and ours.tie_share is None
    assert strengths(bradley_terry(found, position_bias=False, prior_sd=sd)) == pytest.approx(
        theirs["penalized"], abs=1e-6
    )


@pytest.mark.parametrize("position_bias", [True, False])
def test_with_ties_is_the_log_linear_fit_of_statsmodels(position_bias):
    import statsmodels.api as sm

    found = tournament(np.random.default_rng(4), (0.8, 0.0, -0.3, 0.1), prompts=15, position=0.5, tie_weight=-0.5)
    # Davidson and Beaver's form: log expected counts are a constant per ordered pair plus
    # strength of the first + order effect, strength of the second, or half the sum of both + tie weight.
    pairs = sorted({(one.first, one.second) for one in found})
    rows, counts = [], []
    for number, (first, second) in enumerate(pairs):
        a, b = int(first[-1]), int(second[-1])
        for outcome in (1.0, 0.0, 0.5):
            row = np.zeros(len(pairs) + 6)
            row[number] = 1
            row[len(pairs) + a] = {1.0: 1.0, 0.0: 0.0, 0.5: 0.5}[outcome]
            row[len(pairs) + b] = {1.0: 0.0, 0.0: 1.0, 0.5: 0.5}[outcome]
            row[len(pairs) + 4] = outcome == 1.0
            row[len(pairs) + 5] = outcome == 0.5
            rows.append(row)
            counts.append(sum((one.first, one.second, one.outcome) == (first, second, outcome) for one in found))
    columns = [n for n in range(len(pairs) + 6) if n != len(pairs) and (position_bias or n != len(pairs) + 4)]
    fit = sm.GLM(counts, np.array(rows)[:, columns], family=sm.families.Poisson()).fit(tol=1e-14, maxiter=200)
    theirs = np.array([0.0, *fit.params[len(pairs) : len(pairs) + 3]])
    order = fit.params[len(pairs) + 3] if position_bias else 0.0
    tie_weight = fit.params[-1] - order / 2  # theirs adds the order effect to one outcome, ours halves to both
    ours = bradley_terry(found, position_bias=position_bias)
    assert strengths(ours) == pytest.approx(theirs - theirs.mean(), abs=1e-6)
    assert ours.tie_share is not None
    assert ours.tie_share.value == pytest.approx(math.exp(tie_weight) / (2 + math.exp(tie_weight)), abs=1e-6)
    assert (0.0 if ours.position is None else ours.position.value / POINTS) == pytest.approx(order, abs=1e-6)


def test_two_systems_are_a_logistic_regression():
    # x first: 9 to 3; y first: 6 to 6. log 3 = strength difference + bias, 0 = bias - strength difference.
    found = bradley_terry(from_counts({("x", "y"): (9, 3, 0), ("y", "x"): (6, 6, 0)}))
    assert found.differences[0].points == pytest.approx(POINTS * math.log(3) / 2, abs=1e-6)
    assert found.position is not None
    assert found.position.value == pytest.approx(POINTS * math.log(3) / 2, abs=1e-6)
    assert [rating.system for rating in found.systems] == ["x", "y"]


def test_odds_of_ten_are_four_hundred_points():
    found = bradley_terry(from_counts({("x", "y"): (30, 3, 0)}), position_bias=False)
    assert found.differences[0].points == pytest.approx(400.0, abs=1e-6)


def test_a_biased_judge_who_sees_one_order_of_a_pair_more_often_does_not_change_the_ranking():
    rng = np.random.default_rng(5)
    found = tournament(rng, (0.4, 0.0, -0.4), prompts=400, position=1.5, tie_weight=-1.0)
    # The worst system is first in all its games but a few.
    skewed = [one for one in found if one.first == "system 2" or one.second != "system 2" or int(one.prompt[7:]) < 40]
    free, biased = bradley_terry(skewed), bradley_terry(skewed, position_bias=False)
    assert strengths(free) == pytest.approx([0.4, 0.0, -0.4], abs=0.25)
    assert strengths(biased)[2] > 0.1
    assert free.position is not None
    low, high = free.position.interval
    assert low < 1.5 * POINTS < high


def test_a_result_is_json_and_is_the_same_again():
    found = tournament(np.random.default_rng(6), (0.4, 0.0, -0.4), prompts=10, tie_weight=-1.0)
    ratings = bradley_terry(found)
    assert json.loads(json.dumps(dataclasses.asdict(ratings)))["systems"][0]["system"] == ratings.systems[0].system
    assert bradley_terry(found[::-1]) == ratings
    assert bradley_terry(found, seed=1) != ratings
