"""Texts about processes."""

from qlora_jax.hosts.group import Group
from qlora_jax.hosts.rank_text import grouped, ranges
from qlora_jax.hosts.watchdog import stuck_text


def test_runs_of_numbers_are_shortened():
    assert ranges([0, 1, 2, 3, 5, 7, 8]) == "0-3, 5, 7, 8"


def test_values_name_their_processes():
    assert grouped(["4", "4", "8", "4"]) == "4 in processes 0, 1, 3; 8 in process 2"


def test_a_process_that_is_behind_or_silent_is_named():
    group = Group(0, 3, ["process 0 (a)", "process 1 (b)", "process 2 (c)"])
    assert "the others wait for process 1 (b)" in stuck_text([5, 4, 5], group, "step 5", 900)
    assert "the others wait for process 2 (c)" in stuck_text([5, 5, None], group, "step 5", 900)
    assert "all processes wait in the same place" in stuck_text([5, 5, 5], group, "step 5", 900)
