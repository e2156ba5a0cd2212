"""Runs a tiny project, and reads what the runs wrote."""

import dataclasses
import io
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from rich.console import Console

from qlora_jax.io.export.original_base import adapter_for_export
from qlora_jax.io.export.peft import export_peft
from qlora_jax.io.pretrained import open_finetuned
from qlora_jax.io.run_folder.checkpoint import open_run
from qlora_jax.training import loop
from qlora_jax.training.plan.run_plan import compile_run
from qlora_jax.training.run import train
from qlora_jax.training.run_spec import open_inputs
from qlora_jax.training.session import prepare
from tests.e2e.project import stop_after
from tests.e2e.run_records import comparable_records


def quiet() -> Console:
    return Console(file=io.StringIO())


def session_of(config):
    inputs = open_inputs(config)
    return prepare(compile_run(config, inputs), lambda *_: None)


def run(config, resume=False):
    return train(config, Path(config.output), resume=resume, oversized=False, console=quiet()).finished


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
    batch = next(session.run.inputs.dataset.train_batches())
    return batch, batch.arrays()


class Records(list):
    """A reporter that remembers."""

    def step(self, record):
        self.append(record)

    evaluation = step
    samples = list.extend

    def evaluation_progress(self, words):
        pass

    def flush(self):
        return {}


def run_quietly(session, progress, batch):
    return loop.train_step(session, progress, batch, 0.0, Records())


def stop_and_resume(config, steps, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, config, steps)
        assert not run(config)
    assert open_run(Path(config.output)).step == steps
    assert run(config, resume=True)


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
