"""metrics.jsonl: one JSON object per line for each step and each evaluation of a run; each has `step`.

A number that is not finite is written as null, because JSON cannot represent it. A line ends with the key `xxh3_64`, a
digest of the line without it, by which a reader notices a changed digit. A checkpoint contains a digest of all lines
before it, by which a resumed run notices a lost line. Earlier versions wrote files and checkpoints without digests.
"""

import json
import math
import os
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NotRequired, TypedDict

import xxhash
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from qlora_jax.atomic_files import append_lines, write_bytes
from qlora_jax.hosts.rank_text import ranges
from qlora_jax.line_digests import LinesDigest, warn_without_digests, with_digest, without_digest
from qlora_jax.untrusted_json import JsonObject, MetadataError, decode_json, find_problems

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"  # in a run's folder, with its report:
PAGE_FILE, JSON_FILE = "report.html", "report.json"

_OVERLAP = 200  # bytes before the end of the lines read so far; if they change, the file was replaced

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


def _by_step(path: Path, step: int, evaluated: bool) -> bytes:
    """Returns the lines that a run resumed from `step` does not write again."""
    return "".join(_line(record) for record in _records(path) if _stays(record, step, evaluated)).encode()


def _stays(record: Record, step: int, evaluated: bool) -> bool:
    of_this_step = evaluated or "loss" in record  # evaluations and samples have no `loss`
    return record["step"] < step or (record["step"] == step and of_this_step)


def _at_checkpoint(path: Path, content: bytes, step: int, evaluated: bool, saved: LinesDigest) -> bytes:
    """Returns the lines that were saved with the checkpoint of `step`; if some are lost, the others, with a warning."""
    lines = [line + b"\n" for line in content.split(b"\n")]
    head = b"".join(lines[: saved["lines"]])
    if content.startswith(head) and _is_saved(head, saved):
        return head
    sound = {line: record for line in lines if (record := _sound(line)) is not None}
    records = {line: record for line, record in sound.items() if _stays(record, step, evaluated)}
    ordered = sorted(records.items(), key=lambda item: (item[1]["step"], "loss" not in item[1]))
    kept = b"".join(line for line, _ in ordered)
    message = f"{path}: not the records that were saved with the checkpoint of step {step}"
    message += f" (found {len(records)} sound ones, expected {saved['lines']}). Lost: "
    message += "none" if _is_saved(kept, saved) else _lost(records.values(), step, saved)
    message += ". The run continues"
    if set(lines) - {*sound, b"\n"}:
        write_bytes(path.with_name(f"{path.name}.damaged"), content)
        message += f"; the damaged lines are in {path.name}.damaged"
    warnings.warn(message, stacklevel=2)
    return kept


def _is_saved(content: bytes, saved: LinesDigest) -> bool:
    return xxhash.xxh3_128_hexdigest(content) == saved["xxh3_128"]


def _sound(line: bytes) -> Record | None:
    """Returns the record of a line that is as it was written, otherwise None."""
    try:
        return _decode(without_digest(line.decode(), "", required=True), "")
    except ValueError:
        return None


def _lost(records: Collection[Record], step: int, saved: LinesDigest) -> str:
    """Returns which of the records that were saved with the checkpoint of `step` are not among those found."""
    lost, steps = saved["lines"] - len(records), {record["step"] for record in records if "loss" in record}
    if lost <= 0:
        return "none, but some are others or in another order"
    missing = sorted(set(range(1, step + 1)) - steps) if steps else []  # samples.jsonl has no steps
    return f"{lost}" + (f" (steps without a record: {ranges(missing)})" if missing else "")


class RecordTail:
    """The records of a file to which another process appends, perhaps on another machine.

    Attributes:
      records: those of all complete, sound lines, in order.
      damaged: the number of other complete lines.
    """

    def __init__(self, path: Path):
        self._path = path
        self._begin(None)

    def _begin(self, identity: tuple[int, int] | None) -> None:
        self.records: list[Record] = []
        self.damaged = 0
        self._identity, self._end, self._last, self._has_digests = identity, 0, b"", False

    def read(self) -> bool:
        """Reads the lines that were added, or all lines of a file that was replaced; returns True if there are any.

        Raises:
          OSError: the file exists and cannot be read.
        """
        if not self._path.is_file():
            was_there = self._identity is not None
            self._begin(None)
            return was_there
        with self._path.open("rb") as file:
            status = os.fstat(file.fileno())
            file.seek(self._end - len(self._last))
            content = file.read()
            replaced = self._identity != (status.st_dev, status.st_ino) or not content.startswith(self._last)
            if replaced:  # a resumed run writes a new file, without the records that it computes again
                self._begin((status.st_dev, status.st_ino))
                file.seek(0)
                content = file.read()
        added = content[len(self._last) : content.rfind(b"\n") + 1]
        for line in added.split(b"\n")[:-1]:
            self._add(line)
        self._end += len(added)
        self._last = (self._last + added)[-_OVERLAP:]
        return replaced or bool(added)

    def _add(self, line: bytes) -> None:
        try:
            text = without_digest(line.decode(), "", required=self._has_digests)
            self.records.append(_decode(text, ""))
        except ValueError:
            self.damaged += 1
        else:
            self._has_digests = text != line.decode()


class MetricsFile:
    """Appends records to a file; each is in it when `write` returns, and on the disk after `sync` or the block.

    Attributes:
      path: the file.
    """

    def __init__(
        self, path: str | os.PathLike, first_step: int, *, evaluated: bool = True, saved: LinesDigest | None = None
    ):
        """Opens `path` for a run that has done `first_step` steps, and drops later records.

        A new run, with `first_step` 0 and no saved lines, drops all records.

        Args:
          evaluated: False if the evaluation of `first_step` runs again.
          saved: the lines at the checkpoint of `first_step`. If some are lost, the others stay, with a warning. None if
            the run has none, or that of an earlier version: then lost lines go unnoticed.

        Raises:
          OSError: the file is a link, or cannot be written; names it.
        """
        self.path, self._file, exists = Path(path), None, os.path.lexists(path)
        if exists:
            append_lines(self.path).close()
        content, kept = self.path.read_bytes() if exists else b"", b""
        if saved is not None:
            kept = _at_checkpoint(self.path, content, first_step, evaluated, saved)
        elif first_step > 0 and exists:
            kept = _by_step(self.path, first_step, evaluated)
        if exists:
            write_bytes(self.path, kept)
        self._lines, self._digest = kept.count(b"\n"), xxhash.xxh3_128(kept)

    def write(self, record: Record) -> None:
        """Appends one record; the first one creates the file.

        Raises:
          ValueError: the record lacks `step`.
          OSError: the file cannot be written; names it and the number of bytes.
        """
        if "step" not in record:
            raise ValueError(f"record: `step` is missing (found {sorted(record)}).")
        if self._file is None:
            self._file = append_lines(self.path)
        line = _line(record)
        self._file.write(line)
        self._lines += 1
        self._digest.update(line.encode())

    def sync(self) -> LinesDigest:
        """Flushes the records to the disk, and returns the digest of their lines.

        Raises:
          OSError: records are missing on the disk; names the file.
        """
        if self._file is not None:
            self._file.sync()
        return LinesDigest(lines=self._lines, xxh3_128=self._digest.hexdigest())

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
