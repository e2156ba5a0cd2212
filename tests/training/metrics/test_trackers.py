"""Metrics in TensorBoard's files and in Weights & Biases, and the trace of some steps."""

import contextlib
import gzip
import json
import struct
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from qlora_jax.training.metrics import trackers as module
from qlora_jax.training.metrics.trackers import TRACKERS, scalars, trackers
from qlora_jax.training.run import dry_run
from tests.e2e.project import project
from tests.e2e.tiny_runs import numbers as metrics_of
from tests.e2e.tiny_runs import run

RECORD = {"step": 3, "loss": 1.5, "tokens": 7, "flag": True, "paging_problems": ["x"]}


def events(folder: Path) -> list[tuple[str, int, float]]:
    """(name, step, value) of each event in TensorBoard's files, the oldest file first."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            at += 16 + length
    return found


def test_numbers_are_what_can_be_drawn():
    assert scalars(RECORD) == {"loss": 1.5, "tokens": 7.0}


def test_tensorboard_has_every_number_of_every_step(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX, of the extra `tensorboard`, is not installed")
    with trackers(["tensorboard"], tmp_path, {}, 0) as (log,):
        log(3, scalars(RECORD))
    with trackers(["tensorboard"], tmp_path, {}, 3) as (log,):
        log(4, {"loss": 1.25})
    assert events(tmp_path / "tensorboard") == [("loss", 3, 1.5), ("tokens", 3, 7.0), ("loss", 4, 1.25)]


def test_a_tracker_that_does_not_close_is_given_up(tmp_path, monkeypatch):
    """For example because it waits for a network that is down."""

    @contextlib.contextmanager
    def waiting(*arguments):
        yield lambda step, values: None
        time.sleep(30)

    monkeypatch.setitem(TRACKERS, "wandb", waiting)
    monkeypatch.setattr(module, "CLOSING_SECONDS", 0.2)
    began = time.monotonic()
    with (
        pytest.warns(UserWarning, match=r"wandb not closed within 0\.2 s"),
        trackers(["wandb"], tmp_path, {}, 0) as logs,
    ):
        logs[0](1, {"loss": 1.0})
    assert time.monotonic() - began < 5


def test_an_error_of_the_run_closes_the_trackers_and_is_raised(tmp_path, monkeypatch):
    closed = []

    @contextlib.contextmanager
    def opened(*arguments):
        try:
            yield lambda step, values: None
        finally:
            closed.append(True)

    monkeypatch.setitem(TRACKERS, "wandb", opened)
    with pytest.raises(RuntimeError, match="of the run"), trackers(["wandb"], tmp_path, {}, 0):
        raise RuntimeError("of the run")
    assert closed == [True]


def _wandb_id(folder: Path) -> str:
    """Returns the id in offline-run-TIME-ID; a second folder of the same second is offline-run-TIME-ID-1."""
    return folder.name.split("-")[3]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the library warns
def test_wandb_takes_a_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb, the extra of that name, is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with trackers(["wandb"], tmp_path, {"lora": {"rank": 4}}, 0) as (log,):
        log(3, scalars(RECORD))
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    identity = _wandb_id(file.parent)
    for _ in range(100):  # a separate process writes it, and ends at any time
        if b"loss" in file.read_bytes():
            break
        time.sleep(0.1)
    else:
        raise AssertionError(file.read_bytes())
    with trackers(["wandb"], tmp_path, {"lora": {"rank": 4}}, 3) as (log,):
        log(4, {"loss": 1.25})
    runs = {_wandb_id(folder) for folder in (tmp_path / "wandb").glob("offline-run-*")}
    assert runs == {identity}, "a resumed run is the same run there"


def test_libraries_that_are_not_there_are_told_before_anything_is_loaded(tmp_path, monkeypatch):
    for library in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, library, None)
    config = project(tmp_path, train=dict(track=["tensorboard", "wandb"]))
    with pytest.raises(ValueError, match=r"tensorboard needs tensorboardX, .*\[tensorboard\](?s:.*)wandb needs"):
        dry_run(config, Path(config.output), resume=False, oversized=False, console=Console(quiet=True))
    assert not Path(config.output).exists()


@pytest.mark.slow
def test_a_run_is_tracked_and_traced(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX", reason="tensorboardX, of the extra `tensorboard`, is not installed")
    config = project(tmp_path, train=dict(track=["tensorboard"], trace_steps=2, steps=6))
    folder, open_tracker, there = Path(config.output), TRACKERS["tensorboard"], []

    @contextlib.contextmanager
    def closing_late(*arguments):
        with open_tracker(*arguments) as log:
            yield log
            there.extend(path.name for path in folder.iterdir())

    monkeypatch.setitem(TRACKERS, "tensorboard", closing_late)
    assert run(config)
    assert {"report.html", "loss.png", "run.lock"} <= set(there), "a tracker's upload does not keep the report waiting"
    logged = {(step, round(value, 4)) for name, step, value in events(folder / "tensorboard") if name == "loss"}
    assert logged == {(record["step"], round(record["loss"], 4)) for record in metrics_of(config) if "loss" in record}
    (trace,) = (folder / "trace").rglob("perfetto_trace.json.gz")
    with gzip.open(trace, "rt") as file:
        traced = json.load(file)["traceEvents"]
    assert sum("gradients" in event["name"] for event in traced) >= 2
    assert {event["ph"] for event in traced} >= {"X", "M"}  # Perfetto reports an empty event as an error
