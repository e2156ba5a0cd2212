"""Processes that are measured against each other in turns, so that a machine whose speed drifts slows them all alike.

A player is any program that does a piece of work for each line on its standard input, and then prints a line of JSON,
its record. It is stopped (SIGSTOP) while others play: its idle threads take no time from them. Linux only, for the
signals and for /proc, where memory is read from outside, with one yardstick for every program.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Turns = list[list[Record]]  # a player's turns, each the records of its counted pieces of work
TAIL = 2000  # characters of a dead player's standard error that are told


class PlayerError(RuntimeError):
    """A player ended, or took longer than it was given."""


class Player:
    """One process. Records get `since_start_s` and `peak_rss_mib` (of that process alone, helpers not counted)."""

    def __init__(self, command: list[str], environment: Mapping[str, str] | None = None, timeout_s: float = 900.0):
        self._timeout_s, self._late = timeout_s, False
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self._started = time.perf_counter()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, text=True, env=os.environ | dict(environment or {}), **pipes)
        # Where memory runs out, the kernel ends this process and not one of somebody else's.
        Path(f"/proc/{self._process.pid}/oom_score_adj").write_text("1000")

    def turn(self, count: int) -> list[Record]:
        """The records of so many pieces of work, done one after the other.

        Raises:
          PlayerError: the process ended, or one piece took longer than `timeout_s`.
        """
        self._process.send_signal(signal.SIGCONT)
        records = [self._work() for _ in range(count)]
        self._process.send_signal(signal.SIGSTOP)
        return records

    def _work(self) -> Record:
        assert self._process.stdin and self._process.stdout
        alarm = threading.Timer(self._timeout_s, self._give_up)
        alarm.start()
        try:
            print(file=self._process.stdin, flush=True)
            for line in self._process.stdout:
                if line.startswith("{"):
                    since_start_s = time.perf_counter() - self._started
                    return json.loads(line) | {"since_start_s": since_start_s, "peak_rss_mib": self._peak_rss_mib()}
        except BrokenPipeError:  # it ended before it was asked
            pass
        finally:
            alarm.cancel()
        raise PlayerError(self._obituary())

    def _give_up(self) -> None:
        self._late = True
        self._process.kill()

    def _peak_rss_mib(self) -> float:
        """Since the program was loaded: getrusage would count what its parent held when it forked."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        assert found is not None, "a running process has a peak"
        return int(found[1]) / 1024

    def _obituary(self) -> str:
        status = self._process.wait()
        if self._late:
            return f"no answer within {self._timeout_s:g} s"
        self._errors.seek(0)
        reason = "killed, by the kernel if memory ran out" if status == -signal.SIGKILL else f"status {status}"
        return f"ended ({reason}): {self._errors.read().strip()[-TAIL:]}"

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


class Game:
    """Players by name, playing in turns; one that fails drops out, its failure kept, and the others go on."""

    def __init__(self, environment: Mapping[str, str] | None = None, timeout_s: float = 900.0):
        self._environment, self._timeout_s = dict(environment or {}), timeout_s
        self._players: dict[str, Player] = {}
        self._counted: dict[str, int] = {}
        self.failures: dict[str, str] = {}

    def start(self, name: str, command: list[str], counted: int = 1) -> Record | None:
        """The record of a new player's first piece of work, the others stopped; None where it failed.

        Args:
          counted: pieces of work in each of its turns that count.
        """
        self._players[name], self._counted[name] = Player(command, self._environment, self._timeout_s), counted
        records = self._turn(name, 1)
        return records[0] if records else None

    def play(self, blocks: int) -> dict[str, Turns]:
        """So many turns of each that plays to the end. One piece of work goes before those of a turn that count.

        The first after a pause takes longer, which nobody who uses the program sees.
        """
        turns: dict[str, Turns] = {name: [] for name in self._players}
        for _ in range(blocks):
            for name in [*self._players]:
                turns[name].append(self._turn(name, 1 + self._counted[name])[1:])
        return {name: turns[name] for name in self._players}

    def _turn(self, name: str, count: int) -> list[Record]:
        try:
            return self._players[name].turn(count)
        except PlayerError as error:
            self.failures[name] = str(error)
            self._players.pop(name).close()
            return []

    def close(self) -> None:
        """Ends all players."""
        while self._players:
            self._players.popitem()[1].close()

    def __enter__(self) -> "Game":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def median_of(turns: Turns, field: str) -> float:
    """The median of a field over all records."""
    return statistics.median(record[field] for turn in turns for record in turn)


def block_medians(turns: Turns, field: str) -> list[float]:
    """The median of a field in each turn."""
    return [statistics.median(record[field] for record in turn) for turn in turns]


def median_ratio(above: list[float], below: list[float]) -> float:
    """The median over neighbouring blocks of above / below: drift from block to block cancels."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
