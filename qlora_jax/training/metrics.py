"""metrics.jsonl: one JSON object a line for each step and each evaluation of a run, `step` in all of them.

A number that is not finite is written as null, for JSON has no word for it.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def _line(record: Record) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _records(path: Path) -> Iterator[Record]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines) and not line.endswith("\n"):
                return  # a run killed while it wrote leaves half a line, and it can only be the last
            raise ValueError(f"{path}:{number}: found {line[:80]!r}, expected a JSON object with `step`") from error
        yield record


def read_metrics(path: str | os.PathLike) -> list[Record]:
    """The records of a run in the order they were written; raises ValueError with the line of anything else."""
    return list(_records(Path(path)))


def truncate_after(path: str | os.PathLike, step: int) -> None:
    """Drops what was written after `step`: a run that goes on from there writes it again."""
    kept = [_line(record) for record in _records(Path(path)) if record["step"] <= step]
    part = Path(f"{os.fspath(path)}.part")
    part.write_text("".join(kept), encoding="utf-8")
    part.replace(path)


class MetricsFile:
    """Appends records to a file, each on disk's way (flushed) before `write` returns."""

    def __init__(self, path: str | os.PathLike, first_step: int):
        """Opens `path` for a run that has done `first_step` steps; what stands there after them is dropped.

        For 0 that is everything: the evaluation of step 0 comes again.
        """
        path = Path(path)
        if path.exists():
            truncate_after(path, first_step if first_step > 0 else -1)
        self._path, self._file = path, None

    def write(self, record: Record) -> None:
        """Appends one record, which has `step`; the first makes the file."""
        if "step" not in record:
            raise ValueError(f"a record needs `step`; found {sorted(record)}")
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(_line(record))
        self._file.flush()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
