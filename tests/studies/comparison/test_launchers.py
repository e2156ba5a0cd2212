"""Launchers perform runs on this machine, as jobs of submitit's local executor, and as tasks of a local Ray cluster."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest

from qlora_jax.studies.comparison.dispatch import launcher_of, run_all
from qlora_jax.studies.comparison.run import Run
from qlora_jax.studies.comparison.run_files import JOB_FILE, LOG_FILE
from qlora_jax.studies.comparison.settings import CompareArgs
from tests.studies.comparison.studies import read
from tests.studies.comparison.test_train_and_score import trained

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def runs(tmp_path):
    """Three runs that are trained already, so that performing them takes no longer than reading their files."""
    study, made = read(tmp_path), []
    for seed in (0, 1, 2):
        run = Run(study=study, stage="final", method="lora", task="numbers", settings={"train.seed": seed})
        run.prepare()
        job = json.loads((run.folder / JOB_FILE).read_text()) | {"evaluate": None}
        (run.folder / JOB_FILE).write_text(json.dumps(job))
        trained(run)
        (run.folder / "trained").touch()
        made.append(run)
    return made


def perform(runs, tmp_path, **args):
    lines: list[str] = []
    with launcher_of(CompareArgs(study="study.yaml", **args), tmp_path) as launcher:
        failed = run_all(runs, launcher, 1, lines.append)
    return failed, lines


def test_local(runs, tmp_path):
    failed, lines = perform(runs, tmp_path, processes=2)
    assert failed == {} and all(run.finished for run in runs)
    assert len([line for line in lines if line.startswith("finished")]) == 3


def test_unknown_settings_of_submitit_are_refused(tmp_path):
    pytest.importorskip("submitit")
    for settings, problem in (
        ({"cluster": "local", "timeout": 5}, "submitit: NameError: .*Correct --submitit"),
        ({"cluster": "nowhere"}, "submitit: ValueError: AutoExecutor doesn't know any executor named nowhere"),
        ({"cluster": "local", "timeout_min": "five"}, "submitit: AssertionError: .*timeout_min"),
    ):
        with (
            pytest.raises(ValueError, match=problem),
            launcher_of(CompareArgs(study="s", launcher="submitit", submitit=settings), tmp_path),
        ):
            pass


@pytest.mark.exhaustive
@pytest.mark.slow
def test_submitit_and_a_killed_job(runs, tmp_path):
    """The first run fails to start until its job is killed; it is then started again as another job."""
    pytest.importorskip("submitit")
    settings = {"cluster": "local", "timeout_min": 5}
    lines: list[str] = []
    with launcher_of(CompareArgs(study="s", launcher="submitit", submitit=settings), tmp_path) as launcher:
        start, killed = launcher.start, []

        def start_and_kill(folder):
            started = start(folder)
            if not killed:
                killed.append(folder)
                os.kill(int(started._job.job_id), signal.SIGKILL)
            return started

        launcher.start = start_and_kill
        failed = run_all(runs, launcher, 1, lines.append)
    assert failed == {} and all(run.finished for run in runs)
    assert len([line for line in lines if line.startswith("lost: lora, numbers, seed 0: job")]) == 1
    assert len([line for line in lines if line.startswith("finished")]) == 3


@pytest.mark.slow
@pytest.mark.exhaustive  # Ray waits 30 s for its processes, which a machine with other work may exceed
@pytest.mark.filterwarnings("ignore")
def test_ray_and_a_killed_worker(runs, tmp_path):
    """A worker of a local cluster is killed while it waits for a run's lock; the run is started again."""
    pytest.importorskip("ray")
    from qlora_jax.io.run_folder.run_lock import lock_run

    (runs[0].folder / "trained").unlink()  # it waits for the lock before it trains
    lines: list[str] = []
    with contextlib.ExitStack() as stack:
        launcher = _local_cluster(stack, tmp_path)
        start, first = launcher.start, []

        def start_and_kill(folder):
            if first or folder != runs[0].folder:
                (folder / "trained").touch()
                return start(folder)
            with lock_run(folder / "run", pytest.fail):
                first.append(start(folder))
                _kill_worker()
            return first[0]

        launcher.start = start_and_kill
        failed = run_all(runs, launcher, 1, lines.append)
    assert failed == {} and all(run.finished for run in runs)
    assert len([line for line in lines if line.startswith("lost: lora, numbers, seed 0: ")]) == 1
    assert not (runs[0].folder / LOG_FILE).exists()


def _local_cluster(stack, tmp_path):
    """Starts a local Ray cluster, which a busy machine may not do within the 30 s that Ray waits."""
    args = CompareArgs(study="s", launcher="ray", ray={"num_cpus": 1})
    for _ in range(2):
        with contextlib.suppress(ValueError):
            return stack.enter_context(launcher_of(args, tmp_path))
    return stack.enter_context(launcher_of(args, tmp_path))


def _kill_worker():
    """Kills the process of the one task that runs, among the descendants of this process."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()):
            if _command_of(pid).startswith(b"ray::perform") and os.getpid() in _ancestors(pid):
                os.kill(pid, signal.SIGKILL)
                return
        time.sleep(0.2)
    pytest.fail("no task started")


def _command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _ancestors(pid):
    found = []
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        found.append(pid)
    return found
