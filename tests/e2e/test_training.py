"""Whole runs on a tiny model: the trained and frozen parameters, losses, memory and compilations."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.io.run_folder.checkpoint import Checkpoints
from qlora_jax.training import loop
from qlora_jax.training.metrics.metrics_file import read_metrics
from qlora_jax.training.run_spec import open_inputs
from qlora_jax.training.step import evaluation_loss, gradients, update
from tests.e2e.project import project
from tests.e2e.tiny_runs import (
    Records,
    first_batch,
    first_losses_before_and_after,
    numbers,
    run,
    run_quietly,
    session_of,
    stop_and_resume,
)


def test_the_loss_falls_and_everything_is_written(finished):
    losses = [record["eval_loss"] for record in numbers(finished) if "eval_loss" in record]
    assert len(losses) == 3 and losses[-1] < 0.8 * losses[0]
    folder = Path(finished.output)
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "loss.png",
        "metrics.jsonl",
        "report.html",
        "report.json",
    ]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["10", "9"]
    steps = [record for record in numbers(finished) if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 11))
    assert all(record["learning_rate"] > 0 for record in steps[1:])
    documented = set(re.findall(r"`(\w+)`", Path("docs/training.md").read_text()))
    assert {key for record in read_metrics(folder / "metrics.jsonl") for key in record} <= documented
    assert sum("data_seconds" in record for record in read_metrics(folder / "metrics.jsonl")) == 10


def test_only_lora_trains_and_no_code_reaches_gradients_or_optimizer(tmp_path):
    session = session_of(project(tmp_path))
    before = [np.array(leaf) for leaf in jax.tree.leaves(session.parts.base)]
    assert any(leaf.dtype == np.uint8 for leaf in before)
    progress = loop.initial_state(session)
    batch, arrays = first_batch(session)
    grads, _ = gradients(session.parts, arrays, session.dropout_key, remat="none")
    assert jax.tree.structure(grads) == jax.tree.structure(session.parts.lora)
    for tree in (grads, progress.optimizer_state):
        assert not [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype == jnp.uint8]
    assert {name.rsplit(".", 1)[1] for name in session.parts.lora} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    run_quietly(session, progress, batch)
    after = [np.array(leaf) for leaf in jax.tree.leaves(session.parts.base)]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_packed_rows_train_resume_and_waste_little(tmp_path, monkeypatch):
    whole = project(tmp_path / "whole", data=dict(packing=True), train=dict(steps=6, accumulation=1))
    report = open_inputs(whole).dataset.report
    # 1,812 places want ten packs of 192; eleven make six steps of two, one of which has a gap.
    assert (report.train.kept, report.train.tokens) == (32, 1812)
    assert (report.buckets, report.packs, report.steps) == ((192,), 11, (6,))
    assert report.padding_share == 1 - 1812 / (12 * 192)
    assert run(whole)
    assert {record["length"] for record in numbers(whole) if "loss" in record} == {192}
    losses = [record["eval_loss"] for record in numbers(whole) if "eval_loss" in record]
    assert losses[-1] < losses[0]
    config = dataclasses.replace(whole, output=str(tmp_path / "run"))
    stop_and_resume(config, 4, monkeypatch)
    assert numbers(config) == numbers(whole)


def test_mfu_is_of_the_rows_own_tokens_and_only_where_the_peak_is_known(tmp_path):
    session = session_of(project(tmp_path))
    batch, arrays = first_batch(session)
    assert batch.tokens == batch.lengths.sum() < arrays["inputs"].size
    records = Records()
    loop.train_step(session, loop.initial_state(session), batch, 0.0, records)
    known = dataclasses.replace(session.run.utilization, peak=1e9)
    again = session_of(session.run.config)  # a step takes its session's parameters
    vars(again.run)["utilization"] = known
    loop.train_step(again, loop.initial_state(again), batch, 0.0, records)
    without, record = records
    assert "mfu" not in without and without["model_flops"] == record["model_flops"]
    assert record["model_flops"] == known.flops(batch.lengths, int(arrays["weights"].sum()))
    assert record["mfu"] == pytest.approx(record["model_flops"] / record["seconds"] / 1e9)


def test_accumulation_weighs_by_tokens(tmp_path):
    session = session_of(project(tmp_path, lora=dict(dropout=0.0)))
    _, arrays = first_batch(session)
    one = {name: a.reshape(1, -1, a.shape[-1]) for name, a in arrays.items()}
    split, split_loss = gradients(session.parts, arrays, None, remat="none")
    whole, whole_loss = gradients(session.parts, one, None, remat="none")
    tokens = arrays["weights"].sum(axis=(1, 2))
    assert tokens[0] != tokens[1]  # else a mean of means would do as well
    np.testing.assert_allclose(split_loss.total, whole_loss.total, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()) + 1e-9)


@pytest.mark.slow
def test_rematerialization_changes_memory_and_not_gradients(tmp_path):
    session = session_of(project(tmp_path, layers=16))  # so many that what is kept of each outweighs the logits
    (plain, most), *others = (_gradients_and_memory(session, remat) for remat in ("none", "names", "full"))
    for (again, memory), share in zip(others, (0.9, 0.5), strict=True):
        for a, b in zip(plain, again, strict=True):
            # XLA fuses the two otherwise: f32 rounding through 16 layers, 2.4e-6 of the largest with jax 0.11.2.
            np.testing.assert_allclose(a, b, atol=8e-6 * float(jnp.abs(b).max()) + 1e-9)
        assert memory.temp_size_in_bytes < share * most.temp_size_in_bytes


def _gradients_and_memory(session, remat):
    compiled = _lowered_gradients(session, remat).compile()
    grads, _ = compiled(session.parts, first_batch(session)[1], session.dropout_key)
    return jax.tree.leaves(grads), compiled.memory_analysis()


def _lowered_gradients(session, remat):
    _, arrays = first_batch(session)
    return gradients.lower(session.parts, arrays, session.dropout_key, remat=remat)


@pytest.mark.slow
@pytest.mark.parametrize(("on_device", "on_host"), [("full", "offload"), ("attention", "offload_attention")])
def test_activations_that_wait_in_host_memory_change_no_bit(on_device, on_host, tmp_path):
    """XLA for CPUs drops the moves that JAX asks for, so a run on a CPU is refused."""
    session = session_of(project(tmp_path, layers=4))
    full, away = (_gradients_and_memory(session, remat) for remat in (on_device, on_host))
    for a, b in zip(full[0], away[0], strict=True):
        np.testing.assert_array_equal(a, b)
    assert away[1].host_temp_size_in_bytes == 0
    full, away = (_lowered_gradients(session, remat).as_text() for remat in (on_device, on_host))
    assert "memory_kind" in away and "memory_kind" not in full


class FlushedRecords(Records):
    """Knows how many of its records are on the disk."""

    flushed = 0

    def flush(self):
        self.flushed = len(self)
        return {}


class WatchedCheckpoints(Checkpoints):
    """Expects all records on the disk before a save."""

    def save(self, step, *args):
        assert self.records.flushed == len(self.records) > 0
        assert self.records[-1]["step"] == step
        self.steps = [*getattr(self, "steps", []), step]
        super().save(step, *args)


def test_compilations_are_one_a_length_and_one_update(tmp_path):
    config = project(tmp_path)
    session = session_of(config)
    assert len(session.run.gradients) == 1  # for the longest batches, before the model was loaded
    for function in (update, evaluation_loss.plain):
        function.clear_cache()
    records = FlushedRecords()
    with WatchedCheckpoints(Path(config.output), config.train.keep) as checkpoints:
        checkpoints.records = records
        loop.run_steps(session, loop.initial_state(session), checkpoints, records, lambda: False)
    assert checkpoints.steps == [3, 6, 9, 10]
    assert len(session.run.inputs.dataset.buckets) == 2
    assert len(session.run.gradients) == len(session.run.inputs.dataset.buckets)
    assert update._cache_size() == 1
    assert evaluation_loss.plain._cache_size() <= len(session.run.inputs.dataset.eval_buckets)


def test_a_loss_that_is_not_finite_stops_and_names_the_rows(tmp_path):
    session = session_of(project(tmp_path))
    broken = jax.tree.map(lambda leaf: leaf + jnp.nan, session.parts.lora)
    progress = dataclasses.replace(loop.initial_state(session), lora=broken)
    batch, _ = first_batch(session)
    with pytest.raises(
        loop.NonFiniteLoss, match=r"step 1: .*rows\.jsonl:\d+.*No checkpoint was saved before this step"
    ):
        run_quietly(session, progress, batch)


def test_training_goes_on_from_an_adapter(finished, tmp_path):
    """The first loss is what the exported adapter gives, not what a fresh one would."""
    fresh, more = first_losses_before_and_after(finished, tmp_path)
    assert more < 0.9 * fresh
