"""Reporters of a run: files, display, trackers, and the function of a caller."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from qlora_jax.line_digests import LinesDigest
from qlora_jax.training.display.run_display import Display
from qlora_jax.training.metrics.metrics_file import METRICS_FILE, SAMPLES_FILE, MetricsFile, Record
from qlora_jax.training.metrics.trackers import Log, scalars
from qlora_jax.training.resume import TrainState


class Listener:
    """The caller's function that receives each record of a step and an evaluation, and may ask to stop.

    Args:
      listen: returns True to stop the run; it gets a copy of the record.
    """

    def __init__(self, listen: Callable[[Record], bool] = lambda record: False):
        self._listen, self.stops = listen, False

    def __call__(self, record: Record) -> None:
        self.stops |= self._listen(dict(record))


class FileReporter:
    """Writes each record to metrics.jsonl, displays it, and sends it to trackers and to the caller."""

    def __init__(
        self, metrics: MetricsFile, samples: MetricsFile, display: Display, logs: Sequence[Log], listener: Listener
    ):
        self._metrics, self._samples, self._display, self._logs = metrics, samples, display, logs
        self._listener = listener

    def step(self, record: Record) -> None:
        self._write(record)
        self._display.step(record)
        self._listener(record)

    def evaluation(self, record: Record) -> None:
        self._write(record)
        self._display.evaluation(record)
        self._listener(record)

    def evaluation_progress(self, text: str) -> None:
        self._display.evaluation_progress(text)

    def samples(self, records: list[Record]) -> None:
        for record in records:
            self._samples.write(record)
        self._display.samples(records)

    def flush(self) -> Mapping[str, LinesDigest]:
        return {file.path.name: file.sync() for file in (self._metrics, self._samples)}

    def _write(self, record: Record) -> None:
        self._metrics.write(record)
        for log in self._logs:
            log(record["step"], scalars(record))


@contextlib.contextmanager
def file_reporter(
    state: TrainState, display: Display, logs: Sequence[Log], run: Path, listener: Listener
) -> Iterator[FileReporter]:
    """Opens the files of a run's records, and yields its reporter."""
    metrics, samples = (
        MetricsFile(run / name, state.step, evaluated=not state.evaluation_due, saved=state.records.get(name))
        for name in (METRICS_FILE, SAMPLES_FILE)
    )
    with metrics, samples:
        yield FileReporter(metrics, samples, display, logs, listener)
