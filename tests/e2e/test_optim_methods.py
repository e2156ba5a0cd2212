"""Whole runs with LoRA+, NEFTune, LoRA-FA and adapters on some layers; stopped, resumed and paged, equal to the bit."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.io.run_folder.checkpoint import open_run
from tests.e2e.project import project
from tests.e2e.test_paging import assert_same_runs, paging_numbers, with_paging
from tests.e2e.tiny_runs import first_losses_before_and_after, numbers, run, stop_and_resume

SETTINGS = {
    "loraplus, neftune": dict(
        lora=dict(dropout=0.0),
        optim=dict(loraplus_lr_ratio=4.0, learning_rate=3e-3),
        train=dict(neftune_noise_alpha=5.0),
    ),
    "lora_fa": dict(lora=dict(method="lora_fa")),
    "some layers": dict(lora=dict(layers_to_transform="1,3")),
}


@pytest.fixture(scope="module", params=list(SETTINGS))
def finished(request, tmp_path_factory):
    """A run of 10 steps, uninterrupted."""
    settings = {"data": {"buckets": 1}, **SETTINGS[request.param]}
    config = project(tmp_path_factory.mktemp("finished"), layers=4, **settings)
    assert run(config)
    return config


@pytest.mark.slow
def test_a_resumed_paged_run_equals_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    config = with_paging(finished, tmp_path / "run", paging="on", paging_budget="70KiB")
    stop_and_resume(config, 4, monkeypatch)
    assert_same_runs(config, finished)
    assert any(moved for moved, *_ in paging_numbers(config)[1:])
    if finished.lora.method == "lora_fa":
        assert_a_stays(finished)
    losses = [record["eval_loss"] for record in numbers(finished) if "eval_loss" in record]
    assert losses[-1] < 0.95 * losses[0]


def assert_a_stays(config):
    """A is the same in both checkpoints, B is not."""
    before, last = (open_run(Path(config.output), step).lora for step in (9, 10))
    for name, leaves in before.items():
        np.testing.assert_array_equal(leaves["lora_a"], last[name]["lora_a"])
        assert np.any(leaves["lora_b"] != last[name]["lora_b"])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_they_change_training_only(finished, tmp_path):
    """The first evaluation is that of a run without them, the last is not."""
    plain = dataclasses.replace(
        finished,
        output=str(tmp_path / "run"),
        lora=dataclasses.replace(finished.lora, method="lora", layers_to_transform=None),
        optim=dataclasses.replace(finished.optim, loraplus_lr_ratio=None),
        train=dataclasses.replace(finished.train, neftune_noise_alpha=None),
    )
    run(plain)
    ours, theirs = ([r["eval_loss"] for r in numbers(c) if "eval_loss" in r] for c in (finished, plain))
    assert ours[0] == theirs[0] and ours[-1] != theirs[-1]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_training_goes_on_from_the_exported_adapter(finished, tmp_path):
    fresh, more = first_losses_before_and_after(finished, tmp_path)
    assert more < 0.95 * fresh
