"""Stopping and resuming a run change nothing, and a run that cannot be resumed is refused."""

import dataclasses
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.config import HostsArgs, MeshArgs
from qlora_jax.data.batching.batches import window_order
from qlora_jax.io.loading.base_fingerprint import same_form
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.run_folder.checkpoint_reader import read_state
from qlora_jax.training.early_stopping import BestEvaluation
from qlora_jax.training.resume import check_resumable, checkpoint_state
from qlora_jax.training.run import dry_run, train
from qlora_jax.training.run_spec import open_inputs, weights_of
from tests.e2e.project import project, write_model, write_rows
from tests.e2e.tiny_runs import arrays_at, numbers, quiet, run, session_of, stop_and_resume
from tests.marks import first_always


@pytest.mark.parametrize("steps", first_always([5, 1, 6]))
def test_a_resumed_run_equals_an_uninterrupted_one(finished, tmp_path, steps, monkeypatch):
    """Also if the signal cuts off an evaluation, as it does after step 5."""
    config = dataclasses.replace(finished, output=str(tmp_path / "run"))
    stop_and_resume(config, steps, monkeypatch)
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


def test_lost_records_are_a_warning_and_the_run_continues(finished, tmp_path, monkeypatch):
    config = dataclasses.replace(finished, output=str(tmp_path / "run"))
    folder = Path(shutil.copytree(finished.output, config.output))
    shutil.rmtree(folder / "checkpoints/10")
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    place = next(place for place, line in enumerate(lines) if line.startswith('{"step": 3, "loss"'))
    metrics.write_text("".join(lines[:place] + lines[place + 1 :]))
    with pytest.warns(UserWarning, match=rf"^{metrics}: not the .* step 9 .*Lost: 1 \(steps without a record: 3\)"):
        assert run(config, resume=True)
    whole = numbers(finished)
    assert numbers(config) == whole[:place] + whole[place + 1 :]
    for resumed, array in zip(arrays_at(config, 10), arrays_at(finished, 10), strict=True):
        np.testing.assert_array_equal(resumed, array)
    metrics.unlink()

    def read(folder):
        state, digests = read_state(folder)
        assert state.pop("records")["metrics.jsonl"]["lines"] == len(whole) - 1
        return state, digests

    monkeypatch.setattr("qlora_jax.io.run_folder.checkpoint.read_state", read)  # a checkpoint of an earlier version
    with warnings.catch_warnings(action="error"):
        assert run(config, resume=True)


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
    stop_and_resume(config, 5, monkeypatch)
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
    with pytest.raises(ValueError, match=r"the base model: fingerprint .* an earlier version of qlora_jax"):
        run(finished, resume=True)


def test_a_checkpoint_tells_the_order_of_windows_and_one_that_does_not_is_refused(tmp_path):
    many, position = str(write_rows(tmp_path / "many.jsonl", 150)), {"epoch": 3, "window": 1, "index": 0}
    windows = dict(train=many, cache=str(tmp_path / "cache"), window=100)
    session = session_of(project(tmp_path / "windows", data=windows))
    state = checkpoint_state(session, 1, position, BestEvaluation())
    assert state["window_order"] == window_order(session.run.config.train.seed, 3, 2).tolist()
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
    train, dataset = session.run.config.train, session.run.inputs.dataset
    rows = train.micro_batch_size * train.accumulation

    def with_split(micro_batch_size, accumulation):
        split = {"micro_batch_size": micro_batch_size, "accumulation": accumulation}
        config = dataclasses.replace(
            session.run.config,
            train=dataclasses.replace(train, **split),
            mesh=MeshArgs(data=2, fsdp=4),
            hosts=HostsArgs(launcher="off", heartbeat=5),
        )
        inputs = dataclasses.replace(session.run.inputs, dataset=dataclasses.replace(dataset, **split))
        return dataclasses.replace(session, run=dataclasses.replace(session.run, config=config, inputs=inputs))

    check_resumable(with_split(rows, 1), state)
    check_resumable(with_split(1, rows), state)
    earlier = dataset.fingerprint_of_split(train.accumulation, train.micro_batch_size)
    check_resumable(session, state | {"data_fingerprint": earlier})
    check_resumable(with_split(rows, 1), state | {"data_fingerprint": earlier})
    with pytest.raises(ValueError, match=r"train\.micro_batch_size: .* now\n.*data\.train: other rows"):
        check_resumable(with_split(rows, 2), state)


def test_resuming_otherwise_is_refused_with_each_difference(finished, tmp_path, monkeypatch):
    other_model = write_model(tmp_path / "model", seed=1)
    changed = dataclasses.replace(finished, model=dataclasses.replace(finished.model, path=str(other_model)))
    with pytest.raises(ValueError, match=r"these differ:\n  the base model: fingerprint"):
        run(changed, resume=True)
    lora, optim = dataclasses.replace(finished.lora, alpha=8.0), dataclasses.replace(finished.optim, beta2=0.5)
    changed = dataclasses.replace(changed, lora=lora, optim=optim)
    monkeypatch.setattr("qlora_jax.training.run_spec.open_model", lambda *args: pytest.fail("the model was opened"))
    for start in (train, dry_run):
        with pytest.raises(ValueError) as caught:
            start(changed, Path(changed.output), resume=True, oversized=False, console=quiet())
        assert "lora.alpha: 32.0 in the checkpoint, 8.0 now\n  optim.beta2: " in str(caught.value)
    assert str(caught.value).endswith("or start a new run from the exported adapter (export, lora.start).")


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
    assert train(finished, Path(finished.output), resume=True, oversized=False, console=console).finished
    told = console.file.getvalue()
    assert "resuming after step 10 of 10" in told and "lowest held-out loss  " in told and "memory  " in told
    assert not [words for words in ("data:", "breakdown", "trained", "optimizer") if words in told]
