"""Chooses the matches that the page of results shows, by rule and never by hand."""

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qlora_jax.studies.tournament.judges.judge import FIRST, SECOND, Judgement
from qlora_jax.studies.tournament.judging import Judged

RANDOM, EXTREME = 4, 3  # examples of each rule


class Example(NamedTuple):
    """A match that the page shows: the judge and its judgement."""

    judge: str
    judgement: Judgement


class Examples(NamedTuple):
    """The examples of one rule, which is stated in a sentence."""

    rule: str
    examples: Sequence[Example]


def choose_examples(judged: Mapping[str, Judged], ratings: Mapping[str, float], seed: int) -> list[Examples]:
    """Chooses matches at random, and the extremes: the largest upsets, and the widest gaps that held.

    Args:
      ratings: of the systems; empty if there are none, and then no extremes.
    """
    every = [
        Example(name, judgement)
        for name, one in sorted(judged.items())
        for judgement in sorted(one.judgements.values(), key=lambda judgement: judgement.match)
        if judgement.verdict is not None
    ]
    chosen = random.Random(seed).sample(every, min(RANDOM, len(every)))
    decided = [one for one in every if one.judgement.verdict in (FIRST, SECOND)] if ratings else []
    decided = [one for one in decided if {one.judgement.match.first, one.judgement.match.second} <= set(ratings)]
    by_lead = sorted(decided, key=lambda one: _lead(one.judgement, ratings))
    upsets = [one for one in by_lead if _lead(one.judgement, ratings) < 0]
    expected = [one for one in by_lead[::-1] if _lead(one.judgement, ratings) > 0]
    all_of_them = [
        Examples(f"{RANDOM} of all judgements, drawn at random (seed {seed}).", chosen),
        Examples(
            f"The {EXTREME} largest upsets: the verdict is for the system of the lower rating, and the ratings are the "
            "farthest apart. One per pair of systems.",
            _one_per_pair(upsets),
        ),
        Examples(
            f"The {EXTREME} clearest verdicts: for the system of the higher rating, and the ratings are the farthest "
            "apart. One per pair of systems.",
            _one_per_pair(expected),
        ),
    ]
    return [one for one in all_of_them if one.examples]


def _lead(judgement: Judgement, ratings: Mapping[str, float]) -> float:
    """The rating of the winner minus that of the loser."""
    match = judgement.match
    gap = ratings[match.first] - ratings[match.second]
    return gap if judgement.verdict == FIRST else -gap


def _one_per_pair(examples: Sequence[Example]) -> list[Example]:
    found: dict[frozenset[str], Example] = {}
    for example in examples:
        found.setdefault(frozenset((example.judgement.match.first, example.judgement.match.second)), example)
    return [*found.values()][:EXTREME]
