"""Early stopping: runs end when the held-out loss stops falling, and retain the best checkpoint."""

import dataclasses

import numpy as np
import pytest

from qlora_jax.training.metrics.metrics_file import read_metrics
from tests.e2e.project import project
from tests.e2e.tiny_runs import arrays_at, numbers, run, steps_saved, stop_and_resume

# A learning rate that overshoots after some steps.
SETTINGS = {
    "optim": dict(learning_rate=0.05, warmup_ratio=0.0, max_grad_norm=0.0),
    "train": dict(steps=40, accumulation=1, eval_every=2, save_every=3, keep=1, keep_best=True, patience=2),
    "data": dict(eval_fraction=0.3),
}


def held_out(config) -> dict[int, float]:
    """Held-out losses by step."""
    records = read_metrics(f"{config.output}/metrics.jsonl")
    return {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}


@pytest.mark.slow
def test_a_run_stops_early_keeps_the_best_and_resumes_to_the_same_end(tmp_path, monkeypatch):
    config = project(tmp_path / "whole", **SETTINGS)
    assert run(config)
    losses = held_out(config)
    best, last = min(losses, key=losses.__getitem__), max(losses)
    assert 0 < best == last - 4 < 36  # two evaluations after the best one
    assert steps_saved(config) == [best, last]

    again = dataclasses.replace(config, output=str(tmp_path / "again"))
    stop_and_resume(again, best + 1, monkeypatch)
    assert numbers(again) == numbers(config) and steps_saved(again) == [best, last]
    for step in (best, last):
        for resumed, whole in zip(arrays_at(again, step), arrays_at(config, step), strict=True):
            np.testing.assert_array_equal(resumed, whole)

    assert run(again, resume=True) and held_out(again) == losses  # it is at its end
    patient = dataclasses.replace(again, train=dataclasses.replace(again.train, patience=3))
    run(patient, resume=True)
    assert max(held_out(patient)) > last
