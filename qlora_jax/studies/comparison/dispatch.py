"""Starts the unfinished runs of a stage here, by submitit or by Ray, starts lost ones again, and reports failures."""

import concurrent.futures
import contextlib
import dataclasses
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from qlora_jax.config import ConfigError
from qlora_jax.studies.comparison.run import Run
from qlora_jax.studies.comparison.run_files import FAILURE_FILE, LOG_FILE
from qlora_jax.studies.comparison.settings import CompareArgs, Settings
from qlora_jax.studies.comparison.train_and_score import Lost, perform


@runtime_checkable
class Started(Protocol):
    """A run that a launcher has started."""

    def done(self) -> bool:
        """Returns True if the run has ended for any reason."""
        ...

    def end(self) -> str:
        """Returns why a run that has ended has no outcome, if the launcher knows; else an empty text."""
        ...

    def cancel(self) -> None:
        """Asks the run to end; it saves a checkpoint if it can."""
        ...


@runtime_checkable
class Launcher(Protocol):
    """Starts runs on some machines."""

    @property
    def slots(self) -> int | None:
        """The number of runs to start at the same time; None if a queue of the cluster decides."""
        ...

    def start(self, folder: Path) -> Started:
        """Starts `perform` for the run in a folder, which all machines must see."""
        ...


@contextlib.contextmanager
def launcher_of(args: CompareArgs, output: Path) -> Iterator[Launcher]:
    """Yields the launcher that the settings name.

    Raises:
      ValueError: its library is not installed, or does not accept the settings.
    """
    if args.launcher == "local":
        with _local(args.processes) as local:
            yield local
    elif args.launcher == "submitit":
        yield _Submitit(output / "submitit", args.submitit)
    else:
        with _ray(args.ray_address, args.ray) as ray:
            yield ray


class _LocalRun:
    def __init__(self, future: concurrent.futures.Future, stop: threading.Event):
        self._future, self._stop = future, stop

    def done(self) -> bool:
        return self._future.done()

    def end(self) -> str:
        if self._future.cancelled():
            return "cancelled"
        error = self._future.exception()
        if error is not None and not isinstance(error, Lost):
            raise error
        return "" if error is None else str(error)

    def cancel(self) -> None:
        self._future.cancel()
        self._stop.set()


class _Local:
    """Runs `perform` in threads, which wait for its processes."""

    def __init__(self, slots: int, pool: concurrent.futures.Executor):
        self.slots: int | None = slots
        self._pool = pool

    def start(self, folder: Path) -> _LocalRun:
        stop = threading.Event()
        return _LocalRun(self._pool.submit(perform, str(folder), stop), stop)


@contextlib.contextmanager
def _local(processes: int) -> Iterator[_Local]:
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        yield _Local(processes, pool)


class _SubmititRun:
    def __init__(self, job: Any):  # submitit's types cannot be named without the extra
        self._job = job

    def done(self) -> bool:
        return self._job.done()

    def end(self) -> str:
        error = self._job.exception()
        return "" if error is None else f"job {self._job.job_id}: {_last_line(error)}"

    def cancel(self) -> None:
        self._job.cancel(check=False)


class _Submitit:
    slots: int | None = None

    def __init__(self, logs: Path, settings: Settings):
        try:
            import submitit
        except ImportError as error:
            raise _missing("submitit", error) from None
        parameters = dict(settings)
        cluster = parameters.pop("cluster", None)
        if not isinstance(cluster, str | None):
            raise ValueError(f"submitit: cluster: found {cluster!r}, expected a name such as slurm. Correct --submitit")
        try:
            self._executor = submitit.AutoExecutor(str(logs), cluster=cluster)
            self._executor.update_parameters(**parameters)
        except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"submitit: {_last_line(error)}. Correct --submitit") from None

    def start(self, folder: Path) -> _SubmititRun:
        return _SubmititRun(self._executor.submit(perform, str(folder)))


class _RayRun:
    def __init__(self, ray: ModuleType, task: Any):
        self._ray, self._task = ray, task

    def done(self) -> bool:
        finished, _ = self._ray.wait([self._task], timeout=0)
        return bool(finished)

    def end(self) -> str:
        try:
            self._ray.get(self._task)
        except self._ray.exceptions.RayError as error:
            return _last_line(error)
        return ""

    def cancel(self) -> None:
        self._ray.cancel(self._task, force=False)


class _Ray:
    slots: int | None = None

    def __init__(self, ray: ModuleType, options: Settings):
        self._ray = ray
        try:
            # The comparison starts lost runs again, and reports them.
            self._perform = ray.remote(max_retries=0, **options)(perform)
        except (TypeError, ValueError) as error:
            raise ValueError(f"ray: {_last_line(error)}. Correct --ray") from None

    def start(self, folder: Path) -> _RayRun:
        return _RayRun(self._ray, self._perform.remote(str(folder)))


@contextlib.contextmanager
def _ray(address: str | None, options: Settings) -> Iterator[_Ray]:
    try:
        import ray
    except ImportError as error:
        raise _missing("ray", error) from None
    try:
        ray.init(address=address, include_dashboard=None if address else False, log_to_driver=False)
    except Exception as error:  # Ray raises all kinds, also Exception itself
        raise ValueError(
            f"ray_address: found {address!r}, but {_last_line(error)}. Start the cluster, or correct it"
        ) from None
    try:
        yield _Ray(ray, options)
    finally:
        ray.shutdown()


def _missing(name: str, error: ImportError) -> ValueError:
    return ValueError(f"launcher: {name} is not installed ({error}). Run pip install 'qlora-jax[{name}]'")


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip().rstrip('.')}" if lines else type(error).__name__


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
        if state.active:
            report(f"ending {len(state.active)} runs, which save checkpoints first; start the study again to continue")
        for started in state.active.values():
            started.cancel()
        end = time.monotonic() + CANCEL_SECONDS
        while time.monotonic() < end and not all(started.done() for started in state.active.values()):
            time.sleep(POLL_SECONDS)
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
