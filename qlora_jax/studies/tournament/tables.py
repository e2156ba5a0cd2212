"""Prints the results of a tournament as tables."""

import rich.console
from rich import box
from rich.table import Table

from qlora_jax.studies.tournament.ratings.results import Interval
from qlora_jax.studies.tournament.results import Results, Standings

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
        console.print(_counts(results))
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


def _counts(results: Results) -> Table:
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
