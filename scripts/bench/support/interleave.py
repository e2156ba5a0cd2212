"""Runs processes in turns, so that a machine whose speed drifts slows all of them alike.

A worker is any program that does one unit of work for each line on its standard input, and then prints one line of
JSON, its record. A worker is stopped (SIGSTOP) during the turns of others, so that its idle threads take no time from
them. Memory is read from /proc for every program alike. Linux only.
"""

import json
import os
import re
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qlora_jax.untrusted_json import JsonObject
from scripts.bench.support.progress import phase

Record = JsonObject  # one measurement of a benchmark
Turns = list[list[Record]]  # per turn of a worker, the records that count
STDERR_CHARACTERS = 2000  # how much of a failed worker's standard error is reported


class WorkerError(RuntimeError):
    """A worker ended, or exceeded its time limit."""


class Worker:
    """One process.

    Records get `since_start_s` and `peak_rss_mib`, the peak of that process without its children.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str] | None = None, timeout_s: float = 900.0):
        self._timeout_s, self._timed_out = timeout_s, False
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process runs
        self._started = time.perf_counter()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._stderr}
        try:
            self._process = subprocess.Popen(command, text=True, env=os.environ | dict(environment or {}), **pipes)
        except OSError:  # its environment is missing
            self._stderr.close()
            raise
        # If memory runs out, the kernel must end this process and no other.
        Path(f"/proc/{self._process.pid}/oom_score_adj").write_text("1000")

    def turn(self, count: int) -> list[Record]:
        """Returns the records of `count` units of work, done in order.

        Raises:
          WorkerError: the process ended, or one unit took longer than `timeout_s`.
        """
        self._process.send_signal(signal.SIGCONT)
        records = [self._work() for _ in range(count)]
        self.pause()
        return records

    def pause(self) -> None:
        """Stops the process until its next turn."""
        self._process.send_signal(signal.SIGSTOP)

    def _work(self) -> Record:
        assert self._process.stdin and self._process.stdout
        alarm = threading.Timer(self._timeout_s, self._time_out)
        alarm.start()
        try:
            print(file=self._process.stdin, flush=True)
            for line in self._process.stdout:
                if line.startswith("{"):
                    since_start_s = time.perf_counter() - self._started
                    return json.loads(line) | {"since_start_s": since_start_s, "peak_rss_mib": self._peak_rss_mib()}
        except BrokenPipeError:  # it ended before the request
            pass
        finally:
            alarm.cancel()
        raise WorkerError(self._failure())

    def _time_out(self) -> None:
        self._timed_out = True
        self._process.kill()

    def _peak_rss_mib(self) -> float:
        """Returns the peak since the program was loaded; getrusage would include the parent's memory at the fork."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        assert found is not None, "a running process has a peak"
        return int(found[1]) / 1024

    def _failure(self) -> str:
        status = self._process.wait()
        if self._timed_out:
            return f"no answer within {self._timeout_s:g} s"
        self._stderr.seek(0)
        reason = "killed, by the kernel if memory ran out" if status == -signal.SIGKILL else f"status {status}"
        return f"ended ({reason}): {self._stderr.read().strip()[-STDERR_CHARACTERS:]}"

    def close(self) -> None:
        """Kills the process."""
        self._process.kill()
        self._process.communicate()
        self._stderr.close()


class WorkerGroup:
    """Workers by name, which run in turns.

    A worker that fails is removed and its failure is recorded; the others continue.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, timeout_s: float = 900.0):
        self._environment, self._timeout_s = dict(environment or {}), timeout_s
        self._workers: dict[str, Worker] = {}
        self._counted: dict[str, int] = {}
        self.failures: dict[str, str] = {}

    def start(self, name: str, command: list[str], counted: int = 1) -> Record | None:
        """Starts a worker while the others are stopped; returns the record of its first unit, or None if it failed.

        Args:
          counted: units of work per turn that count.
        """
        phase(f"{name}: starts")
        self.open(name, command)
        self._counted[name] = counted
        records = self.turn(name, 1) if name in self._workers else []
        return records[0] if records else None

    def open(self, name: str, command: list[str]) -> None:
        """Starts a worker, which is stopped until its first turn."""
        try:
            worker = Worker(command, self._environment, self._timeout_s)
        except OSError as error:
            self.failures[name] = f"{error.filename}: {error.strerror}"
            return
        worker.pause()
        self._workers[name] = worker

    def once(self, name: str, command: list[str]) -> Record | None:
        """Returns the record of a process's first unit and ends it; None if it failed."""
        record = self.start(name, command)
        if name in self._workers:
            self._workers.pop(name).close()
        return record

    @property
    def names(self) -> list[str]:
        """The workers that have not failed."""
        return [*self._workers]

    def run(self, blocks: int) -> dict[str, Turns]:
        """Returns `blocks` turns of every worker that does not fail.

        Each turn starts with one unit that does not count: the first after a pause takes longer, which no user sees.
        """
        turns: dict[str, Turns] = {name: [] for name in self._workers}
        for block in range(blocks):
            for name in self.names:
                phase(f"{name}: block {block + 1} of {blocks}")
                turns[name].append(self.turn(name, 1 + self._counted[name])[1:])
        return {name: turns[name] for name in self._workers}

    def turn(self, name: str, count: int) -> list[Record]:
        """Returns the records of `count` units of work of one worker; none if it fails."""
        try:
            return self._workers[name].turn(count)
        except WorkerError as error:
            self.failures[name] = str(error)
            self._workers.pop(name).close()
            return []

    def close(self) -> None:
        """Kills all workers."""
        while self._workers:
            self._workers.popitem()[1].close()

    def __enter__(self) -> "WorkerGroup":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def median_of(turns: Turns, field: str) -> float:
    """Returns the median of a field over all records."""
    return statistics.median(record[field] for turn in turns for record in turn)


def block_medians(turns: Turns, field: str) -> list[float]:
    """Returns the median of a field in each turn."""
    return [statistics.median(record[field] for record in turn) for turn in turns]


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Returns the median ratio over neighbouring blocks, in which drift from block to block cancels."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def ratio_interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Returns the 95 % interval of the median of paired ratios, by bootstrap over the pairs."""
    drawn = np.random.default_rng(0).choice(np.array(ratios), (10_000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(low), float(high)
