"""Only the messages of orbax' threads about a failed save or read are dropped, and all of these."""

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from qlora_jax.io.run_folder.checkpoint_reader import silence_threads

PROGRAM = """
import resource, sys
import jax.numpy as jnp
from pathlib import Path
from qlora_jax.io.run_folder.checkpoint import CheckpointError, Checkpoints

lora = {f"p{i}": {"lora_a": jnp.arange(60000.0) ** 1.5, "lora_b": jnp.ones(5)} for i in range(4)}
state = {f"m{i}": jnp.arange(60000.0) ** 1.5 for i in range(4)}
run = Path(sys.argv[1])
with Checkpoints(run, 1) as checkpoints:
    checkpoints.save(1, lora, state, {"step": 1})
    for file in (run / "checkpoints/1").rglob("d/*"):
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2] + bytes(64) + data[len(data) // 2 + 64 :])
    for _ in range(3):
        try:
            checkpoints.restore(lora, state)
        except CheckpointError as error:
            print("damaged" in str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    for step in (2, 3):
        try:
            checkpoints.save(step, lora, state, {"step": step})
        except CheckpointError as error:
            print("cannot be saved" in str(error))
"""


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


def test_failures_print_no_traceback(tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 5, done.stderr
    assert "Traceback" not in done.stderr
