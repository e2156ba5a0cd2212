"""Rows that data.bad_rows drops: counted by reason, and the first ones listed."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qlora_jax.data.readers.files import Place, Problem

LISTED = 20
OTHER_REASONS = "other reasons"
_REASONS = 20  # the most frequent reasons of one file that are listed


class BadRow(NamedTuple):
    """A dropped row: its file, its place there, and its problem."""

    path: str
    line: int
    number: int
    problem: str

    @property
    def where(self) -> str:
        """`file:line` of the row."""
        return f"{self.path}:{Place(self.line, self.number)}"


def first_rows(problems: Sequence[Problem]) -> tuple[BadRow, ...]:
    """Returns the first rows with problems, in the order of their file. The report adds the file's name."""
    return tuple(BadRow("", place.line, place.number, problem) for place, problem in sorted(problems)[:LISTED])


def merge_rows(a: Sequence[BadRow], b: Sequence[BadRow]) -> tuple[BadRow, ...]:
    """Returns the first rows of both."""
    return tuple(sorted((*a, *b))[:LISTED])


def count_reasons(problems: Sequence[Problem]) -> Mapping[str, int]:
    """Returns the number of rows by reason."""
    return merge_reasons(Counter(reason_of(problem) for _, problem in sorted(problems)), {})


def merge_reasons(a: Mapping[str, int], b: Mapping[str, int]) -> Mapping[str, int]:
    """Returns the sums of both; rare reasons become one, so that damaged files do not fill the memory."""
    counts = Counter(a) + Counter(b)
    others = counts.pop(OTHER_REASONS, 0)
    kept = dict(counts.most_common(_REASONS))
    others += counts.total() - sum(kept.values())
    return kept | ({OTHER_REASONS: others} if others else {})


def reason_of(problem: str) -> str:
    """Returns a row's first problem without what differs from row to row: numbers, and the text that was found."""
    first = problem.split("; ")[0]
    general = re.sub(r" at column \d+.*| \(found .*|, found .*", "", first, flags=re.DOTALL)
    return re.sub(r"\d+", "N", general)[:120]


def all_bad_message(path: str, total: int, reasons: Mapping[str, int], rows: Sequence[BadRow]) -> str:
    """Returns the error message for a file all of whose rows are dropped."""
    counted = "".join(f"\n  {count:,}: {reason}" for reason, count in reasons.items())
    first = "".join(f"\n  the first: {path}:{Place(row.line, row.number)}: {row.problem}" for row in rows[:1])
    return f"{path}: data.bad_rows drop leaves no row, because none of {total:,} can be used:{counted}{first}"
