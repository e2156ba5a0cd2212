"""One run: trained or resumed, scored, and its outcome written last."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qlora_jax.io.run_folder.run_lock import lock_run
from qlora_jax.studies.comparison import train_and_score as module
from qlora_jax.studies.comparison.run import Run
from qlora_jax.studies.comparison.run_files import FAILURE_FILE, LOG_FILE
from qlora_jax.studies.comparison.train_and_score import Failed, Lost, perform, seconds_per_step
from qlora_jax.training.metrics.metrics_file import MetricsFile
from tests.studies.comparison.studies import read

STEP = {"loss": 1.0, "tokens": 4, "supervised_tokens": 2, "length": 8, "seconds": 0.5, "learning_rate": 0.1}


def trained(run):
    """Writes what a finished training run leaves."""
    folder = run.folder / "run"
    folder.mkdir(parents=True, exist_ok=True)
    with MetricsFile(folder / "metrics.jsonl", 0) as metrics:
        for step in (1, 2, 3):
            metrics.write({"step": step, **STEP, "seconds": float(4 - step)})
        metrics.write({"step": 3, "eval_loss": 0.75, "eval_perplexity": 2.1})
    (folder / "report.json").write_text(json.dumps({"memory_plan": {"peak_bytes": 123}, "other": 1}))
    (folder / "checkpoints/3").mkdir(parents=True, exist_ok=True)


def scored(run):
    column = {"loss per token": {"values": [1.0, 2.0], "weights": [1.0, 3.0]}}
    scores = {"tasks": {"rows": {"rows": {"checkpoint": column}}}}
    (run.folder / "scores.json").write_text(json.dumps(scores))


@pytest.fixture
def runs(tmp_path):
    """A run of the search and one that counts, both prepared."""
    study = read(tmp_path)
    settings = {"train.seed": 0, "optim.learning_rate": 0.01}
    made = [Run(study=study, stage=s, method="lora", task="numbers", settings=settings) for s in ("search", "final")]
    for run in made:
        run.prepare()
    return made


@pytest.fixture
def commands(monkeypatch):
    """Records commands in place of running them."""
    found: list[list[str]] = []
    monkeypatch.setattr(module, "_command", lambda folder, job, words, stop: found.append(words))
    return found


def test_a_run_is_trained_scored_and_read(runs, commands):
    search, final = runs
    for run in runs:
        trained(run)
    scored(final)
    perform(str(final.folder))
    perform(str(search.folder))
    train, evaluate, other = commands
    assert train == ["-m", "qlora_jax.train", "--config", str(final.folder / "settings.yaml"), "--resume"]
    assert evaluate[1:6] == [
        "qlora_jax.evaluate",
        "--rows",
        final.job()["evaluate"]["rows"],
        "--run",
        str(final.folder / "run"),
    ]
    assert other[1] == "qlora_jax.train"
    outcome = final.outcome()
    assert (outcome["values"], outcome["weights"], outcome["peak_bytes"]) == ([1.0, 2.0], [1.0, 3.0], 123)
    assert (outcome["steps"], outcome["seconds"], outcome["seconds_per_step"]) == (3, 6.0, 1.5)
    assert search.outcome()["search_loss"] == 0.75 and search.outcome()["values"] == []
    assert (final.folder / "run/checkpoints").exists() and not (search.folder / "run/checkpoints").exists()
    perform(str(final.folder))
    assert len(commands) == 3  # a finished run does nothing


def test_a_run_whose_scoring_was_cut_off_is_not_trained_again(runs, commands):
    _, final = runs
    trained(final)
    with pytest.raises(OSError, match="scores"):
        perform(str(final.folder))
    assert [words[1] for words in commands] == ["qlora_jax.train", "qlora_jax.evaluate"] and not final.finished
    scored(final)
    perform(str(final.folder))
    assert [words[1] for words in commands[2:]] == ["qlora_jax.evaluate"] and final.finished


def test_a_run_cut_off_before_its_first_checkpoint_begins_anew(runs, commands, monkeypatch):
    search, _ = runs
    remains = search.folder / "run/checkpoints/5.orbax-checkpoint-tmp-0"
    remains.mkdir(parents=True)
    monkeypatch.setattr(module, "_command", lambda *words: trained(search) if not remains.exists() else pytest.fail())
    perform(str(search.folder))
    assert search.finished


def test_an_error_of_a_command_is_a_failure_and_a_signal_a_loss(runs):
    search, _ = runs
    run = lambda code: module._command(search.folder, search.job(), ["-c", code], None)  # noqa: E731
    run("print('fine')")
    with pytest.raises(Failed, match=r"(?s)failed \(exit code 2\):\nno such file$"):
        run("import sys; print('no such file'); sys.exit(2)")
    for code in ("import sys; sys.exit(143)", "import os; os.kill(os.getpid(), 9)"):
        with pytest.raises(Lost, match=r"was killed or stopped \(exit code (143|-9)\)"):
            run(code)


def test_a_failure_is_written_and_forgotten_at_the_next_start(runs, monkeypatch):
    search, _ = runs

    def fail(*words):
        raise Failed("qlora_jax.train failed")

    monkeypatch.setattr(module, "_command", fail)
    perform(str(search.folder))
    assert (search.folder / FAILURE_FILE).read_text() == "qlora_jax.train failed\n" and not search.finished
    monkeypatch.setattr(module, "_command", lambda *words: trained(search))
    perform(str(search.folder))
    assert search.finished and not (search.folder / FAILURE_FILE).exists()


def diverge(*words):
    raise Failed("qlora_jax.train failed (exit code 1):\nstep 3: the loss or its gradient is not finite")


def test_a_learning_rate_that_diverges_is_an_outcome_of_the_search(runs, monkeypatch):
    search, final = runs
    monkeypatch.setattr(module, "_command", diverge)
    perform(str(search.folder))  # at its first step
    assert search.finished and not (search.folder / FAILURE_FILE).exists()
    first = search.outcome()
    assert (first["search_loss"], first["steps"], first["seconds"], first["seconds_per_step"]) == (None, 0, 0.0, 0.0)
    monkeypatch.setattr(module, "_command", lambda *words: pytest.fail("trained again"))
    perform(str(search.folder))
    monkeypatch.setattr(module, "_command", diverge)
    perform(str(final.folder))
    assert not final.finished and "is not finite" in (final.folder / FAILURE_FILE).read_text()


def test_a_diverged_run_has_its_steps_but_no_loss(runs, monkeypatch):
    search, _ = runs

    def train_and_diverge(*words):
        trained(search)  # with a loss on the rows of the search
        (search.folder / "run/report.json").unlink()
        diverge()

    monkeypatch.setattr(module, "_command", train_and_diverge)
    perform(str(search.folder))
    outcome = search.outcome()
    assert (outcome["search_loss"], outcome["steps"], outcome["seconds"]) == (None, 3, 6.0)
    assert outcome["peak_bytes"] is None and not (search.folder / "run/checkpoints").exists()


def test_a_stopped_command_gets_one_sigterm_and_ends_by_itself(runs):
    search, _ = runs
    code = (
        "import signal, sys, time\n"
        "saving = []\n"
        "signal.signal(signal.SIGTERM, lambda *a: (saving.append(1), print('saving', flush=True)))\n"
        "print('ready', flush=True)\n"
        "while not saving: time.sleep(0.02)\n"
        "time.sleep(0.3); sys.exit(143)"
    )
    stop = threading.Event()

    def stop_when_ready():
        while "ready" not in (search.folder / LOG_FILE).read_text():
            time.sleep(0.02)
        stop.set()

    (search.folder / LOG_FILE).touch()
    threading.Thread(target=stop_when_ready).start()
    with pytest.raises(Lost, match="exit code 143"):
        module._command(search.folder, search.job(), ["-c", code], stop)
    assert (search.folder / LOG_FILE).read_text().count("saving") == 1


def test_a_locked_run_is_waited_for_and_then_lost(runs, commands, monkeypatch):
    search, _ = runs
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.3)
    with lock_run(search.folder / "run", pytest.fail), pytest.raises(Lost, match="another process writes"):
        perform(str(search.folder))
    assert commands == []


def test_one_worker_at_a_time_performs_a_run(runs, commands, monkeypatch):
    search, _ = runs
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.3)
    with lock_run(search.folder, pytest.fail), pytest.raises(Lost, match="another process writes"):
        perform(str(search.folder))
    assert commands == []
    monkeypatch.setattr(module, "LOCK_SECONDS", 20.0)
    monkeypatch.setattr(module, "_command", lambda *words: (commands.append(words), time.sleep(0.3), trained(search)))
    workers = [threading.Thread(target=perform, args=(str(search.folder),)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(commands) == 1 and search.finished


def test_a_run_is_cleaned_up_before_it_counts_as_finished(runs, commands, monkeypatch):
    search, _ = runs
    trained(search)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_remove_checkpoints", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            perform(str(search.folder))
    assert not search.finished
    perform(str(search.folder))
    assert search.finished and not (search.folder / "run/checkpoints").exists() and len(commands) == 1


def test_a_command_whose_worker_ended_before_it_began_does_nothing(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    words = [sys.executable, "-m", "qlora_jax.studies.comparison.end_with_parent"]
    assert subprocess.run([*words, str(ended.pid), "-c", code], check=False).returncode == 143
    assert not (tmp_path / "ran").exists()
    assert subprocess.run([*words, str(os.getpid()), "-c", code], check=False).returncode == 0
    assert (tmp_path / "ran").exists()


def test_a_command_ends_when_its_worker_is_killed(tmp_path):
    report = tmp_path / "report"
    child = f"import os, time; open({str(report)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    worker = (
        "import os, subprocess, sys, time\n"
        "runner = 'qlora_jax.studies.comparison.end_with_parent'\n"
        f"words = [sys.executable, '-m', runner, str(os.getpid()), '-c', {child!r}]\n"
        "subprocess.Popen(words, start_new_session=True)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", worker])
    while not report.exists() or not report.read_text():
        time.sleep(0.02)
    process.kill()
    process.wait()
    end = time.monotonic() + 30
    while _runs(report.read_text()):
        assert time.monotonic() < end, "the command survived its worker"
        time.sleep(0.05)


def _runs(process_id: str) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def step(length, seconds):
    return {"step": 1, "loss": 1.0, "length": length, "seconds": seconds, "data_seconds": 0.5}


def test_compiling_steps_do_not_count():
    assert seconds_per_step([step(8, 9.0), step(8, 1.0), step(16, 7.0), step(16, 2.0)]) == pytest.approx(2.0)
    assert seconds_per_step([step(8, 9.0), step(16, 7.0), {"step": 1, "eval_loss": 1.0}]) == pytest.approx(8.5)
