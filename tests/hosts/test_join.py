"""The message of processes that have not all connected: it names those that have not started, and what to look at."""

from pathlib import Path

from qlora_jax.hosts.join import _unseen
from qlora_jax.hosts.roll_call import RollCall


def test_the_advice_points_to_the_output_of_the_processes_that_are_missing(tmp_path: Path):
    found = _unseen(RollCall(tmp_path / "run", 0, 3))
    assert found == (
        f"No sign of processes 1, 2 was found in {tmp_path}. Look at the output of processes 1, 2. Check that all "
        "machines reach this address and see this folder"
    )
    alone = _unseen(RollCall(tmp_path / "run", 0, 1))
    assert alone == "All of them have started. Check that all machines reach this address"
