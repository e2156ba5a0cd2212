"""Runs the project's commands in forked processes, which begin with everything imported and no jax backend."""

import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib.backends.backend_agg
import matplotlib.figure

from qlora_jax import arena, compare, evaluate, export, generate, predict, quantize, runtime, train, variance
from qlora_jax.api import evaluate as _evaluate_api
from qlora_jax.api import export as _export_api
from qlora_jax.api import generate as _generate_api
from qlora_jax.api import predict as _predict_api
from qlora_jax.config import run_main
from qlora_jax.studies.comparison import run_study as _comparison
from qlora_jax.studies.tournament import tournament as _tournament
from qlora_jax.studies.variance import analysis as _variance_analysis
from qlora_jax.studies.variance import page as _variance_page
from qlora_jax.training import run as _training_run

WRITERS = (train, generate, predict, evaluate, export, quantize, arena, variance, compare)
COMMANDS = {module.COMMAND.name: module for module in WRITERS}
# Imported by commands when they start; here once for all of them.
IMPORTED = (
    _evaluate_api,
    _export_api,
    _generate_api,
    _predict_api,
    _comparison,
    _tournament,
    _training_run,
    _variance_analysis,
    _variance_page,
    matplotlib.figure,
    matplotlib.backends.backend_agg,
)
TIMEOUT = 240.0  # seconds


class Finished(NamedTuple):
    """A command that ended: its exit status, negative for a signal, and all that it printed."""

    status: int
    output: str

    @property
    def is_error(self) -> bool:
        """True if the command ended with its error message."""
        return self.status == 2 and "error: " in self.output

    @property
    def has_traceback(self) -> bool:
        """True if a traceback was printed, be it by a library that logs it."""
        return "Traceback" in self.output

    @property
    def last_line(self) -> str:
        """The error message, or else the last line that was printed."""
        _, _, message = self.output.rpartition("error: ")
        lines = (message or self.output).strip().splitlines()
        return " ".join(lines[:3] if message else lines[-1:])


class Running:
    """A command in a separate process."""

    def __init__(self, words: Sequence[str], printed: Path, cache: Path):
        """Starts `qlora-jax` with these words; `printed` gets its output, `cache` holds compiled programs."""
        self._printed = printed
        sys.stdout.flush()
        sys.stderr.flush()
        gc.freeze()  # the child's collections do not visit what it inherits
        self.pid = os.fork()
        if self.pid == 0:
            _become(lambda: run_main(COMMANDS[words[0]].main, list(words[1:])), printed, cache)
        gc.unfreeze()  # this process frees its own garbage
        self._status: int | None = None

    def ended(self) -> bool:
        """Returns True if the process has ended."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status is not None

    def send(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if not self.ended():
            os.kill(self.pid, number)

    def wait_until(self, condition: Callable[[], bool], every: float = 0.002) -> bool:
        """Waits for a condition; returns False if the process ended first."""
        while not condition():
            if self.ended():
                return False
            time.sleep(every)
        return True

    def wait(self) -> Finished:
        """Waits for the end; a command that takes longer than TIMEOUT is killed, and has the status -SIGKILL."""
        deadline = time.monotonic() + TIMEOUT
        while not self.ended():
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        assert self._status is not None
        return Finished(self._status, self._printed.read_text(encoding="utf-8", errors="replace"))


def run_command(words: Sequence[str], printed: Path, cache: Path) -> Finished:
    """Runs a command to its end."""
    return Running(words, printed, cache).wait()


def _become(command: Callable[[], None], printed: Path, cache: Path) -> None:
    """Runs `command` in this forked process, as if Python had started with it, and exits."""
    status = 1
    try:
        with printed.open("wb") as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        os.environ[runtime.CACHE_VARIABLE] = str(cache)
        _cache_every_program()
        command()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _cache_every_program() -> None:
    """Caches programs that compile quickly, too: those of tiny models all do."""
    start = runtime.start

    def start_and_cache() -> None:
        start()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    runtime.start = start_and_cache
