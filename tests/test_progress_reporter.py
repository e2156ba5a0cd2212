"""Progress reaches a console as lines, and nobody if nobody asked for it."""

import io
import re

import pytest

from qlora_jax.progress_reporter import ConsoleReporter, ProgressReporter
from qlora_jax.terminal.console import Console


def printed_by(total: int | None, stored: int, counts: list[int]) -> str:
    out = io.StringIO()
    with ConsoleReporter(Console(file=out)).counting("replies", total, stored) as progress:
        for count in counts:
            progress(count)
    return re.sub(r"in \d+ s", "in N s", out.getvalue())


@pytest.mark.parametrize(
    ("total", "stored", "counts", "line"),
    [
        (1200, 0, [600, 1200], "replies: 1,200 of 1,200 in N s"),
        (5, 2, [3, 4, 5], "replies: 5 of 5 in N s (2 stored before)"),
        (5, 5, [], "replies: 5 of 5 in N s (5 stored before)"),
        (None, 0, [7], "replies: 7 in N s"),
    ],
)
def test_the_number_of_results_is_printed_once(total, stored, counts, line):
    assert printed_by(total, stored, counts) == f"{line}\n"


def test_work_that_fails_reports_how_far_it_came():
    out = io.StringIO()
    with pytest.raises(RuntimeError), ConsoleReporter(Console(file=out)).counting("replies", 9) as progress:
        progress(4)
        raise RuntimeError
    assert out.getvalue().startswith("replies: 4 of 9 in ")


def test_the_default_prints_nothing(capfd):
    reporter = ProgressReporter()
    reporter.message("text")
    with reporter.loading() as loading, reporter.counting("replies", 2) as progress:
        progress(2)
    assert loading is None
    assert capfd.readouterr() == ("", "")
