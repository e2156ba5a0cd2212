"""Whole runs on a tiny model: the trained and frozen parameters; stopping and resuming change nothing."""

import dataclasses
import io
import os
import re
import shutil
import socket
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from rich.console import Console

from qlora_jax.config import HostsArgs, MeshArgs
from qlora_jax.data.batching.batches import window_order
from qlora_jax.io.export.original_delta import adapter_for_export
from qlora_jax.io.export.peft import export_peft
from qlora_jax.io.loading.base_fingerprint import same_form
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.pretrained import open_finetuned
from qlora_jax.io.run_folder.checkpoint import Checkpoints, open_run
from qlora_jax.io.run_folder.checkpoint_reader import read_state
from qlora_jax.training import loop
from qlora_jax.training.checkpoint_state import check_resumable, checkpoint_state
from qlora_jax.training.evaluation.early_stopping import BestEvaluation
from qlora_jax.training.evaluation.forward import evaluation_loss
from qlora_jax.training.metrics.metrics_file import read_metrics
from qlora_jax.training.run import dry_run, lock_output, train
from qlora_jax.training.session import compile_gradients, open_inputs, prepare, weights_of
from qlora_jax.training.step import gradients, update
from tests.e2e.project import project, stop_after, write_model, write_rows
from tests.e2e.run_records import comparable_records
from tests.marks import first_always


def quiet() -> Console:
    return Console(file=io.StringIO())


def session_of(config):
    inputs = open_inputs(config)
    return prepare(config, inputs, compile_gradients(config, inputs), lambda *_: None)


def run(config, resume=False):
    return train(config, Path(config.output), resume=resume, oversized=False, console=quiet())


def numbers(config):
    """The records of a run that equal runs share."""
    return comparable_records(Path(config.output) / "metrics.jsonl")


def steps_saved(config):
    """Returns the steps of a run's checkpoints."""
    return sorted(int(folder.name) for folder in (Path(config.output) / "checkpoints").iterdir())


def arrays_at(config, step):
    folder = Path(config.output) / "checkpoints" / str(step)
    checkpointer = ocp.StandardCheckpointer()
    return jax.tree.leaves([checkpointer.restore(folder.absolute() / item) for item in ("lora", "optimizer")])


def first_batch(session):
    batch = next(session.dataset.train_batches())
    return batch, batch.arrays()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 10 steps, uninterrupted."""
    config = project(tmp_path_factory.mktemp("finished"))
    assert run(config)
    return config


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


class Records(list):
    """A reporter that remembers."""

    def step(self, record):
        self.append(record)

    evaluation = step
    samples = list.extend

    def evaluation_progress(self, words):
        pass


def run_quietly(session, progress, batch):
    return loop.train_step(session, progress, batch, 0.0, Records())


@pytest.mark.parametrize("steps", first_always([5, 1, 6]))
def test_a_resumed_run_equals_an_uninterrupted_one(finished, tmp_path, steps, monkeypatch):
    """Also if the signal cuts off an evaluation, as it does after step 5."""
    config = dataclasses.replace(finished, output=str(tmp_path / "run"))
    _stop_and_resume(config, steps, monkeypatch)
    assert numbers(config) == numbers(finished)
    assert len([*(Path(config.output) / "checkpoints").iterdir()]) == config.train.keep, "nobody asked for the best one"
    for resumed, whole in zip(arrays_at(config, 10), arrays_at(finished, 10), strict=True):
        np.testing.assert_array_equal(resumed, whole)


def test_a_run_whose_newest_checkpoint_is_damaged_ends_as_an_uninterrupted_one(finished, tmp_path):
    config = dataclasses.replace(finished, output=str(tmp_path / "run"))
    folder = Path(shutil.copytree(finished.output, config.output)) / "checkpoints"
    file = max((folder / "10/optimizer").rglob("d/*"), key=lambda path: path.stat().st_size)
    data, middle = file.read_bytes(), file.stat().st_size // 2
    file.write_bytes(data[:middle] + bytes(64) + data[middle + 64 :])
    with pytest.warns(UserWarning, match=r"(?s)10/optimizer: the checkpoint of step 10 is damaged.*from step 9"):
        assert run(config, resume=True)
    assert sorted(entry.name for entry in folder.iterdir()) == ["10", "10.damaged", "9"]
    assert numbers(config) == numbers(finished)
    for resumed, whole in zip(arrays_at(config, 10), arrays_at(finished, 10), strict=True):
        np.testing.assert_array_equal(resumed, whole)


def _stop_and_resume(config, steps, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, config, steps)
        assert not run(config)
    assert open_run(Path(config.output)).step == steps
    assert run(config, resume=True)


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
    _stop_and_resume(config, 4, monkeypatch)
    assert numbers(config) == numbers(whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixture", "windows", "packed windows"])
def test_mixtures_and_windows_resume_to_the_bit(tmp_path, monkeypatch, kind):
    whole = project(tmp_path / "whole", data=dict(learn="all"), train=dict(steps=8, accumulation=8))
    other, many = (str(write_rows(tmp_path / f"{count}.jsonl", count)) for count in (9, 150))
    settings = {
        "mixture": dict(train={whole.data.train: 0.5, other: 2.0}),
        # 120 rows that are not held out are two windows of 60: 4 steps of 16 rows, or 2 of 16 packs.
        "windows": dict(train=many, cache=str(tmp_path / "cache"), window=100),
        "packed windows": dict(train=many, cache=str(tmp_path / "cache"), window=100, packing=True),
    }[kind]
    whole = dataclasses.replace(whole, data=dataclasses.replace(whole.data, **settings))
    assert run(whole)
    config = dataclasses.replace(whole, output=str(tmp_path / "run"))
    _stop_and_resume(config, 5, monkeypatch)
    assert numbers(config) == numbers(whole)
    for resumed, expected in zip(arrays_at(config, 8), arrays_at(whole, 8), strict=True):
        np.testing.assert_array_equal(resumed, expected)


def test_a_run_of_an_earlier_version_resumes_with_the_fingerprint_it_has(finished, monkeypatch):
    inputs = open_inputs(finished)
    base = inputs.source, inputs.model, weights_of(finished, inputs)
    earlier = load_model(*base, fingerprint="0" * 64).fingerprint

    def read(folder):
        state, digests = read_state(folder)
        assert not same_form(state["fingerprint"], earlier)
        return state | {"fingerprint": earlier}, digests

    monkeypatch.setattr("qlora_jax.io.run_folder.checkpoint.read_state", read)
    assert run(finished, resume=True)
    monkeypatch.setattr("qlora_jax.training.run.saved_fingerprint", lambda run: None)
    with pytest.raises(ValueError, match="the base model: fingerprint"):
        run(finished, resume=True)


def test_a_checkpoint_tells_the_order_of_windows_and_one_that_does_not_is_refused(tmp_path):
    many, position = str(write_rows(tmp_path / "many.jsonl", 150)), {"epoch": 3, "window": 1, "index": 0}
    windows = dict(train=many, cache=str(tmp_path / "cache"), window=100)
    session = session_of(project(tmp_path / "windows", data=windows))
    state = checkpoint_state(session, 1, position, BestEvaluation())
    assert state["window_order"] == window_order(session.config.train.seed, 3, 2).tolist()
    check_resumable(session, state)
    reversed_ = state | {"window_order": state["window_order"][::-1]}
    with pytest.raises(ValueError, match=r"windows of epoch 3: order \["):
        check_resumable(session, reversed_)
    del state["window_order"]
    with pytest.raises(ValueError, match="lacks window_order, because another version"):
        check_resumable(session, state)
    session = session_of(project(tmp_path / "one"))
    state = checkpoint_state(session, 1, position, BestEvaluation())
    del state["window_order"]  # there is but one order of one window
    check_resumable(session, state)


def test_a_run_resumes_on_other_devices_and_with_another_split_of_its_rows(tmp_path):
    session = session_of(project(tmp_path))
    state = checkpoint_state(session, 1, {"epoch": 0, "window": 0, "index": 1}, BestEvaluation())
    train, dataset = session.config.train, session.dataset
    rows = train.micro_batch_size * train.accumulation

    def with_split(micro_batch_size, accumulation):
        split = {"micro_batch_size": micro_batch_size, "accumulation": accumulation}
        config = dataclasses.replace(
            session.config,
            train=dataclasses.replace(train, **split),
            mesh=MeshArgs(data=2, fsdp=4),
            hosts=HostsArgs(launcher="off", heartbeat=5),
        )
        return dataclasses.replace(session, config=config, dataset=dataclasses.replace(dataset, **split))

    check_resumable(with_split(rows, 1), state)
    check_resumable(with_split(1, rows), state)
    earlier = dataset.fingerprint_of_split(train.accumulation, train.micro_batch_size)
    check_resumable(session, state | {"data_fingerprint": earlier})
    check_resumable(with_split(rows, 1), state | {"data_fingerprint": earlier})
    with pytest.raises(ValueError, match=r"train\.micro_batch_size: .* now\n.*data\.train: other rows"):
        check_resumable(with_split(rows, 2), state)


def test_mfu_is_of_the_rows_own_tokens_and_only_where_the_peak_is_known(tmp_path):
    session = session_of(project(tmp_path))
    batch, arrays = first_batch(session)
    assert batch.tokens == batch.lengths.sum() < arrays["inputs"].size
    records = Records()
    loop.train_step(session, loop.initial_state(session), batch, 0.0, records)
    known = dataclasses.replace(session.utilization, peak=1e9)
    again = dataclasses.replace(session_of(session.config), utilization=known)  # a step takes its session's parameters
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
def test_activations_that_wait_in_host_memory_change_no_bit(tmp_path):
    """XLA for CPUs drops the moves that JAX asks for, so a run on a CPU is refused."""
    session = session_of(project(tmp_path, layers=4))
    full, away = (_gradients_and_memory(session, remat) for remat in ("full", "offload"))
    for a, b in zip(full[0], away[0], strict=True):
        np.testing.assert_array_equal(a, b)
    assert away[1].host_temp_size_in_bytes == 0
    full, away = (_lowered_gradients(session, remat).as_text() for remat in ("full", "offload"))
    assert "memory_kind" in away and "memory_kind" not in full


def test_compilations_are_one_a_length_and_one_update(tmp_path):
    config = project(tmp_path)
    session = session_of(config)
    assert len(session.gradients) == 1  # for the longest batches, before the model was loaded
    for function in (update, evaluation_loss.plain):
        function.clear_cache()
    with Checkpoints(Path(config.output), config.train.keep) as checkpoints:
        loop.run_steps(session, loop.initial_state(session), checkpoints, Records(), lambda: False)
    assert len(session.dataset.buckets) == 2
    assert len(session.gradients) == len(session.dataset.buckets)
    assert update._cache_size() == 1
    assert evaluation_loss.plain._cache_size() <= len(session.dataset.eval_buckets)


def test_a_loss_that_is_not_finite_stops_and_names_the_rows(tmp_path):
    session = session_of(project(tmp_path))
    broken = jax.tree.map(lambda leaf: leaf + jnp.nan, session.parts.lora)
    progress = dataclasses.replace(loop.initial_state(session), lora=broken)
    batch, _ = first_batch(session)
    with pytest.raises(
        loop.NonFiniteLoss, match=r"step 1: .*rows\.jsonl:\d+.*No checkpoint was saved before this step"
    ):
        run_quietly(session, progress, batch)


def test_a_checkpoint_is_read_by_orbax_alone_without_warnings(finished):
    folder = Path(finished.output).absolute() / "checkpoints" / "10"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora = ocp.StandardCheckpointer().restore(folder / "lora")
    assert lora["model.layers.self_attn.q_proj"]["lora_a"].shape == (2, 64, 4)
    assert open_run(Path(finished.output)).step == 10


def first_losses_before_and_after(finished, tmp_path):
    """The first loss of a run, and of another that starts from its exported adapter."""
    export_peft(open_finetuned(finished.output), tmp_path / "peft")
    config = dataclasses.replace(
        finished,
        lora=dataclasses.replace(
            adapter_for_export(open_run(Path(finished.output)), False).args, start=str(tmp_path / "peft")
        ),
        train=dataclasses.replace(finished.train, steps=1),
        output=str(tmp_path / "more"),
    )
    run(config)
    return [next(r["loss"] for r in numbers(c) if "loss" in r) for c in (finished, config)]


def test_training_goes_on_from_an_adapter(finished, tmp_path):
    """The first loss is what the exported adapter gives, not what a fresh one would."""
    fresh, more = first_losses_before_and_after(finished, tmp_path)
    assert more < 0.9 * fresh


def test_resuming_otherwise_is_refused_with_each_difference(finished, tmp_path):
    other_model = write_model(tmp_path / "model", seed=1)
    changed = dataclasses.replace(
        finished,
        lora=dataclasses.replace(finished.lora, alpha=8.0),
        model=dataclasses.replace(finished.model, path=str(other_model)),
    )
    with pytest.raises(ValueError) as caught:
        run(changed, resume=True)
    assert "lora.alpha: 32.0 in the checkpoint, 8.0 now" in str(caught.value) and "the base model" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: state.pop("best"), r"checkpoint of step 10 lacks best, because another version .* lora\.start"),
        (
            lambda state: state["config"].update(colour=1),
            r"run: the settings in the checkpoint of step 10 .* version of qlora_jax:\n  colour: unknown setting",
        ),
    ],
)
def test_a_checkpoint_of_another_version_is_an_error(finished, monkeypatch, change, problem):
    def read(folder):
        state, digests = read_state(folder)
        change(state)
        return state, digests

    monkeypatch.setattr("qlora_jax.io.run_folder.checkpoint.read_state", read)
    with pytest.raises(ValueError, match=problem):
        run(finished, resume=True)


def test_a_run_that_goes_on_tells_where_and_not_again_what_its_start_told(finished):
    console = quiet()
    assert train(finished, Path(finished.output), resume=True, oversized=False, console=console)
    told = console.file.getvalue()
    assert "resuming after step 10 of 10" in told and "lowest held-out loss  " in told and "memory  " in told
    assert not [words for words in ("data:", "breakdown", "trained", "optimizer") if words in told]


def test_an_output_folder_in_use_is_refused(finished, tmp_path):
    with pytest.raises(ValueError, match=r"contains a run.*--resume"):
        take(Path(finished.output), resume=False)
    with pytest.raises(ValueError, match="has no checkpoint to resume"):
        take(tmp_path, resume=True)
    (tmp_path / "run.lock").write_text("process 1 on laptop, which was killed before its first checkpoint")
    take(tmp_path, resume=False)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="is not a run folder"):
        take(tmp_path, resume=False)
    with pytest.raises(ValueError, match=r"thesis\.tex is a file"):
        take(tmp_path / "thesis.tex" / "run", resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_is_read_while_it_trains(finished):
    with lock_output(Path(finished.output), resume=True, warn=pytest.fail):
        assert open_run(Path(finished.output)).step == 10
        assert open_finetuned(finished.output).run is not None


def take(folder, resume):
    """Locks an output folder and releases it again."""
    with lock_output(folder, resume=resume, warn=pytest.fail):
        pass


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path):
    """A run, a resumed run, a dry run; the second process has not touched anything."""
    config = project(tmp_path)
    folder = Path(config.output)
    with lock_output(folder, resume=False, warn=pytest.fail):
        (folder / "metrics.jsonl").write_text("")
        (folder / "config.yaml").write_text("")
        expected = rf"another process writes in this folder \(process {os.getpid()} on {socket.gethostname()}, since 20"
        for start in (
            lambda: run(config),
            lambda: run(config, resume=True),
            lambda: dry_run(config, folder, resume=False, oversized=False, console=quiet()),
        ):
            with pytest.raises(ValueError, match=expected):
                start()
        assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "metrics.jsonl", "run.lock"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_without_a_checkpoint_is_told_so_with_and_without_resume(tmp_path, resume):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"before its first checkpoint.*Delete the folder.*without --resume"):
        take(tmp_path, resume=resume)
