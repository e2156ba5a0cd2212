"""The state of a run as its folder shows it, for pages: while it trains, after it ended, and on another machine's disk.

Only the files of the run are read, and of the records only what was added since the last time. No lock is taken, and
nothing is written. It does not need jax.
"""

import collections
import dataclasses
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypedDict

from qlora_jax.config import Config, ConfigError, read_config
from qlora_jax.config.sizes import format_bytes
from qlora_jax.io.run_folder.run_lock import CONFIG_FILE, LOCK_FILE, read_holder
from qlora_jax.terminal.visible import visible, without_passwords
from qlora_jax.training.early_stopping import BestEvaluation
from qlora_jax.training.metrics.metrics_file import (
    JSON_FILE,
    METRICS_FILE,
    PAGE_FILE,
    SAMPLES_FILE,
    Record,
    RecordTail,
)
from qlora_jax.training.metrics.record_summaries import LOSS, Sample, before_and_after
from qlora_jax.training.report.curves import Chart, charts, loss_chart, thinned, warm
from qlora_jax.training.report.plot import loss_label
from qlora_jax.training.report.tiles import result_tiles
from qlora_jax.untrusted_json import MetadataError, read_json, read_text

State = Literal["waiting", "starting", "training", "stopped", "finished", "not a run"]

REPORT_BYTES = 64 << 20  # largest report.json
_POINTS = 500  # at most, per curve
_WINDOW = 20  # steps from which the remaining time follows
_SEEN = 100  # times at which the records had grown
_LONG, _REST = 0.5, 20  # seconds of a summary that is followed by a rest, of so many times as long
SECOND = 1_000_000_000  # nanoseconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run at one moment.

    Attributes:
      state: waiting: for a folder or its first file. starting: no step is recorded yet. stopped: before its last step.
      message: the state in words.
      base: the model that the run started from; None if its settings cannot be read.
      step: the last recorded optimizer step.
      total_steps: None if it is not known.
      seconds_left: None unless the run trains.
      written: when the last record was written, in seconds since 1970 by the clock of the disk.
      tiles: names and values of the results so far.
      loss: the curves of the loss.
      charts: the other curves.
      samples: prompts with their first and last replies.
      settings: the text of config.yaml.
      problems: of the run's files, one line each.
    """

    name: str
    state: State
    message: str
    base: str | None = None
    step: int = 0
    total_steps: int | None = None
    seconds_left: float | None = None
    written: int | None = None
    tiles: Sequence[tuple[str, str]] = ()
    loss: Chart | None = None
    charts: Sequence[Chart] = ()
    samples: Sequence[Sample] = ()
    settings: str = ""
    problems: Sequence[str] = ()

    def to_json(self) -> dict[str, object]:
        """Returns the status for a page: curves of at most 500 points, and texts without control characters."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found |= {"loss": self.loss and _chart_json(self.loss), "charts": [*map(_chart_json, self.charts)]}
        found["samples"] = [sample._asdict() for sample in self.samples]
        return {name: _shown(value) for name, value in found.items()}


def run_status(folder: Path) -> RunStatus:
    """Reads a run once; `RunReader` reads it again and again."""
    return RunReader(folder).read()


class _MemoryPlan(TypedDict):
    device_bytes: dict[str, int]
    questions_bytes: int | None


class _Data(TypedDict):
    steps: list[int]  # per epoch, at each length


class _Report(TypedDict):
    """The part of report.json that is read here."""

    data: _Data
    memory_plan: _MemoryPlan


class _File[T]:
    """A whole file, which is read again when it has changed.

    Attributes:
      value: its content; None if it does not exist or is not what it should be.
      problems: why it is not.
    """

    def __init__(self, path: Path, read: Callable[[Path], T]):
        self._path, self._read = path, read
        self._stamp: int | None = None
        self.value: T | None = None
        self.problems: list[str] = []

    def refresh(self) -> bool:
        """Reads a file that has changed; returns False if it has not."""
        stamp = _changed_at(self._path)
        if stamp == self._stamp:
            return False
        self._stamp, self.value, self.problems = stamp, None, []
        try:
            self.value = None if stamp is None else self._read(self._path)
        except (ConfigError, MetadataError) as error:
            self.problems = [str(error) if str(self._path) in str(error) else f"{self._path}: {error}"]
        return True


class RunReader:
    """Reads the run in a folder as often as it is asked, in any thread; the folder need not exist yet."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = threading.Lock()
        self._metrics, self._samples = (RecordTail(folder / name) for name in (METRICS_FILE, SAMPLES_FILE))
        self._config, self._text = _File(folder / CONFIG_FILE, read_config), _File(folder / CONFIG_FILE, read_text)
        self._report = _File(folder / JSON_FILE, lambda path: read_json(path, _Report, REPORT_BYTES))
        self._stamp: object = None
        self._is_old, self._rests_until = True, 0.0
        self._status = RunStatus(name=folder.resolve().name, state="waiting", message="")
        self._grown: collections.deque[tuple[int, int]] = collections.deque(maxlen=_SEEN)

    def read(self) -> RunStatus:
        """Returns the state of the run now; the same object if nothing has changed.

        A run of very many steps is summarized less often, so that its page takes little from its training.
        An error of the disk, such as that of a share that is away for a moment, is one of its problems.
        """
        with self._lock:
            try:
                parts = (self._metrics.read, self._samples.read)
                parts += tuple(file.refresh for file in (self._config, self._text, self._report))
                changed = [part() for part in parts]
                stamp = _kind(self.folder), read_holder(self.folder)
                self._is_old |= any(changed)
                if stamp != self._stamp or (self._is_old and time.monotonic() >= self._rests_until):
                    began = time.monotonic()
                    self._status, self._stamp, self._is_old = self._current(*stamp), stamp, False
                    took = time.monotonic() - began
                    self._rests_until = began + (_REST * took if took > _LONG else 0.0)
            except OSError as error:
                self._stamp = None
                return dataclasses.replace(self._status, problems=[f"{error.filename}: {error.strerror}"])
            return self._status

    def _current(self, kind: "_Kind", holder: tuple[str, bool] | None) -> RunStatus:
        name = self._status.name
        if kind != "a run":
            return RunStatus(name=name, state=kind, message=_absence(self.folder, kind))
        config, report = self._config.value, self._report.value
        records = sorted(self._metrics.records, key=lambda record: record["step"])
        step = max((record["step"] for record in records), default=0)
        total, planned = config and config.train.steps, None
        if config and report:
            total = config.train.total_steps(sum(report["data"]["steps"]))
        if report:
            plan = report["memory_plan"]
            planned = max(sum(plan["device_bytes"].values()), plan["questions_bytes"] or 0)
        state, message = _state(config, records, holder, total)
        if state != "training":
            self._grown.clear()
        written, title = _changed_at(self.folder / METRICS_FILE), loss_label(config.objective if config else "sft")
        return RunStatus(
            name=name,
            state=state,
            message=message,
            base=config and without_passwords(config.model.path),
            step=step,
            total_steps=total,
            seconds_left=self._seconds_left(records, total, written) if state == "training" else None,
            written=written and written // SECOND,
            tiles=[*result_tiles(records), *_memory(records)],
            loss=loss_chart(records, f"{title[0].upper()}{title[1:]}"),
            charts=charts(records, planned),
            samples=before_and_after(self._samples.records),
            settings=without_passwords(self._text.value or ""),
            problems=[*map(without_passwords, self._problems())],
        )

    def _problems(self) -> list[str]:
        damaged = {METRICS_FILE: self._metrics.damaged, SAMPLES_FILE: self._samples.damaged}
        return [*self._config.problems, *self._report.problems] + [
            f"{self.folder / name}: lines that are not records are left out (found {count})"
            for name, count in damaged.items()
            if count
        ]

    def _seconds_left(self, records: Sequence[Record], total: int | None, written: int | None) -> float | None:
        """Returns the remaining seconds at the pace of the last steps.

        Times at which the file had grown include evaluations and checkpoints. Until they span enough steps, the times
        in the records count, which do not.
        """
        steps = [record for record in records if "loss" in record]
        if total is None or written is None or not steps:
            return None
        last = steps[-1]["step"]
        if self._grown and self._grown[-1][1] > last:
            self._grown.clear()
        if not self._grown or self._grown[-1][1] < last:
            self._grown.append((written, last))
        (first_time, first), (last_time, _) = self._grown[0], self._grown[-1]
        if last - first >= _WINDOW:
            return (total - last) * (last_time - first_time) / (last - first) / SECOND
        recent = [record["seconds"] + record.get("data_seconds", 0.0) for record in warm(steps)[-_WINDOW:]]
        return (total - last) * statistics.fmean(recent) if recent else None


_Kind = Literal["waiting", "a run", "not a run"]


def _kind(folder: Path) -> _Kind:
    if not folder.exists():
        return "waiting"
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else {""}
    if names & {CONFIG_FILE, LOCK_FILE}:
        return "a run"
    return "waiting" if names <= {PAGE_FILE, JSON_FILE} else "not a run"  # a dry run writes a report


def _absence(folder: Path, kind: _Kind) -> str:
    """Says why a folder does not show a run."""
    if kind == "waiting":
        return f"waits for a run in {folder}" + ("" if folder.exists() else ", which does not exist yet")
    return f"{folder}: not a run folder ({CONFIG_FILE} is missing). Give the folder that training writes (output)"


def _state(
    config: Config | None, records: Sequence[Record], holder: tuple[str, bool] | None, total: int | None
) -> tuple[State, str]:
    if holder is not None and holder[1]:
        state: State = "training" if records else "starting"
        return state, f"{state}: {holder[0]}"
    best = BestEvaluation()
    for record in records:
        best = best.updated(record["step"], record[LOSS]) if record.get(LOSS) is not None else best
    if total is not None and records and records[-1]["step"] >= total:
        return "finished", "finished"
    if config is not None and best.should_stop(config.train.patience):
        return "finished", f"finished after {best.since} evaluations without a lower held-out loss"
    return "stopped", "stopped" if holder is None else f"stopped: {holder[0]} has ended without saving"


def _changed_at(file: Path) -> int | None:
    """Returns when a file changed, in nanoseconds; None if it does not exist."""
    try:
        return file.stat().st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return None


def _memory(records: Sequence[Record]) -> list[tuple[str, str]]:
    last = next((record for record in reversed(records) if "loss" in record), {})
    names = {"device_bytes": "device memory", "device_peak_bytes": "device memory, peak", "host_bytes": "host memory"}
    return [(name, format_bytes(int(last[key]))) for key, name in names.items() if last.get(key) is not None]


def _chart_json(chart: Chart) -> dict[str, object]:
    lines = [thinned(line, _POINTS)._asdict() for line in chart.lines]
    return {"title": chart.title, "from_zero": chart.from_zero, "lines": lines}


def _shown(value: object) -> object:
    """Returns a value for JSON: numbers with six digits, null for those that are not finite, and text that is safe."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {visible(str(name)): _shown(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(each) for each in value]
    return value
