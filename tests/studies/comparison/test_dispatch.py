"""Lost runs are started again, failed ones reported, and finished ones left alone."""

import os
import signal
import threading

import pytest

from qlora_jax.config import ConfigError, run_main
from qlora_jax.studies.comparison import dispatch
from qlora_jax.studies.comparison.dispatch import run_all
from qlora_jax.studies.comparison.run import Run, check_unchanged
from qlora_jax.studies.comparison.run_files import FAILURE_FILE, OUTCOME_FILE
from qlora_jax.studies.comparison.train_and_score import Lost
from tests.studies.comparison.studies import Ended, Inline, by_folder, finish, read


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(dispatch, "POLL_SECONDS", 0.01)


@pytest.fixture
def runs(tmp_path):
    study = read(tmp_path)
    make = lambda seed: Run(  # noqa: E731
        study=study, stage="final", method="lora", task="numbers", settings={"train.seed": seed}
    )
    return [make(seed) for seed in (0, 1, 2)]


def test_finished_runs_are_not_performed_again(runs):
    folders = by_folder(runs)
    launcher, lines = Inline(lambda folder: finish(folders[folder])), []
    assert run_all(runs, launcher, 0, lines.append) == {}
    assert launcher.started == list(folders)
    again = Inline(pytest.fail)
    assert run_all(runs, again, 0, lines.append) == {} and again.started == []
    assert lines[0] == "3 runs, 0 of them finished before" and lines[-1] == "3 runs, 3 of them finished before"
    (runs[1].folder / OUTCOME_FILE).unlink()
    third = Inline(lambda folder: finish(folders[folder]))
    run_all(runs, third, 0, lines.append)
    assert third.started == [runs[1].folder]


def test_a_lost_run_is_started_again_and_counted_once(runs):
    folders, lost = by_folder(runs), iter([True, True, False, False, False])

    def perform(folder):
        if next(lost):
            raise Lost("killed")
        finish(folders[folder])

    launcher, lines = Inline(perform), []
    assert run_all(runs, launcher, 2, lines.append) == {}
    assert len(launcher.started) == 5 and all(run.finished for run in runs)
    assert "lost: lora, numbers, seed 0: killed; it is started again" in lines


def test_a_run_that_is_lost_too_often_is_reported(runs):
    def perform(folder):
        if folder == runs[0].folder:
            raise Lost("killed")
        finish(by_folder(runs)[folder])

    launcher = Inline(perform)
    failed = run_all(runs, launcher, 2, lambda line: None)
    assert failed == {runs[0]: "lost 3 times; the last time: killed"}
    assert launcher.started.count(runs[0].folder) == 3 and runs[1].finished and runs[2].finished


def test_a_failed_run_is_not_started_again(runs):
    def perform(folder):
        (folder / FAILURE_FILE).write_text("wrong setting\n")

    launcher = Inline(perform)
    failed = run_all(runs[:1], launcher, 5, lambda line: None)
    assert failed == {runs[0]: "wrong setting"} and len(launcher.started) == 1


class Endless(Ended):
    def done(self) -> bool:
        return self.cancelled


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_the_active_runs(runs, number):
    class Launcher:
        slots = 2

        def __init__(self):
            self.runs = []

        def start(self, folder):
            self.runs.append(Endless())
            if len(self.runs) == self.slots:
                threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
            return self.runs[-1]

    launcher = Launcher()
    lines = []

    def command(argv):
        run_all(runs, launcher, 0, lines.append)

    with pytest.raises(SystemExit) as ended:
        run_main(command, [])
    assert ended.value.code == 128 + number
    assert [run.cancelled for run in launcher.runs] == [True, True]
    assert lines[-1] == "ending 2 runs, which save checkpoints first; start the study again to continue"


def test_a_run_with_other_inputs_is_refused(runs, tmp_path):
    runs[0].prepare()
    check_unchanged(runs)
    other = read(tmp_path, settings={"data.max_length": 99})
    changed = Run(study=other, stage="final", method="lora", task="numbers", settings={"train.seed": 0})
    with pytest.raises(
        ConfigError, match=r"seed 0: started with other values of data\.max_length\. Give another output"
    ):
        check_unchanged([changed])
