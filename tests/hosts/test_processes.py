"""Real processes over loopback: they train, and end each other within a stated time with one message."""

import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from qlora_jax.hosts.watchdog import ENDED
from tests.hosts.processes import ACTS_AT, STOPPED, Ended, acted_at, start, wait
from tests.marks import EXHAUSTIVE

KILLED = -9
HEARTBEAT = 5
# A dead process is noticed after its heartbeat and before twice that; the rest is this machine's slowness.
NOTICED = 2 * HEARTBEAT + 5

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_NODES": "1",
}
OMPI_5 = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_VERSION": "5.0.11",
    "PMIX_NAMESPACE": "prterun-vm-15196@1",
}
RUNS = {
    "sound": {"processes": 4, "variables": SLURM, "late": {"3": 5}},
    "stopped": {"actor": 1, "action": "term", "variables": OMPI_5},
    "worker killed": {"actor": 2, "action": "kill", "processes": 4},
    "first killed": {"actor": 0, "action": "kill"},
    "worker failed": {"actor": 1, "action": "fail"},
    "worker stuck": {"actor": 1, "action": "stall", "stuck_after": 3},
    "disagree": {"values": {"1": {"optim.learning_rate": 1e-3, "seed": 1}}, "folders": {"0": "a", "1": "b"}},
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Ended]]:
    """All runs at once, because processes mostly wait."""
    folder = tmp_path_factory.mktemp("runs")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        started = {name: start(folder / name, **{"processes": 2} | options) for name, options in RUNS.items()}
        started["never comes"] = start(folder / "alone", 2, expected=3, join_seconds=10)
        started["port taken"] = start(folder / "taken", 1, expected=2, port=taken.getsockname()[1])
        return wait(started)


def one_message(ended: Ended, *parts: str) -> None:
    """Checks that a process printed one error, which has all the parts, and no traceback."""
    assert ended.err.count("error:") == 1, ended.err
    assert "Traceback" not in ended.err and "absl::Status" not in ended.err, ended.err
    for part in parts:
        assert part in ended.err, ended.err


def codes(run: Sequence[Ended]) -> list[int]:
    return [each.code for each in run]


def test_four_processes_of_slurm_train_and_leave_well_although_one_comes_late(runs: dict[str, list[Ended]]):
    assert codes(runs["sound"]) == [0] * 4, runs["sound"]
    assert all("trained on 8 devices, 2 here, agreed on (7, -3)" in each.out for each in runs["sound"])


def test_sigterm_to_one_of_open_mpi_stops_all_before_the_same_step(runs: dict[str, list[Ended]]):
    assert codes(runs["stopped"]) == [STOPPED, STOPPED], runs["stopped"]
    assert all(f"stopped before step {ACTS_AT}" in each.out for each in runs["stopped"])


@pytest.mark.parametrize(("name", "dead"), [("worker killed", 2), ("first killed", 0)])
def test_a_killed_process_ends_the_others(runs: dict[str, list[Ended]], name: str, dead: int):
    run = runs[name]
    assert codes(run) == [KILLED if process == dead else ENDED for process in range(len(run))], run
    for each in [*run[:dead], *run[dead + 1 :]]:
        assert each.at - acted_at(run) < NOTICED
        one_message(each, f"process {dead} (", "ended without a message", "--resume")


def test_a_failed_process_ends_the_other_with_its_error(runs: dict[str, list[Ended]]):
    run = runs["worker failed"]
    assert codes(run) == [ENDED, 2], run
    assert run[0].at - acted_at(run) < 5 and run[1].at - acted_at(run) < 6
    one_message(run[1], "error: disk of this machine alone")
    one_message(run[0], "process 1 (", "failed: OSError: disk of this machine alone: no space left")


def test_a_stuck_process_ends_the_run_and_is_named(runs: dict[str, list[Ended]]):
    run = runs["worker stuck"]
    assert codes(run) == [ENDED, ENDED], run
    assert 3 < run[0].at - acted_at(run) < 3 + 10
    for each in run:
        one_message(each, "nothing has moved for 3 s (hosts.stuck_after)", "the others wait for process 1 (")


def test_processes_that_disagree_are_refused_with_all_differences(runs: dict[str, list[Ended]]):
    run = runs["disagree"]
    assert codes(run) == [2, 2], run
    one_message(
        run[0],
        "optim.learning_rate: 0.0002 in process 0; 0.001 in process 1",
        "output has a file of process 0: true in process 0; false in process 1",
        "seed: nothing in process 0; 1 in process 1",
        "Start all processes with the same command",
    )
    assert run[1].err == ""


def test_a_process_that_never_comes_is_named(runs: dict[str, list[Ended]]):
    run = runs["never comes"]
    assert codes(run) == [2, 2], run
    for each in run:
        one_message(
            each, "hosts: not all 3 processes have connected to 127.0.0.1:", "No sign of process 2 was found in"
        )


def test_a_port_in_use_is_refused(runs: dict[str, list[Ended]]):
    run = runs["port taken"]
    assert run[0].code == 2, run
    one_message(run[0], "process 0 cannot listen at 127.0.0.1:", "Give another port")


FOUR = {
    "stopped": {"actor": 2, "action": "term"},
    "worker killed": {"actor": 2, "action": "kill", "heartbeat": 30},
    "first killed": {"actor": 0, "action": "kill", "heartbeat": 30},
    "worker failed": {"actor": 2, "action": "fail"},
    "first failed": {"actor": 0, "action": "fail"},
    "worker stuck": {"actor": 2, "action": "stall", "stuck_after": 5},
    "sound": {"late": {"3": 60}, "join_seconds": 120},
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=EXHAUSTIVE) for name in FOUR])
def test_four_processes(name: str, tmp_path: Path):
    """The same ends with four processes, the heartbeat of a run, and one process 60 s late."""
    run = wait({name: start(tmp_path, 4, **FOUR[name])})[name]
    actor = FOUR[name].get("actor")
    own = {"stopped": STOPPED, "worker failed": 2, "first failed": 2, "worker stuck": ENDED}.get(name, KILLED)
    others = {"stopped": STOPPED, "sound": 0}.get(name, ENDED)
    assert codes(run) == [own if process == actor else others for process in range(4)], run
    if others == ENDED:
        for process, each in enumerate(run):
            if process != actor:
                one_message(each, f"process {actor} (")
