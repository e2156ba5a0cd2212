"""metrics.jsonl: one JSON object per line for each step and each evaluation of a run; each has `step`.

A number that is not finite is written as null, because JSON cannot represent it. A line ends with the key `xxh3_64`, a
digest of the line without it, by which a reader notices a changed digit. Earlier versions wrote files without digests.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NotRequired, TypedDict

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from qlora_jax.atomic_files import append_lines, write_text
from qlora_jax.line_digests import warn_without_digests, with_digest, without_digest
from qlora_jax.metadata import JsonObject, MetadataError, decode_json, find_problems

Record = JsonObject  # docs/training.md lists the keys


def _line(record: Record) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return with_digest(json.dumps(finite, allow_nan=False))


class _Step(TypedDict):
    step: PositiveInt
    loss: float | None
    tokens: NonNegativeInt
    supervised_tokens: NonNegativeInt
    length: PositiveInt
    seconds: PositiveFloat
    learning_rate: float
    grad_norm: NotRequired[float | None]
    paging_problems: NotRequired[list[str]]
    router_max_load_by_layer: NotRequired[list[float]]
    router_entropy_by_layer: NotRequired[list[float]]
    router_dead_experts_by_layer: NotRequired[list[float]]


class _Sample(TypedDict):
    step: NonNegativeInt
    prompt: Record
    reply: str
    end: str


class _Evaluation(TypedDict):
    step: NonNegativeInt
    eval_loss: NotRequired[float | None]
    eval_perplexity: NotRequired[float | None]


# The type of a record by a key that only this type has; an evaluation has neither. All other values are numbers.
_KINDS = {"loss": _Step, "reply": _Sample}


def _problems(record: Record) -> list[str]:
    """Returns what a record lacks, and its values of other types."""
    kind = next((kind for key, kind in _KINDS.items() if key in record), _Evaluation)
    others = {key: value for key, value in record.items() if key not in kind.__annotations__}
    halves = [key for key in record if key.endswith("_low") and f"{key.removesuffix('_low')}_high" not in record]
    problems = find_problems(record, kind) + find_problems(others, dict[str, float])
    return problems + [f"{key.removesuffix('_low')}_high: missing" for key in halves]


def _decode(text: str, place: str) -> Record:
    try:
        record = decode_json(text, Record, place)
    except MetadataError as error:
        raise ValueError(f"{place}: found {text[:80]!r}, expected a JSON object. Delete this line") from error
    if problems := _problems(record):
        raise ValueError(f"{place}: not a record of a run ({'; '.join(problems)}). Correct or delete this line")
    return record


def _records(path: Path) -> Iterator[Record]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}. Correct the file") from None
    has_digests = False
    for number, line in enumerate(lines, 1):
        place = f"{path}:{number}"
        try:
            text = without_digest(line, place, required=has_digests)
            record = _decode(text, place)
        except ValueError:
            if number == len(lines) and not line.endswith("\n"):
                return  # a run killed during a write leaves half a line, always the last one
            raise
        has_digests = text != line
        if not has_digests:
            warn_without_digests(path.parent)
        yield record


def read_metrics(path: str | os.PathLike) -> list[Record]:
    """Returns the records of a run in order.

    Raises:
      ValueError: a line that is not a record; names the line.
    """
    return list(_records(Path(path)))


def truncate_after(path: str | os.PathLike, step: int, *, evaluated: bool) -> None:
    """Drops the records that a run resumed from `step` writes again.

    Args:
      evaluated: False if the evaluation of `step` runs again, so that of this step only the record of the step stays.
    """
    kept = [_line(record) for record in _records(Path(path)) if _stays(record, step, evaluated)]
    write_text(Path(path), "".join(kept))


def _stays(record: Record, step: int, evaluated: bool) -> bool:
    of_this_step = evaluated or "loss" in record  # evaluations and samples have no `loss`
    return record["step"] < step or (record["step"] == step and of_this_step)


class MetricsFile:
    """Appends records to a file; each is in it when `write` returns, and on the disk after `sync` or the block."""

    def __init__(self, path: str | os.PathLike, first_step: int, *, evaluated: bool = True):
        """Opens `path` for a run that has done `first_step` steps, and drops later records.

        With `first_step` 0 all records are dropped, because the evaluation of step 0 runs again.

        Args:
          evaluated: False if the evaluation of `first_step` runs again.

        Raises:
          OSError: the file is a link, or cannot be written; names it.
        """
        path = Path(path)
        if os.path.lexists(path):
            append_lines(path).close()
            truncate_after(path, first_step if first_step > 0 else -1, evaluated=evaluated)
        self._path, self._file = path, None

    def write(self, record: Record) -> None:
        """Appends one record; the first one creates the file.

        Raises:
          ValueError: the record lacks `step`.
          OSError: the file cannot be written; names it and the number of bytes.
        """
        if "step" not in record:
            raise ValueError(f"record: `step` is missing (found {sorted(record)}).")
        if self._file is None:
            self._file = append_lines(self._path)
        self._file.write(_line(record))

    def sync(self) -> None:
        """Flushes the records to the disk.

        Raises:
          OSError: records are missing on the disk; names the file.
        """
        if self._file is not None:
            self._file.sync()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
