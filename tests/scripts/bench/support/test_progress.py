"""Progress of benchmarks: a line per phase and at the end, on standard error alone."""

import subprocess
import sys

import pytest

from scripts.bench.support import interleave
from tests.scripts.bench.support.test_interleave import COUNTS, python

PHASES = """
from scripts.bench.support.progress import phase, phases
phase("reading")
print([*phases("round", range(2))], [*phases("case", ["a", "b"])])
"""


def words_of(errors: str) -> list[str]:
    """The lines without their seconds."""
    assert all(line.startswith("[") and line[1:].split()[1] == "s]" for line in errors.splitlines())
    return [line.partition("] ")[2] for line in errors.splitlines()]


def test_each_phase_and_the_end_have_a_line():
    done = subprocess.run([sys.executable, "-c", PHASES], check=True, capture_output=True, text=True)
    assert done.stdout == "[0, 1] ['a', 'b']\n"
    assert words_of(done.stderr) == ["reading", "round 1 of 2", "round 2 of 2", "case a", "case b", "end"]


def test_workers_tell_when_they_start_and_each_of_their_blocks(capsys: pytest.CaptureFixture[str]):
    with interleave.WorkerGroup() as group:
        group.start("ours", python(COUNTS))
        group.start("theirs", python(COUNTS))
        group.run(2)
    shown = capsys.readouterr()
    blocks = [f"{name}: block {block} of 2" for block in (1, 2) for name in ("ours", "theirs")]
    assert (shown.out, words_of(shown.err)) == ("", ["ours: starts", "theirs: starts", *blocks])
