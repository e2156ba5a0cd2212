"""The message of processes that have not all connected: it names those that have not started, and what to look at."""

from pathlib import Path

import jax

from qlora_jax.hosts.group import MissingProcess
from qlora_jax.hosts.join import RollCall, _may_follow, _unseen


def test_the_advice_points_to_the_output_of_the_processes_that_are_missing(tmp_path: Path):
    found = _unseen(RollCall(tmp_path / "run", 0, 3))
    assert found == (
        f"No sign of processes 1, 2 was found in {tmp_path}. Look at the output of processes 1, 2. Check that all "
        "machines reach this address and see this folder"
    )
    alone = _unseen(RollCall(tmp_path / "run", 0, 1))
    assert alone == "All of them have started. Check that all machines reach this address"


def test_errors_of_broken_connections_may_follow_from_the_end_of_another_process():
    """Compiled functions that run in the calling thread raise ValueError (jaxlib 0.12)."""
    closed = "UNKNOWN: Gloo all-reduce failed: [gloo/transport/tcp/pair.cc:547] Connection closed by peer"
    assert _may_follow(ValueError(closed)) and _may_follow(jax.errors.JaxRuntimeError(closed))
    wrapped = RuntimeError("the step failed")
    wrapped.__cause__ = ValueError(closed)
    assert _may_follow(wrapped)
    assert not _may_follow(ValueError("data.train: rows.jsonl is not a file (found a folder)"))
    assert not _may_follow(MissingProcess("process 1: did not reach 'the end' within 300 s"))
