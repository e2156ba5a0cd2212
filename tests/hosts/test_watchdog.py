"""Messages of the watchdog that need no second process."""

import contextlib
import os
import socket
import threading
import time

import pytest

import qlora_jax.hosts.watchdog as watchdog_module
from qlora_jax.hosts.group import Group
from qlora_jax.hosts.watchdog import ENDED, Watchdog


class Exited(BaseException):
    """Stands for the end of the process."""


def message_of(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    coordinator: str | None = None,
    **silent_for: float,
) -> str:
    """Returns what process 1 of 4 says when JAX has lost another one; the others were last heard of so long ago."""

    def leave(code: int) -> None:
        assert code == ENDED
        raise Exited

    monkeypatch.setattr(os, "_exit", leave)
    now = time.monotonic()
    beats = {process: ("7", now - silent_for.get(f"process_{process}", 1.0)) for process in (0, 2, 3)}
    watchdog = Watchdog(Group(1, 4, [f"process {index} (here)" for index in range(4)]), 30.0, coordinator, _beats=beats)
    with pytest.raises(Exited):
        watchdog.lost()
    return capfd.readouterr().err


def test_a_process_that_is_late_is_not_blamed_for_the_end_of_process_0(monkeypatch, capfd):
    """The others notice the end of process 0 at once, when a busy machine has kept another from counting."""
    with socket.socket() as ended:
        ended.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{ended.getsockname()[1]}"  # nothing listens there
        assert "because process 0 (here) ended" in message_of(monkeypatch, capfd, address, process_3=9.0)


def test_process_0_is_blamed_if_its_port_closes_after_its_connections(monkeypatch, capfd):
    """A busy system takes a moment to close all sockets of a process that was killed."""
    with socket.create_server(("127.0.0.1", 0)) as closing:
        address = f"127.0.0.1:{closing.getsockname()[1]}"
        threading.Timer(0.2, closing.close).start()
        assert "because process 0 (here) ended" in message_of(monkeypatch, capfd, address, process_3=2.5)


def test_the_process_that_is_silent_for_longest_is_a_guess_if_process_0_answers(monkeypatch, capfd):
    """JAX may notice an end before the process is silent for long, if the heartbeat is short."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        message = message_of(monkeypatch, capfd, address, process_3=2.5)
    assert "because another process ended without a message" in message
    assert "It may be process 3 (here), which has been silent for longest. Look at its output" in message


def test_a_process_that_is_silent_for_a_heartbeat_is_blamed(monkeypatch, capfd):
    assert "because process 3 (here) ended" in message_of(monkeypatch, capfd, process_3=16.0)


def test_a_process_that_ends_while_jax_calls_back_ends(monkeypatch):
    """JAX's thread holds its client, for which the thread that reports the failure waits."""
    monkeypatch.setattr(watchdog_module, "LAST_WORDS_SECONDS", 0.1)
    left: list[tuple[threading.Thread, int]] = []
    held, freed = threading.Event(), threading.Event()

    def leave(code: int) -> None:
        left.append((threading.current_thread(), code))
        freed.set()
        raise Exited

    class HeldClient:
        def key_value_set(self, key: str, text: str) -> None:
            held.set()
            assert freed.wait(20)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(watchdog_module, "client", HeldClient)
    watchdog = Watchdog(Group(1, 2, ["process 0", "process 1"]), 30.0)

    def fail() -> None:
        with contextlib.suppress(Exited):
            watchdog.fail(ValueError("no space left"), lambda error: 2)

    failing = threading.Thread(target=fail)
    failing.start()
    assert held.wait(20)
    with pytest.raises(Exited):
        watchdog.lost()
    failing.join()
    assert left[0] == (threading.current_thread(), 2)
