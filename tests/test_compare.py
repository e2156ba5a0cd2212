"""`qlora-jax compare`: from a study file to the page, stopped and continued."""

import csv
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from qlora_jax import compare
from qlora_jax.config import to_dict
from qlora_jax.studies.comparison import dispatch, run_study
from qlora_jax.studies.comparison import train_and_score as performing
from qlora_jax.studies.comparison.train_and_score import perform
from qlora_jax.training.metrics.metrics_file import read_metrics
from tests.e2e.project import project
from tests.studies.comparison.studies import Inline, write_study

ROOT = Path(__file__).resolve().parent.parent


def tiny(folder, **changes):
    """Writes a study of a random Llama: one method, one task, one seed, two learning rates."""
    config = project(folder / "project", train=dict(steps=3, eval_every=0, save_every=1))
    base = to_dict(config)
    for key in ("train", "eval", "eval_fraction"):
        del base["data"][key]
    del base["output"], base["train"]["seed"], base["train"]["steps"], base["train"]["epochs"]
    study = yaml.safe_load(Path(write_study(folder)).read_text())
    study |= {
        "base": str(folder / "base.yaml"),
        "methods": {"lora": {}},
        "seeds": [0],
        "learning_rates": [0.001, 0.1],
    }
    base["lora"] = {"rank": 4}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "study.yaml").write_text(yaml.safe_dump(study | changes, sort_keys=False))
    return folder / "study.yaml", Path(study["output"])


def test_a_dry_run_checks_the_study_and_starts_nothing(tmp_path, capsys):
    compare.main([write_study(tmp_path), "--dry_run"])
    printed = capsys.readouterr().out
    assert "4,884,480" in printed and not (tmp_path / "study").exists()  # rank 16 of SmolLM2
    with pytest.raises(ValueError, match="study: missing"):
        compare.main(["--dry_run"])


@pytest.mark.slow
def test_a_study_is_performed_once(tmp_path, monkeypatch, capsys):
    study, output = tiny(tmp_path)
    # Runs of this process share imports and compiled programs, which separate processes would repeat.
    monkeypatch.setattr(
        performing, "_command", lambda folder, job, words, stop: importlib.import_module(words[1]).main(words[2:])
    )
    monkeypatch.setattr(dispatch, "POLL_SECONDS", 0.0)
    launcher = Inline(lambda folder: perform(str(folder)))
    monkeypatch.setattr(run_study, "launcher_of", lambda args, output: nullcontext(launcher))
    compare.main([str(study)])
    assert len(launcher.started) == 2 + 1
    with open(output / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        records = read_metrics(output / row["folder"] / "run/metrics.jsonl")
        assert records[-1]["step"] == 3 == int(row["steps"]) and float(row["seconds"]) > 0
    searched = {
        float(row["learning_rate"]): float(row["search_loss"])
        for row in rows
        if row["method"] == "lora" and row["value"] == ""
    }
    best = min(searched, key=lambda rate: searched[rate])
    final = [row for row in rows if row["stage"] == "final"]
    assert {float(row["learning_rate"]) for row in final if row["method"] == "lora"} == {best}
    for row in final:
        scores = json.loads((output / row["folder"] / "scores.json").read_text())
        value = scores["tasks"]["rows"]["columns"]["checkpoint"]["loss per token"]["value"]
        assert float(row["value"]) == pytest.approx(value, rel=1e-6)
    printed = capsys.readouterr().out
    assert "1. lora" in printed and (output / "comparison.html").stat().st_size > 20_000
    compare.main([str(study)])
    assert len(launcher.started) == 3  # everything is finished


def start(study):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", "qlora_jax.compare", str(study)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_checkpoint(output, process):
    end = time.monotonic() + 300
    while not any(path.name.isdecimal() for path in output.glob("runs/*/*/*/run/checkpoints/*")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_processes_that_are_stopped_and_killed_continue_to_the_same_values(tmp_path):
    """One study runs undisturbed. The other loses a run's process, is stopped by Ctrl-C, killed, and started again."""
    values = []
    for name in ("calm", "disturbed"):
        (tmp_path / name).mkdir()
        study, output = tiny(
            tmp_path / name,
            learning_rates=None,
            seeds=[0, 1],
            budget={"steps": 8},
        )
        text = study.read_text()
        study.write_text("\n".join(line for line in text.splitlines() if "search" not in line) + "\n")
        if name == "disturbed":
            for number in (signal.SIGINT, signal.SIGKILL):
                process = start(study)
                wait_for_checkpoint(output, process)
                process.send_signal(number)
                printed, _ = process.communicate(timeout=120)
                assert number == signal.SIGKILL or (process.returncode == 130 and "start the study again" in printed)
        process = start(study)
        if name == "disturbed":
            wait_for_checkpoint(output, process)
            subprocess.run(["pkill", "-KILL", "-P", str(process.pid)], check=False)
        printed, _ = process.communicate(timeout=600)
        assert process.returncode == 0, printed
        with open(output / "runs.csv", newline="") as file:
            values.append([(row["seed"], row["value"], row["steps"]) for row in csv.DictReader(file)])
    assert values[0] == values[1] and len(values[0]) == 2


def test_the_commands_that_people_copy_name_the_model_that_the_study_lacks():
    assert "model" not in yaml.safe_load((ROOT / "configs/studies/first_sweep.yaml").read_text())
    shown = f"{(ROOT / 'README.md').read_text()}\n{compare.COMMAND.example}"
    commands = re.findall(r"configs/studies/first_sweep\.yaml.*", shown)
    assert len(commands) == 2 and all("--model " in command for command in commands)
