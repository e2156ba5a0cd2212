"""The sweep: combinations, intervals, runs that are not done twice, and one that was cut off."""

import json
import sys

import pytest

from qlora_jax.config import write_config
from qlora_jax.training.metrics import read_metrics
from tests.e2e.project import project


@pytest.fixture
def sweep(load_script):
    return load_script("sweep")


def test_every_combination_has_a_name_of_its_own(sweep):
    alternatives = sweep.read_alternatives(["lora.rank=[4, 16]", "lora.target_modules=[all-linear, [q_proj, v_proj]]"])
    names = [cell.name for cell in sweep.cells(alternatives)]
    assert names[:2] == ["lora.rank=4 lora.target_modules=all-linear", "lora.rank=4 lora.target_modules=q_proj+v_proj"]
    assert len(set(names)) == 4 and [cell.name for cell in sweep.cells({})] == ["as configured"]
    with pytest.raises(SystemExit, match=r"'lora\.rank=4': expected section\.key=\[value"):
        sweep.read_alternatives(["lora.rank=4"])


def test_intervals_are_students(sweep):
    assert sweep.interval([1.0]) is None
    assert sweep.interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    low, high = sweep.interval([0.0, 1.0] * 50)
    assert high - low == pytest.approx(2 * 1.96 * 0.5025 / 10, rel=1e-3)


@pytest.mark.slow
def test_runs_are_done_once_and_go_on(sweep, tmp_path, monkeypatch, capsys):
    config = project(tmp_path / "project", train=dict(steps=3, eval_every=0))
    write_config(config, tmp_path / "base.yaml")
    output = tmp_path / "sweep"
    words = ["sweep.py", "--config", str(tmp_path / "base.yaml"), "--output", str(output), "--seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--set", "lora.rank=[2, 4]"])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    sweep.main()
    told = json.loads((output / "results.json").read_text())["results"]
    assert list(told) == ["lora.rank=2", "lora.rank=4"]
    for cell, measures in told.items():
        for seed, loss in enumerate(measures["held-out loss"]):
            records = read_metrics(output / "runs" / cell / f"seed {seed}" / "metrics.jsonl")
            assert loss == records[-1]["eval_loss"]
    assert len({loss for measures in told.values() for loss in measures["held-out loss"]}) == 4
    assert (output / "results.png").stat().st_size > 5000 and "lora.rank=4" in capsys.readouterr().out

    def no_training(*command):
        raise AssertionError(command)

    monkeypatch.setattr(sweep, "_python", no_training)
    sweep.main()  # all is done
    (output / "runs/lora.rank=4/seed 1/outcome.json").unlink()
    with pytest.raises(AssertionError, match="'--resume'"):
        sweep.main()
