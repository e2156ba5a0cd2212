"""The page of a tournament's results."""

from collections.abc import Mapping, Sequence

from qlora_jax.page_template import page_template
from qlora_jax.studies.tournament.examples import Example, Examples
from qlora_jax.studies.tournament.judges.judge import FIRST, SECOND, TIE
from qlora_jax.studies.tournament.matches import Transcripts
from qlora_jax.studies.tournament.ratings.games import EloRating, SystemRating
from qlora_jax.studies.tournament.results import (
    COUNT_TITLES,
    Results,
    Standings,
    agreement_lines,
    count_rows,
    interval_text,
    note_lines,
    ranking_rows,
)

MOST_TINT = 60  # percent of the colour of a cell that won or lost everything


def results_page(title: str, results: Results, examples: Sequence[Examples], transcripts: Transcripts) -> str:
    """Returns the page as HTML."""
    verdicts = f"{results.prompts:,} prompt{'s' * (results.prompts != 1)} with a verdict"
    return page_template(__package__, "results.html.jinja").render(
        title=title,
        summary=f"{len(results.systems)} systems, {len(results.judges)} judge{'s' * (len(results.judges) != 1)}"
        + f", {verdicts if results.prompts else 'no verdict yet'}",
        groups=[_group(name, one) for name, one in results.standings.items()],
        counts=count_rows(results),
        count_titles=COUNT_TITLES,
        stopped=[*results.stopped.items()],
        agreement=agreement_lines(results),
        problems=results.problems,
        examples=[
            {"rule": one.rule, "examples": [_example(each, transcripts) for each in one.examples]} for one in examples
        ],
    )


def _group(name: str, standings: Standings) -> Mapping[str, object]:
    rows = ranking_rows(standings)
    names = [row[0] for row in rows] or sorted(standings.wins)
    return {
        "name": name,
        "ranking": _ranges(standings),
        "scale": _scale(standings),
        "elo": rows,
        "problems": standings.problems,
        "notes": note_lines(standings),
        "names": names,
        "wins": {
            one: {other: _cell(cell.wins, cell.games) for other, cell in standings.wins.get(one, {}).items()}
            for one in names
        },
    }


def _cell(wins: float, games: int) -> Mapping[str, object]:
    share = wins / games
    return {"share": share, "text": f"{share:.0%}", "games": games, "tint": round(MOST_TINT * abs(2 * share - 1))}


def _rated(standings: Standings) -> Sequence[SystemRating | EloRating]:
    """The ratings to draw: Bradley-Terry, or Elo without it."""
    rating = standings.bradley_terry or standings.elo
    return rating.systems if rating else []


def _ranges(standings: Standings) -> list[Mapping[str, object]]:
    """Rating and interval of each system, as places on a common scale in percent."""
    rated = _rated(standings)
    if not rated:
        return []
    low, high = min(one.interval[0] for one in rated), max(one.interval[1] for one in rated)
    margin = max(1.0, 0.05 * (high - low))

    def at(points: float) -> float:
        return round(100 * (points - low + margin) / (high - low + 2 * margin), 2)

    return [
        {
            "system": one.system,
            "label": f"{one.rating:.0f} {interval_text(one.interval)}",
            "at": at(one.rating),
            "left": at(one.interval[0]),
            "width": round(at(one.interval[1]) - at(one.interval[0]), 2),
        }
        for one in rated
    ]


def _scale(standings: Standings) -> str:
    if standings.bradley_terry is not None:
        return "Bradley-Terry with ties, position bias removed, in Elo points; 95 % intervals over prompts."
    return "Elo, mean over random orders of the judgements; 95 % intervals over prompts."


def _example(example: Example, transcripts: Transcripts) -> Mapping[str, object]:
    judgement, match = example.judgement, example.judgement.match
    texts = match.prompt in transcripts.prompts
    replies = transcripts.answers(match) if texts else (None, None)
    verdicts = {FIRST: f"{match.first} is better", SECOND: f"{match.second} is better", TIE: "tie"}
    return {
        "prompt": match.prompt,
        "judge": example.judge,
        "verdict": verdicts.get(judgement.verdict or 0, "unreadable"),
        "question": transcripts.question(match) if texts else None,
        "replies": [*zip((match.first, match.second), replies, strict=True)],
        "review": judgement.review,
    }
