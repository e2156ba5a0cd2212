"""Results of a tournament: ratings, wins, position bias and failures of each judge, and the judges' agreement."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from qlora_jax.studies.tournament.agreement import Agreement, agreement
from qlora_jax.studies.tournament.judges.judge import FIRST, OUTCOMES, SECOND, TIE, UNREADABLE, Attempts
from qlora_jax.studies.tournament.judging import Judged
from qlora_jax.studies.tournament.matches import Game
from qlora_jax.studies.tournament.ratings.bradley_terry import bradley_terry
from qlora_jax.studies.tournament.ratings.elo import elo_ratings
from qlora_jax.studies.tournament.ratings.results import BradleyTerryRatings, EloRatings
from qlora_jax.studies.tournament.settings import ArenaArgs

ALL_JUDGES = "all judges"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """The number of judgements by verdict.

    Attributes:
      missing: matches without a reply of the judge.
      attempts: attempts without a verdict, including those that a later attempt made good.
    """

    matches: int
    first_better: int
    second_better: int
    ties: int
    unreadable: int
    missing: int
    attempts: Attempts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wins:
    """Verdicts on one system against another, in both orders; a tie is half a win for each."""

    wins: float
    games: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standings:
    """Ratings by one judge, or by all judges together.

    Attributes:
      first_share: share of the wins of replies that were seen first; None without a win.
      wins: by the system, then by its opponent.
      problems: why a rating is missing.
    """

    elo: EloRatings | None
    bradley_terry: BradleyTerryRatings | None
    first_share: float | None
    wins: Mapping[str, Mapping[str, Wins]]
    problems: Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """All results.

    Attributes:
      prompts: number of prompts with a readable verdict.
      judges: each judge's counts; a judge that was not asked yet has only missing ones.
      stopped: why a judge stopped early, by its name.
      standings: those of ALL_JUDGES if there are several, then by judge; only of judges with a verdict.
      agreement: None for fewer than two judges with a verdict, or if it cannot be computed.
      problems: why the agreement is missing.
    """

    systems: Sequence[str]
    prompts: int
    judges: Mapping[str, Counts]
    stopped: Mapping[str, str]
    standings: Mapping[str, Standings]
    agreement: Agreement | None
    problems: Sequence[str]

    @property
    def final(self) -> Standings | None:
        """The standings by all judges together; None without a verdict."""
        return next(iter(self.standings.values()), None)


def compute_results(args: ArenaArgs, systems: Sequence[str], judged: Mapping[str, Judged]) -> Results:
    """Rates the systems by each judge, and by all of them."""
    by_judge = {name: comparisons_of(name, one) for name, one in judged.items()}
    by_judge = {name: found for name, found in by_judge.items() if found}
    pooled = [comparison for found in by_judge.values() for comparison in found]
    both, problems = None, []
    if len(by_judge) > 1:
        try:
            both = agreement(pooled, seed=args.seed)
        except ValueError as error:
            problems.append(f"agreement: {error}")
    groups = ({ALL_JUDGES: pooled} if len(by_judge) > 1 else {}) | by_judge
    return Results(
        systems=systems,
        prompts=len({comparison.prompt for comparison in pooled}),
        judges={name: _counts(one) for name, one in judged.items()},
        stopped={name: one.stopped for name, one in judged.items() if one.stopped is not None},
        standings={name: standings(args, found) for name, found in groups.items()},
        agreement=both,
        problems=problems,
    )


def comparisons_of(judge: str, judged: Judged) -> list[Game]:
    """The readable verdicts of a judge."""
    return [
        Game(match.prompt, match.first, match.second, OUTCOMES[judgement.verdict], judge)
        for match, judgement in judged.judgements.items()
        if judgement.verdict in OUTCOMES
    ]


def standings(args: ArenaArgs, comparisons: Sequence[Game]) -> Standings:
    """Rates the systems; a rating that does not exist is left out, and its reason is stated."""
    problems, elo, strengths = [], None, None
    try:
        elo = elo_ratings(comparisons, orderings=args.orderings, seed=args.seed)
    except ValueError as error:
        problems.append(f"Elo: {error}")
    try:
        strengths = bradley_terry(comparisons, prior_sd=args.prior_sd, seed=args.seed)
    except ValueError as error:
        problems.append(f"Bradley-Terry: {error}")
    return Standings(
        elo=elo,
        bradley_terry=strengths,
        first_share=_first_share(comparisons),
        wins=win_matrix(comparisons),
        problems=problems,
    )


def win_matrix(comparisons: Sequence[Game]) -> dict[str, dict[str, Wins]]:
    """Wins and games of each system against each other one that it met."""
    wins: dict[tuple[str, str], float] = defaultdict(float)
    games = Counter[tuple[str, str]]()
    for _, first, second, outcome, _ in comparisons:
        for pair, points in (((first, second), outcome), ((second, first), 1 - outcome)):
            wins[pair] += points
            games[pair] += 1
    systems = sorted({name for pair in games for name in pair})
    return {
        one: {other: Wins(wins=wins[one, other], games=games[one, other]) for other in systems if games[one, other]}
        for one in systems
    }


def _first_share(comparisons: Sequence[Game]) -> float | None:
    decided = [comparison.outcome for comparison in comparisons if comparison.outcome != OUTCOMES[TIE]]
    return sum(decided) / len(decided) if decided else None


def _counts(judged: Judged) -> Counts:
    verdicts = Counter(judgement.verdict for judgement in judged.judgements.values())
    given = sum(verdicts[verdict] for verdict in (FIRST, SECOND, TIE, UNREADABLE))
    return Counts(
        matches=judged.matches,
        first_better=verdicts[FIRST],
        second_better=verdicts[SECOND],
        ties=verdicts[TIE],
        unreadable=verdicts[UNREADABLE],
        missing=judged.matches - given,
        attempts=judged.attempts,
    )


def to_dict(results: Results) -> dict[str, object]:
    """Converts the results to plain dicts, lists, texts and numbers."""
    plain = dataclasses.asdict(results)
    for counts in plain["judges"].values():
        counts["attempts"] = Attempts(*counts["attempts"])._asdict()
    return plain
