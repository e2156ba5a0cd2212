"""Launchers, tried by their variables alone."""

import sys
import types

import pytest

from qlora_jax.hosts.launchers import Place, find_place

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[007-009,012],big1",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_VERSION": "4.1.6",
}
BY_HAND = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SLURM, *OMPI, *BY_HAND):
        monkeypatch.delenv(name, raising=False)


def found(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], launcher: str = "auto", **given) -> Place | None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings: dict = {"coordinator": None, "processes": None, "process": None}
    return find_place(launcher, **settings | given)


def test_one_process_without_any_of_this(monkeypatch: pytest.MonkeyPatch):
    assert found(monkeypatch, {}) is None


def test_by_hand(monkeypatch: pytest.MonkeyPatch):
    place = found(monkeypatch, {}, coordinator="node1:1234", processes=2, process=1)
    assert place == Place("node1:1234", 2, 1)


def test_by_variables_and_settings_win(monkeypatch: pytest.MonkeyPatch):
    assert found(monkeypatch, BY_HAND) == Place("10.0.0.1:1234", 4, 3)
    assert found(monkeypatch, BY_HAND, process=2) == Place("10.0.0.1:1234", 4, 2)


def test_slurm(monkeypatch: pytest.MonkeyPatch):
    place = found(monkeypatch, SLURM)
    assert place is not None and place[1:] == (8, 3)
    assert place.coordinator.startswith("node007:")
    assert found(monkeypatch, SLURM, coordinator="node007:99") == Place("node007:99", 8, 3)


@pytest.mark.parametrize(
    "variables", [SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, OMPI | {"OMPI_COMM_WORLD_SIZE": "1"}]
)
def test_one_process_of_a_launcher_joins_nothing(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]):
    assert found(monkeypatch, variables) is None


def test_slurms_variables_outside_of_a_step_join_nothing(monkeypatch: pytest.MonkeyPatch):
    in_batch_script = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}
    assert found(monkeypatch, in_batch_script) is None


def test_open_mpi(monkeypatch: pytest.MonkeyPatch):
    place = found(monkeypatch, OMPI)
    assert place is not None and place.coordinator.startswith("10.96.0.1:") and place[1:] == (4, 2)


def test_mpirun_within_slurm_counts_mpis_processes(monkeypatch: pytest.MonkeyPatch):
    place = found(monkeypatch, SLURM | OMPI)
    assert place is not None and place[1:] == (4, 2)


def test_open_mpi_5_requires_mpi4py(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"hosts.launcher: ompi .*requires mpi4py[\s\S]*give hosts.coordinator"):
        found(monkeypatch, OMPI | {"OMPI_VERSION": "5.0.3"})


def test_mpi4py(monkeypatch: pytest.MonkeyPatch):
    class World:
        Get_rank = staticmethod(lambda: 1)
        Get_size = staticmethod(lambda: 2)
        bcast = staticmethod(lambda value, root: "node1:65000")

    mpi4py = types.ModuleType("mpi4py")
    mpi4py.MPI = types.SimpleNamespace(COMM_WORLD=World)  # pyright: ignore[reportAttributeAccessIssue]
    mpi4py.__spec__ = types.SimpleNamespace()  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "mpi4py", mpi4py)
    assert found(monkeypatch, {}, "mpi4py") == Place("node1:65000", 2, 1)


@pytest.mark.parametrize("launcher", ["slurm", "ompi", "mpi4py", "k8s"])
def test_a_launcher_that_is_absent_is_an_error(monkeypatch: pytest.MonkeyPatch, launcher: str):
    with pytest.raises(ValueError, match=f"hosts.launcher: {launcher} was not found. Start the processes"):
        found(monkeypatch, {}, launcher)


def test_off_ignores_a_launcher_and_refuses_settings(monkeypatch: pytest.MonkeyPatch):
    assert found(monkeypatch, SLURM | BY_HAND, "off") is None
    with pytest.raises(ValueError, match=r"hosts.launcher: found off, but hosts.process is given"):
        found(monkeypatch, SLURM, "off", process=1)


def test_missing_and_wrong_values(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"hosts: hosts.coordinator, hosts.process is missing \(found hosts.processes"):
        found(monkeypatch, {}, processes=2)
    with pytest.raises(ValueError, match=r"coordinator: found 'node1'[\s\S]*process: found 2, expected 0 to 1"):
        found(monkeypatch, {}, coordinator="node1", processes=2, process=2)
    with pytest.raises(ValueError, match=r"JAX_NUM_PROCESSES: found 'two', expected a number"):
        found(monkeypatch, {"JAX_NUM_PROCESSES": "two"})
