"""Performs one run, on any machine: trains or resumes it, scores it, and writes its outcome."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from qlora_jax.atomic_files import write_text
from qlora_jax.config.command_line import SIGNALLED
from qlora_jax.io.run_folder.run_lock import lock_run
from qlora_jax.studies.comparison.run_files import (
    FAILURE_FILE,
    LOG_FILE,
    MAX_BYTES,
    OUTCOME_FILE,
    RUN_FOLDER,
    SETTINGS_FILE,
    Job,
    RunOutcome,
    read_job,
    write_outcome,
)
from qlora_jax.training.metrics.metrics_file import Record, read_metrics
from qlora_jax.untrusted_json import read_json

TRAINED_FILE, SCORES_FILE, CACHE_FOLDER = "trained", "scores.json", "scored"
POLL_SECONDS = 0.1
LOCK_SECONDS = 60.0  # time for the process of a lost worker to save its run
LAST_LINES = 12
NOT_FINITE = "is not finite"  # part of the error for a NaN or infinite loss or gradient


class Lost(Exception):
    """The run's process was killed or stopped; the run can be resumed."""


class Failed(Exception):
    """A command of the run ended with an error, and would again."""


class Diverged(Failed):
    """The loss or the gradient of a training run was not finite."""


def perform(folder: str, stop: threading.Event | None = None) -> None:
    """Performs the run in a folder; does nothing if it is finished. One worker at a time performs a run.

    An error of a command is written to failure.txt, because starting the run again would not help. A learning rate
    that diverges in the search is a result, and has an outcome.

    Args:
      stop: set to end the run early; it saves a checkpoint first.

    Raises:
      Lost: the run's process was killed or stopped, or another worker performs the run.
    """
    path = Path(folder)
    with _locked(path):
        if (path / OUTCOME_FILE).exists():
            return
        (path / FAILURE_FILE).unlink(missing_ok=True)
        job = read_job(path)
        try:
            outcome = _perform(path, job, stop)
        except Failed as error:
            write_text(path / FAILURE_FILE, f"{error}\n")
            return
        # Before the outcome, because a finished run is not looked at again.
        if job["stage"] != "final":
            _remove_checkpoints(path / RUN_FOLDER)  # nobody needs these models
        shutil.rmtree(path / CACHE_FOLDER, ignore_errors=True)
        write_outcome(path, outcome)


def _perform(folder: Path, job: Job, stop: threading.Event | None) -> RunOutcome:
    try:
        if not (folder / TRAINED_FILE).exists():
            _train(folder, job, stop)
            write_text(folder / TRAINED_FILE, "")
    except Diverged:
        if job["stage"] != "search":
            raise
        metrics = folder / RUN_FOLDER / "metrics.jsonl"
        records = read_metrics(metrics) if metrics.exists() else []
        steps = [record for record in records if "loss" in record]
        return {
            "inputs": job["inputs"],
            "steps": steps[-1]["step"] if steps else 0,
            "seconds": _seconds(steps),
            "seconds_per_step": seconds_per_step(records) if steps else 0.0,
            "peak_bytes": None,
            "search_loss": None,
            "values": [],
            "weights": [],
        }
    if job["evaluate"] is not None:
        settings = job["evaluate"]
        fixed = {
            "run": str(folder / RUN_FOLDER),
            "columns": ["checkpoint"],
            "json": str(folder / SCORES_FILE),
            "json_rows": True,
            "keep": str(folder / CACHE_FOLDER),
        }
        words = [word for key, value in {**settings, **fixed}.items() for word in (f"--{key}", _word(value))]
        _command(folder, job, ["-m", "qlora_jax.evaluate", *words], stop)
    return _outcome(folder, job)


def _train(folder: Path, job: Job, stop: threading.Event | None) -> None:
    run = folder / RUN_FOLDER
    with _locked(run):
        from qlora_jax.io.run_folder.checkpoint import saved_steps  # importing orbax takes seconds

        resume = bool(saved_steps(run))
        if not resume:
            shutil.rmtree(run)  # it was stopped before its first checkpoint
    words = ["--config", str(folder / SETTINGS_FILE), *(["--resume"] if resume else [])]
    try:
        _command(folder, job, ["-m", "qlora_jax.train", *words], stop)
    except Failed as error:
        if NOT_FINITE in str(error):
            raise Diverged(str(error)) from None
        raise


def _remove_checkpoints(run: Path) -> None:
    from qlora_jax.io.run_folder.checkpoint import CHECKPOINT_FOLDER

    if (run / CHECKPOINT_FOLDER).exists():
        shutil.rmtree(run / CHECKPOINT_FOLDER)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, for which it waits; raises Lost after LOCK_SECONDS."""
    end = time.monotonic() + LOCK_SECONDS
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock_run(folder, warn=print))
                break
            except ValueError as error:
                if time.monotonic() > end:
                    raise Lost(str(error)) from None
                time.sleep(POLL_SECONDS)
        yield


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _command(folder: Path, job: Job, words: list[str], stop: threading.Event | None) -> None:
    """Runs a command of Python in the study's directory; its output is appended to the log.

    Raises:
      Lost, Failed: it did not succeed.
    """
    command = [sys.executable, "-m", "qlora_jax.studies.comparison.end_with_parent", str(os.getpid()), *words]
    with open(folder / LOG_FILE, "ab") as log:
        start = log.tell()
        # In its own session, because a terminal sends Ctrl-C to all processes of one, and a run ends at the second.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=job["directory"], start_new_session=True
        )
        try:
            while process.poll() is None and not (stop is not None and stop.is_set()):
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
            code = process.wait()
    if code < 0 or code > SIGNALLED:
        raise Lost(f"{words[1]} was killed or stopped (exit code {code})")
    if code:
        raise Failed(f"{words[1]} failed (exit code {code}):\n{_last_lines(folder / LOG_FILE, start)}")


def _last_lines(log: Path, start: int) -> str:
    """Returns the last lines of a log that were written after byte `start`, so not those of an earlier command."""
    lines = log.read_bytes()[start:].decode("utf-8", errors="replace").splitlines()
    return "\n".join(lines[-LAST_LINES:])


class _Plan(TypedDict):
    peak_bytes: int | None


class _Report(TypedDict):
    memory_plan: _Plan


class _Column(TypedDict):
    values: list[float]
    weights: list[float]


class _Task(TypedDict):
    rows: dict[str, dict[str, _Column]]


class _Scores(TypedDict):
    tasks: dict[str, _Task]


def _outcome(folder: Path, job: Job) -> RunOutcome:
    run = folder / RUN_FOLDER
    records = read_metrics(run / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    rows: _Column = {"values": [], "weights": []}
    if job["evaluate"] is not None:
        scores = read_json(folder / SCORES_FILE, _Scores, MAX_BYTES)
        rows = scores["tasks"][job["kind"]]["rows"]["checkpoint"][job["measure"]]
    return {
        "inputs": job["inputs"],
        "steps": steps[-1]["step"],
        "seconds": _seconds(steps),
        "seconds_per_step": seconds_per_step(records),
        "peak_bytes": read_json(run / "report.json", _Report, MAX_BYTES)["memory_plan"]["peak_bytes"],
        "search_loss": losses[-1] if losses else None,
        **rows,
    }


def _seconds(steps: Sequence[Record]) -> float:
    return sum((record["seconds"] + record.get("data_seconds", 0.0) for record in steps), 0.0)


def seconds_per_step(records: Sequence[Record]) -> float:
    """Returns the mean time of a step, without the first of each length, which compiles; with them if all are first."""
    steps = [record for record in records if "loss" in record]
    seen: set[int] = set()
    later = [record for record in steps if record["length"] in seen or seen.add(record["length"])]
    counted = later or steps
    return _seconds(counted) / len(counted)
