"""A judge whose verdicts were recorded in a file."""

import collections
from collections.abc import Mapping, Sequence

from qlora_jax.data.readers.files import Problem, Row, raise_problems, read_rows
from qlora_jax.evaluation.task_file import read_each
from qlora_jax.progress_reporter import ProgressReporter
from qlora_jax.studies.tournament.judges.judge import VERDICTS, Judgement, Record, Verdict
from qlora_jax.studies.tournament.matches import Match, Transcripts, id_text


class RecordedJudge:
    """Gives the verdicts of a file; matches that are not in it remain without a verdict.

    Attributes:
      verdicts: the verdict on each match of the file, in order.
    """

    remembers = True

    def __init__(self, name: str, verdicts: Mapping[Match, Verdict], reporter: ProgressReporter):
        self.verdicts = verdicts
        self._name, self._reporter = name, reporter

    def inputs(self) -> dict[str, str | int | float | bool | None]:
        """Nothing: the file is read each time."""
        return {}

    def judge(self, matches: Sequence[Match], transcripts: Transcripts, record: Record) -> None:
        """Records the verdict on each match, or none; reports verdicts on other matches."""
        asked = {*matches}
        if unused := [match for match in self.verdicts if match not in asked]:
            self._reporter.message(
                f"{self._name}: {len(unused):,} of {len(self.verdicts):,} verdicts are on systems or prompts that do "
                f"not take part, such as that on {unused[0].first} and {unused[0].second} for the prompt "
                f"{unused[0].prompt}"
            )
        for match in matches:
            record(Judgement(match, self.verdicts.get(match)))


def read_verdicts(path: str) -> dict[Match, Verdict]:
    """Reads rows with question_id, model_a, model_b and verdict: 1 (a is better), 2 (b), 3 (tie) or -1 (unreadable).

    Raises:
      ValueError: rows of another form, or several verdicts on one match; the message lists them.
    """
    rows = read_rows(path)
    verdicts = read_each(path, rows, _read)
    counts = collections.Counter(match for match, _ in verdicts)
    problems: list[Problem] = [
        (row.place, f"one of {counts[match]} verdicts on {match.first} and {match.second}. Leave one of them")
        for row, (match, _) in zip(rows, verdicts, strict=True)
        if counts[match] > 1
    ]
    raise_problems(path, problems, len(rows))
    return dict(verdicts)


def _read(row: Row) -> tuple[Match, Verdict]:
    first, second, verdict = (row.data.get(column) for column in ("model_a", "model_b", "verdict"))
    match = Match(id_text(row, "question_id"), *(_name(key, row.data.get(key)) for key in ("model_a", "model_b")))
    if first == second:
        raise ValueError(f"model_a, model_b: the same system (found {first!r}), expected two. Correct the row")
    if type(verdict) is not int or verdict not in VERDICTS:
        raise ValueError(f"verdict: found {verdict!r}, expected 1, 2, 3 or -1. Correct the row")
    return match, verdict


def _name(column: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{column}: found {value!r}, expected the name of a system. Correct the row")
    return value
