"""The sweep: combinations, intervals, finished runs that are not repeated, and a run that was stopped."""

import importlib
import json
import sys

import pytest

from qlora_jax.config import write_config
from qlora_jax.io.run_lock import lock_run
from qlora_jax.training.metrics import read_metrics
from scripts import sweep
from tests.e2e.project import project


def test_every_combination_has_a_name_of_its_own():
    alternatives = sweep.read_alternatives(["lora.rank=[4, 16]", "lora.target_modules=[all-linear, [q_proj, v_proj]]"])
    names = [cell.name for cell in sweep.cells(alternatives)]
    assert names[:2] == ["lora.rank=4 lora.target_modules=all-linear", "lora.rank=4 lora.target_modules=q_proj+v_proj"]
    assert len(set(names)) == 4 and [cell.name for cell in sweep.cells({})] == ["as configured"]
    with pytest.raises(SystemExit, match=r"'lora\.rank=4': not a list of values"):
        sweep.read_alternatives(["lora.rank=4"])


def test_settings_that_go_together():
    cell = sweep.read_cell(["lora.method=full", "model.quant_type=none", "lora.target_modules=[q_proj,v_proj]"])
    assert cell.settings["lora.target_modules"] == ["q_proj", "v_proj"]
    assert cell.name == "lora.method=full model.quant_type=none lora.target_modules=q_proj+v_proj"
    assert sweep.read_cell([]).name == "as configured"
    with pytest.raises(SystemExit, match=r"'lora\.rank': not a setting"):
        sweep.read_cell(["lora.alpha=4", "lora.rank"])


def test_remains_of_a_stopped_run_are_removed_but_not_a_run_that_trains(tmp_path):
    run = tmp_path / "seed 0"
    with lock_run(run, pytest.fail):
        (run / "metrics.jsonl").write_text("")
        with pytest.raises(SystemExit, match="seed 0: another process trains in this folder"):
            sweep._remove(run)
        assert (run / "metrics.jsonl").exists()
    sweep._remove(run)
    assert not run.exists()


def test_differences_are_seed_by_seed():
    results = {"a": {"loss": [1.0, 2.0, 3.0]}, "b": {"loss": [1.5, 2.25, 3.0]}}
    assert sweep.differences(results) == {"b": {"loss": [0.5, 0.25, 0.0]}}


def test_intervals_are_students():
    assert sweep.interval([1.0]) is None
    assert sweep.interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    low, high = sweep.interval([0.0, 1.0] * 50)
    assert high - low == pytest.approx(2 * 1.96 * 0.5025 / 10, rel=1e-3)


def test_each_run_is_announced(tmp_path, capsys):
    class Fake(sweep.Sweep):
        def outcome(self, cell, seed):
            return {"loss": float(seed)}

    wanted = [sweep.read_cell(["lora.rank=2"]), sweep.read_cell([])]
    results = dict(sweep.run_all(Fake(tmp_path, tmp_path, {}, None, None), [3, 5], wanted))
    assert results == {name: {"loss": [3.0, 5.0]} for name in ("lora.rank=2", "as configured")}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run 1 of 4: lora.rank=2, seed 3" and lines[-1] == "run 4 of 4: as configured, seed 5"


def test_a_run_cut_off_before_its_first_checkpoint_begins_anew(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(sweep, "_python", lambda *words: commands.append(words))
    run, here = tmp_path / "run", sweep.Sweep(tmp_path / "base.yaml", tmp_path, {}, None, None)
    unfinished = run / "checkpoints/5.orbax-checkpoint-tmp-0"
    unfinished.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    here._train(sweep.read_cell([]), 0, run)
    assert not run.exists() and "--resume" not in commands[0]
    (run / "checkpoints/5").mkdir(parents=True)
    here._train(sweep.read_cell([]), 0, run)
    assert (run / "checkpoints/5").exists() and commands[1][-1] == "--resume"


@pytest.mark.slow
def test_runs_are_done_once_and_go_on(tmp_path, monkeypatch, capsys):
    config = project(tmp_path / "project", train=dict(steps=3, eval_every=0))
    write_config(config, tmp_path / "base.yaml")
    output = tmp_path / "sweep"
    words = ["sweep.py", "--config", str(tmp_path / "base.yaml"), "--output", str(output), "--seeds", "0", "1"]
    monkeypatch.setattr(
        sys, "argv", [*words, "--share", "train.steps=2", "--cell", "lora.rank=2", "--set", "lora.rank=[4]"]
    )
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(SystemExit, match=r"qlora_jax\.train --no_such 1: failed \(exit code [12]\)"):
        sweep._python("qlora_jax.train", "--no_such", "1")
    # Runs of this process share imports and compiled programs, which separate processes would repeat four times.
    monkeypatch.setattr(sweep, "_python", lambda module, *words: importlib.import_module(module).main(list(words)))
    sweep.main()
    results = json.loads((output / "results.json").read_text())["results"]
    assert list(results) == ["lora.rank=2", "lora.rank=4"]
    for cell, measures in results.items():
        for seed, loss in enumerate(measures["held-out loss"]):
            records = read_metrics(output / "runs" / cell / f"seed {seed}" / "metrics.jsonl")
            assert loss == records[-1]["eval_loss"] and records[-1]["step"] == 2
    assert len({loss for measures in results.values() for loss in measures["held-out loss"]}) == 4
    assert (output / "results.png").stat().st_size > 5000 and "lora.rank=4" in capsys.readouterr().out

    def no_training(*command):
        raise AssertionError(command)

    monkeypatch.setattr(sweep, "_python", no_training)
    sweep.main()  # everything is finished
    monkeypatch.setattr(sys, "argv", ["train.steps=3" if word == "train.steps=2" else word for word in sys.argv])
    with pytest.raises(SystemExit, match=r"lora\.rank=2/seed 0: finished with other values of train\.steps\."):
        sweep.main()
    monkeypatch.setattr(sys, "argv", ["train.steps=2" if word == "train.steps=3" else word for word in sys.argv])
    (output / "runs/lora.rank=4/seed 1/outcome.json").unlink()
    with pytest.raises(AssertionError, match="'--resume'"):
        sweep.main()
