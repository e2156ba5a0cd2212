"""Launchers, tried by their variables alone."""

import inspect
import sys
import types

import pytest

from qlora_jax.hosts.launchers import CLUSTERS, PORT_VARIABLE, Place, find_place

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
# The variables of process 1 of 3 on one machine, as `mpirun -n 3` of Open MPI 5.0.11 and of MPICH 5.0.2 set them.
OMPI_5 = {
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
    "OMPI_VERSION": "5.0.11",
    "PMIX_NAMESPACE": "prterun-vm-15196@1",
    "PMIX_RANK": "1",
    "PMIX_SERVER_URI41": "prterun-vm-15196@0.0;tcp4://127.0.0.1:55609",
    "PRTE_LAUNCHED": "1",
}
OMPI_5_ON_TWO = OMPI_5 | {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
MPICH = {"PMI_SIZE": "3", "PMI_RANK": "1", "MPI_LOCALNRANKS": "3", "MPI_LOCALRANKID": "1"}
K8S = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2", "HOSTNAME": "localhost"}
BY_HAND = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SLURM, *OMPI, *OMPI_5, *MPICH, *K8S, *BY_HAND, PORT_VARIABLE):
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


def test_open_mpi_5_on_one_machine_needs_no_package(monkeypatch: pytest.MonkeyPatch):
    """Its variables give no address of process 0; all processes compute the same port, other jobs another."""
    place, other = found(monkeypatch, OMPI_5), found(monkeypatch, OMPI_5 | {"OMPI_COMM_WORLD_RANK": "2"})
    assert place is not None and place.coordinator.startswith("127.0.0.1:") and place[1:] == (3, 1)
    assert other == place._replace(process=2)
    next_job = found(monkeypatch, {"PMIX_NAMESPACE": "prterun-vm-15197@1"})
    assert next_job is not None and next_job.coordinator != place.coordinator
    assert found(monkeypatch, {PORT_VARIABLE: "5000"}) == Place("127.0.0.1:5000", 3, 2)


def test_open_mpi_5_on_several_machines_requires_an_address_or_mpi4py(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        ValueError,
        match=r"ompi does not give hosts.coordinator: .*requires mpi4py[\s\S]*or as JAX_COORDINATOR_ADDRESS$",
    ):
        found(monkeypatch, OMPI_5_ON_TWO)
    assert found(monkeypatch, OMPI_5_ON_TWO, coordinator="node1:99") == Place("node1:99", 3, 1)


def test_pmix_alone_gives_no_address(monkeypatch: pytest.MonkeyPatch):
    """srun --mpi=pmix sets its namespace, whether or not all processes are on one machine."""
    with pytest.raises(ValueError, match=r"hosts.launcher: ompi was not found"):
        found(monkeypatch, {"PMIX_NAMESPACE": "slurm.pmix.1.0"}, "ompi", processes=2, process=1)


@pytest.mark.parametrize("within", [{}, SLURM | {"SLURM_NTASKS": "2"}])
def test_mpich_is_refused_instead_of_separate_runs(monkeypatch: pytest.MonkeyPatch, within: dict[str, str]):
    """Its mpirun leaves SLURM's variables for the step of mpirun itself, one task per machine."""
    with pytest.raises(
        ValueError, match=r"3 processes were started by MPICH.*Install mpi4py and set hosts.launcher to"
    ):
        found(monkeypatch, within | MPICH)
    assert found(monkeypatch, {}, "off") is None
    assert found(monkeypatch, {}, coordinator="node1:99", processes=3, process=1) == Place("node1:99", 3, 1)


def test_srun_may_set_the_variables_of_pmi(monkeypatch: pytest.MonkeyPatch):
    place = found(monkeypatch, SLURM | MPICH | {"PMI_SIZE": SLURM["SLURM_NTASKS"]})
    assert place is not None and place[1:] == (8, 3)


def test_kubernetes_by_variables_asks_no_cluster(monkeypatch: pytest.MonkeyPatch):
    settings = {"coordinator": "job-0.pods:1234", "processes": 4}
    assert found(monkeypatch, K8S, "k8s", **settings) == Place("job-0.pods:1234", 4, 2)


def test_kubernetes_without_an_account_is_refused_with_the_settings_that_replace_it(monkeypatch: pytest.MonkeyPatch):
    def load_incluster_config() -> None:
        raise FileNotFoundError("Service token file does not exist")

    kubernetes = types.ModuleType("kubernetes")
    config = types.SimpleNamespace(load_incluster_config=load_incluster_config)
    kubernetes.config = config  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "kubernetes", kubernetes)
    problem = (
        r"k8s does not give hosts.coordinator, hosts.processes: Service token[\s\S]*JAX_COORDINATOR_ADDRESS and JAX"
    )
    with pytest.raises(ValueError, match=problem):
        found(monkeypatch, K8S, "k8s")


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


@pytest.mark.parametrize("name", CLUSTERS)
def test_jaxs_detection_takes_these_arguments(name: str):
    """A change of its private classes fails here by name."""
    cluster = CLUSTERS[name]
    inspect.signature(cluster.get_coordinator_address).bind(timeout_secs=60, override_coordinator_port=None)
    for method in (cluster.is_env_present, cluster.get_process_count, cluster.get_process_id):
        inspect.signature(method).bind()
