"""Tournaments without a finite estimate raise an error that names the cause; a prior makes all estimates finite."""

import itertools
import math

import numpy as np
import pytest

from qlora_jax.studies.tournament.ratings.games import read_games
from qlora_jax.studies.tournament.ratings.mle import POINTS, bradley_terry, check_estimates_exist, davidson_model, fit
from tests.studies.tournament.simulated import from_counts, strengths

CASES = {
    "two groups": ({("a", "b"): (2, 2, 1), ("c", "d"): (1, 3, 0)}, "found 2 groups, expected 1.: a, b; c, d"),
    "wins all": ({("a", "b"): (3, 0, 0), ("b", "c"): (2, 1, 0), ("c", "b"): (1, 1, 0)}, "a won all 3 games"),
    "loses all": ({("a", "b"): (2, 1, 0), ("b", "a"): (1, 1, 1), ("c", "b"): (0, 4, 0)}, "c lost all 4 games"),
    "only ties": ({("a", "b"): (0, 0, 3), ("b", "a"): (0, 0, 2)}, "no finite estimate exists for tie weight"),
    "first always wins": (
        {("a", "b"): (3, 0, 0), ("b", "a"): (2, 0, 0)},
        "no finite estimate exists for position bias",
    ),
    "one order": ({("a", "b"): (3, 2, 0)}, "they do not determine a, b, position bias"),
    # Strongly connected by its ties, and yet a, b, c and the tie weight can all run away.
    "chain of ties": (
        {("a", "b"): (0, 0, 2), ("b", "c"): (0, 0, 2), ("a", "c"): (2, 0, 0)},
        "no finite estimate exists",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_cause_is_named(name):
    wins, message = CASES[name]
    with pytest.raises(ValueError, match=message) as error:
        bradley_terry(from_counts(wins))
    assert "set prior_sd" in str(error.value)


@pytest.mark.parametrize("name", CASES)
def test_a_prior_gives_finite_ratings(name):
    found = bradley_terry(from_counts(CASES[name][0]), prior_sd=400)
    assert np.isfinite([[one.rating, *one.interval] for one in found.systems]).all()
    assert np.mean(strengths(found)) == pytest.approx(0.0, abs=1e-9)


def test_a_prior_of_one_pair_solves_its_equation():
    # a beats b three times; both are +-s: 3 (1 - p(2 s)) = s / sd^2.
    found = bradley_terry(from_counts({("a", "b"): (3, 0, 0)}), position_bias=False, prior_sd=200)
    s = strengths(found)[0]
    assert 3 / (1 + math.exp(2 * s)) == pytest.approx(s / (200 / POINTS) ** 2, abs=1e-9)


@pytest.mark.slow
def test_is_right_on_every_small_tournament():
    """Refused exactly if estimates keep growing as a prior gets flatter."""
    pairs = [("a", "b"), ("b", "c"), ("c", "a"), ("b", "a")]
    refused = 0
    for outcomes in itertools.product([(1, 0, 0), (0, 0, 1), (1, 1, 0)], repeat=len(pairs)):
        found = read_games(from_counts(dict(zip(pairs, outcomes, strict=True))))
        sizes = []
        for sd in (100.0, 1_000.0):
            model = davidson_model(found, position_bias=True, prior_sd=sd)
            sizes.append(np.abs(fit(model, model.counts.sum(axis=0)[None], np.zeros((1, len(model.names))))).max())
        try:
            check_estimates_exist(found, davidson_model(found, position_bias=True, prior_sd=None))
        except ValueError:
            refused += 1
            assert sizes[1] - sizes[0] > 1.0, outcomes
        else:
            assert sizes[1] - sizes[0] < 0.01, outcomes
    assert 0 < refused < 3**4
