"""Training in float16: the factor of the loss, steps that are skipped, and resuming."""

import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest

from qlora_jax.models.precision import compute_dtype
from qlora_jax.training import loop, loss_scale
from qlora_jax.training.display.run_display import Throughput, status_fields
from qlora_jax.training.loss_scale import LEAST, LossScale
from qlora_jax.training.metrics.metrics_file import read_metrics
from qlora_jax.training.step import gradients
from tests.e2e.project import project
from tests.e2e.tiny_runs import arrays_at, numbers, run, stop_and_resume
from tests.training.mesh_models import WHOLE_VOCABULARY, mesh_batch, mesh_config, mesh_parts

CONFIG = mesh_config(WHOLE_VOCABULARY)
SCALER = Path(__file__).parent.parent / "oracle/grad_scaler.py"


def test_the_factor_is_that_of_torch(oracle, monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 5)
    finite = [True] * 4 + [False] * 2 + [True] * 12 + [False, True]
    found = [*itertools.accumulate(finite, LossScale.after, initial=LossScale())][1:]
    expected = oracle(SCALER, finite=finite, growth_interval=5)
    assert [each.factor for each in found] == expected["factor"].tolist()
    assert [each.finite_steps for each in found] == expected["finite_steps"].tolist()
    assert [n - each.skipped for n, each in enumerate(found, 1)] == expected["updates"].tolist()


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_factor_changes_gradients_in_float32_by_rounding_alone(accumulated):
    parts, batch = mesh_parts(CONFIG), mesh_batch(CONFIG, (accumulated, 2, 64))
    expected, _ = gradients(parts, batch, None, remat="names")
    scaled, _ = gradients(parts, batch, None, np.float32(4096), remat="names")
    for found, wanted in zip(jax.tree.leaves(scaled), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(found - wanted) < 2e-6 * np.linalg.norm(wanted)


def test_gradients_in_float16_are_those_of_float32_to_its_precision():
    batch = mesh_batch(CONFIG, (1, 2, 64))
    expected, _ = gradients(mesh_parts(CONFIG), batch, None, remat="names")
    found, _ = gradients(mesh_parts(CONFIG, dtype="float16"), batch, None, np.float32(1024), remat="names")
    for one, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(one - wanted) < 0.01 * np.linalg.norm(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("paging", ["off", "on"])
def test_steps_that_overflow_change_nothing_and_a_resumed_run_is_equal_to_the_bit(paging, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LossScale", lambda: LossScale(2.0**24))
    optim = dict(paging=paging, paging_budget="40KiB") if paging == "on" else {}
    whole = project(tmp_path / "whole", model=dict(compute_dtype="float16"), optim=optim)
    assert run(whole)
    steps = [record for record in read_metrics(Path(whole.output) / "metrics.jsonl") if "loss_scale" in record]
    skipped = [record for record in steps if "skipped" in record]
    assert 0 < len(skipped) < 9 and all(("grad_norm" in record) != ("skipped" in record) for record in steps)
    for one, following in itertools.pairwise(steps):
        assert following["loss_scale"] == one["loss_scale"] / (1 + ("skipped" in one))
        assert (following["learning_rate"] == one["learning_rate"]) == ("skipped" in one)
    assert any("skipped: gradients overflow float16" in text for text in status_fields(skipped[0], Throughput(), 9))
    resumed = dataclasses.replace(whole, output=str(tmp_path / "run"))
    stop_and_resume(resumed, 2, monkeypatch)
    assert numbers(resumed) == numbers(whole)
    for again, once in zip(arrays_at(resumed, 10), arrays_at(whole, 10), strict=True):
        np.testing.assert_array_equal(again, once)


@pytest.mark.slow
def test_gradients_that_overflow_at_the_least_factor_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LossScale", lambda: LossScale(2 * LEAST))
    monkeypatch.setattr(loop, "all_finite", lambda grads: False)
    with pytest.raises(loop.NonFiniteLoss, match="step 2: the loss or its gradient is not finite"):
        run(project(tmp_path, model=dict(compute_dtype="float16")))


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16"), (None, "bfloat16")])
def test_gpus_without_bfloat16_compute_in_float16(capability, dtype):
    assert compute_dtype("auto", "gpu", capability) == dtype
    assert compute_dtype("float32", "gpu", capability) == "float32"
