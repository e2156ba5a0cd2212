"""Starts the unfinished runs of a stage, starts lost ones again, and reports those that cannot finish."""

import dataclasses
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence

from qlora_jax.config import ConfigError
from qlora_jax.studies.comparison.launchers import Launcher, Started
from qlora_jax.studies.comparison.run import Run
from qlora_jax.studies.comparison.run_files import FAILURE_FILE, LOG_FILE

POLL_SECONDS = 0.2
CANCEL_SECONDS = 60.0  # time for a cancelled run to save a checkpoint

Report = Callable[[str], object]  # called with lines for people


@dataclasses.dataclass
class _State:
    """The runs of a stage: waiting, active, and failed with the reason; `lost` counts how often each was lost."""

    waiting: deque[Run]
    active: dict[Run, Started] = dataclasses.field(default_factory=dict)
    failed: dict[Run, str] = dataclasses.field(default_factory=dict)
    lost: Counter[Run] = dataclasses.field(default_factory=Counter)


def run_all(runs: Sequence[Run], launcher: Launcher, retries: int, report: Report) -> Mapping[Run, str]:
    """Performs all runs that are not finished; returns the reason for each that failed or was lost too often.

    An exception, such as that of Ctrl-C or SIGTERM, ends the active runs, which save checkpoints.

    Args:
      retries: how often a lost run is started again.
    """
    state = _State(deque(run for run in runs if not run.finished))
    report(f"{len(runs)} runs, {len(runs) - len(state.waiting)} of them finished before")
    try:
        while state.waiting or state.active:
            _start(state, launcher, report)
            _collect(state, retries, report)
            time.sleep(POLL_SECONDS)
    except BaseException:
        _cancel(state, report)
        raise
    return state.failed


def raise_failures(failed: Mapping[Run, str]) -> None:
    """Raises ConfigError if runs failed, with the reason and the log of each."""
    if failed:
        raise ConfigError(
            [f"{run.label}: {reason}\n  log: {run.folder / LOG_FILE}" for run, reason in failed.items()]
            + ["Finished runs are kept: correct the cause, and start the study again"]
        )


def _start(state: _State, launcher: Launcher, report: Report) -> None:
    while state.waiting and (launcher.slots is None or len(state.active) < launcher.slots):
        run = state.waiting.popleft()
        run.prepare()
        state.active[run] = launcher.start(run.folder)
        report(f"started: {run.label}")


def _collect(state: _State, retries: int, report: Report) -> None:
    for run in [run for run, started in state.active.items() if started.done()]:
        reason = state.active.pop(run).end()
        failure = run.folder / FAILURE_FILE
        if run.finished:
            report(f"finished: {run.label}")
        elif failure.exists():
            state.failed[run] = failure.read_text("utf-8").strip()
            report(f"failed: {run.label}")
        else:
            _restart_or_fail(state, run, reason or "it ended without an outcome", retries, report)


def _restart_or_fail(state: _State, run: Run, reason: str, retries: int, report: Report) -> None:
    state.lost[run] += 1
    again = state.lost[run] <= retries
    report(f"lost: {run.label}: {reason}" + ("; it is started again" if again else ""))
    if again:
        state.waiting.append(run)
    else:
        state.failed[run] = f"lost {state.lost[run]} times; the last time: {reason}"


def _cancel(state: _State, report: Report) -> None:
    if state.active:
        report(f"ending {len(state.active)} runs, which save checkpoints first; start the study again to continue")
    for started in state.active.values():
        started.cancel()
    end = time.monotonic() + CANCEL_SECONDS
    while time.monotonic() < end and not all(started.done() for started in state.active.values()):
        time.sleep(POLL_SECONDS)
