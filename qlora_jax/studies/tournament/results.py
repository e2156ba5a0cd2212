"""Results of a tournament, and their tables: ratings, wins, position bias and failures of judges, and agreement."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import rich.console
from rich import box
from rich.table import Table

from qlora_jax.studies.tournament.agreement import Agreement, agreement
from qlora_jax.studies.tournament.judges.judge import FIRST, OUTCOMES, SECOND, TIE, UNREADABLE, Attempts
from qlora_jax.studies.tournament.judging import Judged
from qlora_jax.studies.tournament.matches import Game
from qlora_jax.studies.tournament.ratings.elo import elo_ratings
from qlora_jax.studies.tournament.ratings.games import BradleyTerryRatings, EloRatings, Interval
from qlora_jax.studies.tournament.ratings.mle import bradley_terry
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


# The last three count attempts, also those that a later attempt made good.
COUNT_TITLES = (
    *("matches", "first better", "second better", "ties", "unreadable", "missing"),
    *("failed attempts", "timed-out attempts", "unreadable attempts"),
)


def print_results(results: Results, console: rich.console.Console) -> None:
    """Prints a ranking per judge, the counts of verdicts, the agreement, and all problems."""
    for name, one in results.standings.items():
        console.print(f"Ranking by {name}", style="bold", markup=False, highlight=False)
        console.print(_ranking(one))
        for line in [*note_lines(one), *one.problems]:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
        console.print()
    if results.judges:
        console.print(_count_cells(results))
    for line in [*agreement_lines(results), *results.problems]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for name, problem in results.stopped.items():
        console.print(f"{name} stopped: {problem}", style="bold", markup=False, highlight=False, soft_wrap=True)


def interval_text(interval: Interval, digits: int = 0) -> str:
    """An interval in brackets."""
    return f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def agreement_lines(results: Results) -> list[str]:
    """One line per pair of judges, and one for all of them."""
    if results.agreement is None:
        return []
    lines = []
    for pair in results.agreement.pairs:
        kappa = pair.cohen_kappa
        numbers = [
            f"Cohen's kappa {kappa.value:.2f}" + (f" {interval_text(kappa.interval, 2)}" if kappa.interval else "")
            if kappa
            else "Cohen's kappa not defined",
            *([f"Spearman {pair.spearman:.2f}"] if pair.spearman is not None else []),
            *([f"Kendall {pair.kendall:.2f}"] if pair.kendall is not None else []),
        ]
        lines.append(f"{pair.first} and {pair.second} ({pair.items:,} pairs of replies): {', '.join(numbers)}")
    if len(results.agreement.judges) > 2 and (fleiss := results.agreement.fleiss_kappa) is not None:
        interval = f" {interval_text(fleiss.interval, 2)}" if fleiss.interval else ""
        lines.append(
            f"all judges ({results.agreement.items:,} pairs of replies): Fleiss' kappa {fleiss.value:.2f}{interval}"
        )
    return lines


def ranking_rows(standings: Standings) -> list[tuple[str, str, str, str]]:
    """(system, Bradley-Terry, Elo, range of Elo in one ordering) of each system, the best first."""
    elo = {one.system: one for one in standings.elo.systems} if standings.elo else {}
    strengths = {one.system: one for one in standings.bradley_terry.systems} if standings.bradley_terry else {}
    rows = []
    for name in strengths or elo:
        strength, points = strengths.get(name), elo.get(name)
        rows.append(
            (
                name,
                f"{strength.rating:.0f} {interval_text(strength.interval)}" if strength else "",
                f"{points.rating:.0f} {interval_text(points.interval)}" if points else "",
                interval_text(points.ordering_range) if points else "",
            )
        )
    return rows


def _ranking(standings: Standings) -> Table:
    table = Table("", box=box.SIMPLE_HEAD)
    for title in ("Bradley-Terry", "Elo", "Elo in one order"):
        table.add_column(title, justify="right")
    for row in ranking_rows(standings):
        table.add_row(*row)
    return table


def note_lines(standings: Standings) -> list[str]:
    """Lines on position bias and ties."""
    lines = []
    if standings.first_share is not None:
        lines.append(f"{100 * standings.first_share:.1f} % of the wins are of the reply that was seen first.")
    strengths = standings.bradley_terry
    if strengths is not None and strengths.position is not None:
        value, interval = strengths.position.value, interval_text(strengths.position.interval)
        lines.append(f"Position bias, removed from Bradley-Terry: {value:+.0f} points {interval} for the first reply.")
    if strengths is not None and strengths.tie_share is not None:
        value, (low, high) = 100 * strengths.tie_share.value, strengths.tie_share.interval
        lines.append(f"Ties between equal systems: {value:.1f} % [{100 * low:.1f}, {100 * high:.1f}].")
    return lines


def _count_cells(results: Results) -> Table:
    table = Table("judge", box=box.SIMPLE_HEAD)
    for title in COUNT_TITLES:
        table.add_column(title, justify="right")
    for name, row in count_rows(results):
        table.add_row(name, *row)
    return table


def count_rows(results: Results) -> list[tuple[str, list[str]]]:
    """(judge, its counts as texts): verdicts, and attempts that failed, timed out or were unreadable."""
    return [
        (
            name,
            [
                f"{number:,}"
                for number in (
                    counts.matches,
                    counts.first_better,
                    counts.second_better,
                    counts.ties,
                    counts.unreadable,
                    counts.missing,
                    *counts.attempts,
                )
            ],
        )
        for name, counts in results.judges.items()
    ]
