"""Examples follow their rules: drawn at random, and the extremes."""

from qlora_jax.studies.tournament.examples import choose_examples
from qlora_jax.studies.tournament.judges.judge import Attempts, Judgement
from qlora_jax.studies.tournament.judging import Judged
from qlora_jax.studies.tournament.matches import Match

RATINGS = {"a": 1200.0, "b": 1000.0, "c": 800.0, "d": 790.0}


def judged(*verdicts: tuple[str, str, str, int | None]) -> dict[str, Judged]:
    found = {Match(p, a, b): Judgement(Match(p, a, b), verdict) for p, a, b, verdict in verdicts}
    return {"judge": Judged(len(found), found, Attempts(), None)}


def names(examples) -> list[str]:
    return ["".join(one.judgement.match) for one in examples.examples]


def test_extremes_are_the_widest_gaps_one_per_pair():
    every = judged(
        ("1", "c", "a", 1),  # an upset of 400 points
        ("2", "a", "c", 2),  # the same pair
        ("1", "b", "a", 1),  # 200
        ("1", "d", "c", 1),  # 10
        ("1", "c", "b", 1),  # 200
        ("1", "a", "b", 1),  # as expected, by 200
        ("1", "a", "d", 1),  # by 410
        ("1", "d", "b", 3),
        ("1", "b", "d", -1),
        ("2", "b", "d", None),
    )
    drawn, upsets, expected = choose_examples(every, RATINGS, seed=0)
    assert names(upsets) == ["1ca", "1ba", "1cb"]
    assert names(expected) == ["1ad", "1ab"]
    assert len(drawn.examples) == len({*names(drawn)}) == 4 and "2bd" not in names(drawn)
    assert all("farthest apart" in one.rule for one in (upsets, expected))


def test_draws_depend_on_the_seed_alone():
    many = judged(*((str(i), "a", "b", 1) for i in range(50)))
    backwards = {"judge": many["judge"]._replace(judgements=dict(reversed(many["judge"].judgements.items())))}
    first, again, other = (choose_examples(*given)[0] for given in ((many, {}, 0), (backwards, {}, 0), (many, {}, 1)))
    assert names(first) == names(again) != names(other)


def test_nothing_is_chosen_of_nothing():
    assert choose_examples(judged(("1", "a", "b", None)), RATINGS, seed=0) == []
