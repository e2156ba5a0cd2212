"""Only the messages of orbax' threads about a failed save are dropped."""

import logging
import sys
from types import SimpleNamespace

from qlora_jax.io.orbax_threads import silence_threads


def test_the_error_of_a_closed_event_loop_is_not_printed(monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    silence_threads.cache_clear()
    silence_threads()
    other = SimpleNamespace(exc_value=RuntimeError("Event loop is open"))
    for each in (SimpleNamespace(exc_value=RuntimeError("Event loop is closed")), other):
        sys.unraisablehook(each)
    assert printed == [other]


def test_other_messages_of_orbax_are_logged(caplog):
    silence_threads()
    logging.getLogger("absl").error("[process=%d] _SignalingThread.run() raised an exception: %s", 0, "full")
    logging.getLogger("absl").error("Failed to remove checkpoint")
    assert [record.getMessage() for record in caplog.records] == ["Failed to remove checkpoint"]
