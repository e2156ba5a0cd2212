"""Counts, wins and shares of a tournament; the ratings have tests in tests/studies/tournament/ratings."""

from qlora_jax.studies.tournament.judges.judge import Attempts, Judgement
from qlora_jax.studies.tournament.judging import Judged
from qlora_jax.studies.tournament.matches import Game, Match
from qlora_jax.studies.tournament.results import Wins, compute_results, count_rows, note_lines, standings, win_matrix
from tests.studies.tournament.tiny_tournament import arena_args

ARGS = dict(output="arena", judges={"j": {"kind": "verdicts", "path": "v"}}, orderings=20)


def test_wins_and_games_of_both_orders():
    comparisons = [
        Game("1", "a", "b", 1.0, "j"),
        Game("1", "b", "a", 1.0, "j"),
        Game("2", "a", "b", 0.5, "j"),
        Game("2", "c", "a", 0.0, "j"),
    ]
    assert win_matrix(comparisons) == {
        "a": {"b": Wins(wins=1.5, games=3), "c": Wins(wins=1.0, games=1)},
        "b": {"a": Wins(wins=1.5, games=3)},
        "c": {"a": Wins(wins=0.0, games=1)},
    }


def test_a_system_that_wins_everything_gets_elo_and_a_stated_problem():
    comparisons = [
        Game(str(i), first, second, float(first == "a"), "j")
        for i in range(5)
        for first, second in (("a", "b"), ("b", "a"))
    ]
    found = standings(arena_args(**ARGS), comparisons)
    assert found.elo is not None and found.bradley_terry is None
    (problem,) = found.problems
    assert problem.startswith("Bradley-Terry: ") and "prior_sd" in problem
    assert standings(arena_args(**ARGS, prior_sd=400.0), comparisons).problems == []
    assert found.first_share == 0.5
    assert note_lines(found)[0] == "50.0 % of the wins are of the reply that was seen first."


def test_unreadable_and_missing_judgements_are_counted_and_not_rated():
    verdicts = {"1": 1, "2": 2, "3": 3, "4": -1, "5": None}
    found = {Match(p, "a", "b"): Judgement(Match(p, "a", "b"), verdict) for p, verdict in verdicts.items()}
    judged = {"j": Judged(7, found, Attempts(failed=2, timed_out=1, unreadable=4), None)}
    results = compute_results(arena_args(**ARGS), ["a", "b"], judged)
    assert count_rows(results) == [("j", ["7", "1", "1", "1", "1", "3", "2", "1", "4"])]
    assert results.standings["j"].elo.comparisons == 3
