"""Runs of several processes over loopback: the numbers of one process, one stop for all, and resuming on fewer."""

import dataclasses
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from qlora_jax.config import Config, MeshArgs, read_config, write_config
from qlora_jax.hosts.watchdog import ENDED
from qlora_jax.io.run_folder.checkpoint import open_run, saved_steps
from qlora_jax.training.metrics.metrics_file import Record, read_metrics
from qlora_jax.training.run import dry_run, train
from tests.e2e.run_records import comparable_records
from tests.e2e.test_mesh import mesh_project
from tests.e2e.test_questions import write_questions
from tests.hosts.processes import ACTS_AT, STOPPED, Ended, Started, acted_at, start, wait
from tests.marks import EXHAUSTIVE

MESH = MeshArgs(data=2, fsdp=2)
STEPS = 5
TIMES = {"seconds", "data_seconds", "tokens_per_second", "tokens_per_second_per_device", "host_bytes"}
TRAIN = dict(steps=STEPS, micro_batch_size=8, accumulation=1, save_every=2, eval_every=2)
QUIETLY = dict(resume=False, oversized=False, console=Console(file=io.StringIO()))
pytestmark = pytest.mark.slow


def settings(folder: Path) -> Config:
    """The settings of a run on 2 x 2 devices with samples, questions and paging, written to config.yaml."""
    (folder / "prompts.txt").write_text("say sun 1\nsay moon 2")
    files = write_questions(folder / "questions")
    config = mesh_project(
        folder,
        train=TRAIN | dict(samples=str(folder / "prompts.txt"), sample_tokens=4),
        # As many rows as samples have with padding, so that both compile the same programs.
        questions={name: files[name] for name in ("letters", "answers")} | dict(max_new_tokens=4, max_rows=4),
        optim=dict(paging="on", paging_budget="128KiB"),  # each device has pages of 64 KiB
    )
    config = dataclasses.replace(config, mesh=MESH)
    write_config(config, folder / "config.yaml")
    return config


def start_training(folder: Path, run: Path, processes: int, *words: str, **options) -> Started:
    """Starts the command `train` in several processes, with the settings in `folder`."""
    command = ["--config", str(folder / "config.yaml"), "--output", str(run), *words]
    return start(run.parent / f"{run.name} output", processes, devices=4 // processes, command=command, **options)


def trained(run: Path, config: Config, resume: bool = False) -> Path:
    """Trains to the end in this process."""
    output = dataclasses.replace(config, output=str(run))
    assert train(output, run, **QUIETLY | dict(resume=resume)).finished
    return run


def assert_same_run(ours: Path, whole: Path, limit: float = 1e-5) -> None:
    """Compares the records of two runs, and the adapters of their last checkpoints."""
    mine, theirs = (comparable_records(run / "metrics.jsonl") for run in (ours, whole))
    assert [record["step"] for record in mine] == [record["step"] for record in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a == {name: pytest.approx(value, rel=limit) for name, value in b.items()}
    assert read_metrics(ours / "samples.jsonl") == read_metrics(whole / "samples.jsonl")
    for a, b in zip(*(jax.tree.leaves(open_run(run).lora) for run in (ours, whole)), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """(a run of one process on 2 x 2 devices, its settings)."""
    folder = tmp_path_factory.mktemp("one")
    config = settings(folder)
    return trained(folder / "one", config), config


@pytest.mark.exhaustive
def test_sigterm_to_one_of_two_processes_saves_once_and_one_process_resumes(one: tuple[Path, Config], tmp_path: Path):
    whole, config = one
    run = tmp_path / "two"
    started = start_training(whole.parent, run, 2, actor=1, action="term")
    ended = wait({"two": started})["two"]
    assert [each.code for each in ended] == [STOPPED, STOPPED], ended
    assert saved_steps(run) == [2, ACTS_AT]
    assert "step 1/5" in ended[0].out and "step 1/5" not in ended[1].out + ended[1].err
    hosts = read_config(run / "config.yaml").hosts
    assert hosts.process is None and hosts.processes is None and hosts.coordinator is None
    before = records_until(run, ACTS_AT)
    assert before == records_until(whole, ACTS_AT)
    assert any(name.startswith("answers") for record in before for name in record)
    assert_same_run(trained(run, config, resume=True), whole)
    assert json.loads((run / "report.json").read_text())


def records_until(run: Path, step: int) -> list[Record]:
    """The records of a run's first steps, with the bytes that pages moved."""
    records = [
        {key: value for key, value in record.items() if key not in TIMES}
        for record in read_metrics(run / "metrics.jsonl")
    ]
    return [record for record in records if record["step"] <= step]


def killed_then_resumed(whole: Path, run: Path, processes: int, actor: int) -> list[Ended]:
    """Kills one of the processes of a run, and resumes it with as many."""
    killed = wait({"run": start_training(whole.parent, run, processes, actor=actor, action="kill")})["run"]
    assert [each.code for each in killed] == [-9 if index == actor else ENDED for index in range(processes)], killed
    assert max(each.at for each in killed) - acted_at(killed) < 30
    assert saved_steps(run) == [2]
    resumed = wait({"run": start_training(whole.parent, run, processes, "--resume")})["run"]
    assert [each.code for each in resumed] == [0] * processes, resumed
    return killed


@pytest.mark.parametrize(("processes", "actor"), [pytest.param(*case, marks=EXHAUSTIVE) for case in [(2, 0), (4, 2)]])
def test_a_killed_process_ends_the_run_whose_checkpoint_resumes(
    one: tuple[Path, Config], tmp_path: Path, processes: int, actor: int
):
    whole, _ = one
    run = tmp_path / "run"
    killed = killed_then_resumed(whole, run, processes, actor)
    assert all(f"process {actor} (" in each.err for index, each in enumerate(killed) if index != actor)
    assert_same_run(run, whole)


@pytest.mark.parametrize("words", [pytest.param(("--train.seed", "1"), marks=EXHAUSTIVE)])
def test_four_processes_train_as_one(one: tuple[Path, Config], tmp_path: Path, words: tuple[str, ...]):
    """Four processes of one device each; and with another seed, other numbers."""
    whole, _ = one
    runs = {"same": start_training(whole.parent, tmp_path / "same", 4)}
    assert [each.code for each in wait(runs)["same"]] == [0] * 4
    assert_same_run(tmp_path / "same", whole)
    runs = {"other": start_training(whole.parent, tmp_path / "other", 4, *words)}
    assert [each.code for each in wait(runs)["other"]] == [0] * 4
    losses = [comparable_records(folder / "metrics.jsonl")[1]["loss"] for folder in (whole, tmp_path / "other")]
    assert losses[0] != losses[1]


@pytest.mark.exhaustive
def test_the_dry_run_of_two_processes_writes_the_report_of_one(tmp_path: Path):
    """The first process alone writes; the other one prints nothing."""
    config, run = settings(tmp_path), tmp_path / "two"
    ended = wait({"two": start_training(tmp_path, run, 2, "--dry_run")})["two"]
    assert [each.code for each in ended] == [0, 0], ended
    assert "memory plan" in ended[0].out and "memory plan" not in ended[1].out + ended[1].err
    assert sorted(path.name for path in run.iterdir()) == ["report.html", "report.json"]
    dry_run(dataclasses.replace(config, output=str(tmp_path / "one")), tmp_path / "one", **QUIETLY)
    ours, whole = (json.loads((folder / "report.json").read_text()) for folder in (run, tmp_path / "one"))
    assert ours["data"] == whole["data"] and ours["rows"] == whole["rows"]
    for name in ("device_bytes", "micro_batch", "fits"):
        assert ours["memory_plan"][name] == whole["memory_plan"][name]
