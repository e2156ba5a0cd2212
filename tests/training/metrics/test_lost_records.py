"""Records that were lost before a resumed run's checkpoint: a warning says which, and the others stay."""

import re
import warnings
from pathlib import Path

import pytest

from qlora_jax.line_digests import LinesDigest
from qlora_jax.training.metrics.metrics_file import MetricsFile, read_metrics
from tests.training.metrics.test_metrics_file import step_record

STEP = 4
SAVED = [record for step in range(1, STEP + 1) for record in (step_record(step, 2.0), {"step": step, "eval_loss": 3.0})]
TAIL = [step_record(5, 0.5), step_record(6, 0.5)]
BEFORE, AFTER = len(SAVED), len(TAIL)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def saved(path: Path) -> LinesDigest:
    """Writes the records of a run that was killed after its checkpoint; returns what the checkpoint says of them."""
    with MetricsFile(path, 0) as metrics:
        for record in SAVED:
            metrics.write(record)
        saved = metrics.sync()
        for record in TAIL:
            metrics.write(record)
    return saved


def resumed(path: Path, saved: LinesDigest, step: int = STEP) -> tuple[list, list[str]]:
    """Resumes the run; returns its records and the warnings."""
    with warnings.catch_warnings(record=True, action="always") as caught, MetricsFile(path, step, saved=saved):
        pass
    return read_metrics(path) if path.exists() else [], [str(warning.message) for warning in caught]


def test_a_checkpoint_counts_what_was_written_before_and_after_a_resume(path: Path, saved: LinesDigest):
    assert saved["lines"] == BEFORE
    content = path.read_bytes()
    assert resumed(path, saved) == (SAVED, [])
    with MetricsFile(path, STEP, saved=saved) as metrics:
        assert metrics.sync() == saved
        for record in TAIL:
            metrics.write(record)
        longer = metrics.sync()
    assert path.read_bytes() == content and longer["lines"] == BEFORE + AFTER
    assert resumed(path, longer, STEP + AFTER) == (SAVED + TAIL, [])
    assert resumed(path, saved) == (SAVED, [])  # the newest checkpoint was damaged, and the run goes back


def without(*places: int) -> list:
    return [record for place, record in enumerate(SAVED) if place not in places]


def swap(lines: list[bytes], one: int, other: int) -> list[bytes]:
    changed = [*lines]
    changed[one], changed[other] = lines[other], lines[one]
    return changed


LOST = {
    "missing": (lambda lines: None, [], "8"),
    "empty": (lambda lines: [], [], "8"),
    "cut at a line": (lambda lines: lines[:5], SAVED[:5], r"3 \(steps without a record: 4\)"),
    "cut in a line": (lambda lines: [*lines[:5], lines[5][:9]], SAVED[:5], r"3 \(steps without a record: 4\)"),
    "without its end": (lambda lines: [*lines[: BEFORE - 1], lines[BEFORE - 1][:-1]], SAVED, "none"),
    "zeros at the end": (lambda lines: [*lines[:5], bytes(900)], SAVED[:5], r"3 \(steps without a record: 4\)"),
    "a step deleted": (lambda lines: lines[:2] + lines[3:], without(2), r"1 \(steps without a record: 2\)"),
    "an evaluation deleted": (lambda lines: lines[:3] + lines[4:], without(3), "1"),
    "all steps deleted": (lambda lines: lines[1:BEFORE:2], SAVED[1::2], "4"),
    "doubled": (lambda lines: lines[:3] + lines[2:], SAVED, "none"),
    "doubled far away": (lambda lines: lines[:7] + lines[2:], SAVED, "none"),
    "swapped": (lambda lines: swap(lines, 1, 6), SAVED, "none"),
    "swapped in a step": (lambda lines: swap(lines, 0, 1), SAVED, "none"),
    "a digit": (
        lambda lines: [*lines[:2], lines[2].replace(b"2.0", b"2.1"), *lines[3:]],
        without(2),
        r"1 \(steps without a record: 2\)",
    ),
    "not text": (lambda lines: [*lines[:2], b"\xff" + lines[2], *lines[3:]], without(2), "1 .*"),
}


@pytest.mark.parametrize("damage", LOST)
def test_a_warning_says_what_is_lost_and_the_rest_stays(path: Path, saved: LinesDigest, damage: str):
    change, kept, lost = LOST[damage]
    lines = change(path.read_bytes().splitlines(keepends=True))
    if lines is None:
        path.unlink()
    else:
        path.write_bytes(b"".join(lines))
    found, messages = resumed(path, saved)
    assert found == kept
    (message,) = messages
    start = f"{path}: not the records that were saved with the checkpoint of step 4 (found {len(kept)} sound ones, "
    assert message.startswith(f"{start}expected 8). Lost: ")
    assert re.fullmatch(rf"{lost}\. The run continues.*", message.partition("Lost: ")[2]), message


def test_the_damaged_file_is_kept_until_no_line_is_damaged(path: Path, saved: LinesDigest):
    damaged = path.read_bytes().replace(b'"eval_loss": 3.0', b'"eval_loss": 3.5', 1)
    path.write_bytes(damaged)
    for _ in range(2):  # killed before its next checkpoint, the run is resumed from the same one again
        _, (message,) = resumed(path, saved)
        assert path.with_name("metrics.jsonl.damaged").read_bytes() == damaged
    assert message.endswith("Lost: 1. The run continues")


def test_a_run_without_the_lost_records_is_resumed_without_a_warning(path: Path, saved: LinesDigest):
    path.unlink()
    with pytest.warns(UserWarning, match="Lost: 8"), MetricsFile(path, STEP, saved=saved) as metrics:
        for record in TAIL:
            metrics.write(record)
        newer = metrics.sync()
    assert newer["lines"] == AFTER
    assert resumed(path, newer, STEP + AFTER) == (TAIL, [])


def test_a_bit_anywhere_before_the_checkpoint_is_told_and_none_after_it(path: Path, saved: LinesDigest):
    content = path.read_bytes()
    end = len(b"".join(content.splitlines(keepends=True)[:BEFORE]))
    places = [*range(0, end, 71), *range(end - 2, end + 2), *range(end, len(content), 71)]
    for place, bit in [(place, place % 8) for place in places] + [(end - 1, bit) for bit in range(8)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        found, messages = resumed(path, saved)
        assert len(messages) == (place < end), (place, bit)
        assert found == [record for record in SAVED if record in found] and len(found) >= BEFORE - 2, (place, bit)


def test_another_record_with_a_digest_is_not_taken_for_the_lost_one(path: Path, saved: LinesDigest):
    with MetricsFile(path.with_name("other.jsonl"), 0) as other:
        other.write(step_record(2, 9.0))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], path.with_name("other.jsonl").read_bytes(), *lines[3:]]))
    _, (message,) = resumed(path, saved)
    assert message.endswith("Lost: none, but some are others or in another order. The run continues")


def test_samples_have_no_steps(tmp_path: Path):
    path = tmp_path / "samples.jsonl"
    replies = [{"step": step, "prompt": {"prompt": p}, "reply": "x", "end": "stop"} for step in (0, 2) for p in "ab"]
    with MetricsFile(path, 0) as samples:
        for record in replies:
            samples.write(record)
        saved = samples.sync()
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
    found, (message,) = resumed(path, saved)
    assert found == replies[1:] and message.endswith("expected 4). Lost: 1. The run continues")
