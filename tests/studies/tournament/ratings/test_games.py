"""Comparisons as arrays, and the errors of malformed ones."""

import pytest

from qlora_jax.studies.tournament.matches import Game
from qlora_jax.studies.tournament.ratings.games import read_games
from qlora_jax.studies.tournament.ratings.mle import bradley_terry


def test_indices_point_to_the_names():
    games = read_games([Game("q", "y", "x", 0.5, "judge"), Game("p", "x", "z", 1.0, "judge")])
    assert (games.systems, games.prompts) == (["x", "y", "z"], ["p", "q"])
    assert [column.tolist() for column in games[2:]] == [[0, 1], [2, 0], [1.0, 0.5], [0, 1]]


def test_malformed_comparisons_are_named():
    with pytest.raises(ValueError) as error:
        bradley_terry([Game("p", "x", "x", 1.0, "judge"), Game("q", "x", "y", 0.7, "judge")])
    assert "'x' and 'x' on prompt 'p': both are the same system" in str(error.value)
    assert "'x' and 'y' on prompt 'q': invalid outcome (found 0.7" in str(error.value)
    with pytest.raises(ValueError, match="nothing was judged"):
        bradley_terry([])
    with pytest.raises(ValueError, match=r"prior_sd: must be positive \(found 0"):
        bradley_terry([], prior_sd=0.0)


def test_many_problems_are_counted():
    with pytest.raises(ValueError, match=r"\.\.\. and 7 more$"):
        read_games([Game(str(number), "x", "x", 1.0, "judge") for number in range(12)])
