"""Kinds of damaged run folders: checkpoints, their state, metrics and samples, heads, and cached scores."""

import dataclasses
import functools
import io
import random
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from qlora_jax.config import Config, read_config
from qlora_jax.inference.result_cache import ResultCache
from qlora_jax.io.head_file import HEAD_FILE, read_run_head, write_head
from qlora_jax.io.initial_file import FILE as INITIAL_FILE
from qlora_jax.io.initial_file import read_initial
from qlora_jax.io.run_folder.checkpoint import CHECKPOINT_FOLDER, CONFIG_FILE, Checkpoints, open_run
from qlora_jax.io.run_folder.checkpoint_reader import read_state
from qlora_jax.line_digests import LinesDigest
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.training.metrics.metrics_file import METRICS_FILE, SAMPLES_FILE, MetricsFile, Record, read_metrics
from qlora_jax.training.metrics.record_summaries import before_and_after, question_summary, training_summary
from qlora_jax.training.plan.run_plan import compile_run
from qlora_jax.training.report.curves import charts
from qlora_jax.training.resume import RECORDS, restore
from qlora_jax.training.run import train
from qlora_jax.training.run_spec import open_inputs
from qlora_jax.training.session import Session, prepare
from scripts.campaign.data_files import damage_any
from scripts.campaign.file_kind import Damage, FileKind
from scripts.campaign.mutations import damage_lines
from tests.e2e.project import project

RUN, SCORES, STEPS = "run", "scores", 3
STATE = "state"  # the part of a checkpoint that is JSON


def write_run_folder(folder: Path) -> None:
    """Trains for a few steps, with an initial adapter, evaluations and samples; one checkpoint stays."""
    prompts = folder / "prompts.txt"
    prompts.write_text("say sun\nsay moon\n")
    config = project(
        folder,
        lora=dict(init="pissa", svd_niter=2, dropout=0.0),
        train=dict(
            steps=STEPS, keep=1, save_every=0, eval_every=1, accumulation=1, samples=str(prompts), sample_tokens=4
        ),
    )
    assert train(config, folder / RUN, resume=False, oversized=False, console=Console(file=io.StringIO()))


def _damage_checkpoint(chance: random.Random, folder: Path) -> str:
    """Damages a file of the arrays, and now and then a second one."""
    files = [path for path in _files(folder / RUN / CHECKPOINT_FOLDER) if STATE not in path.parts]
    return "; ".join(damage_any(chance, path) for path in chance.sample(files, chance.choice((1, 1, 1, 2))))


def _damage_state(chance: random.Random, folder: Path) -> str:
    """Damages the state of the checkpoint, the run's configuration or its initial adapter."""
    states = [path for path in _files(folder / RUN / CHECKPOINT_FOLDER) if STATE in path.parts]
    return damage_any(chance, chance.choice([*states, folder / RUN / CONFIG_FILE, folder / RUN / INITIAL_FILE]))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@functools.cache
def _session(folder: Path) -> Session:
    """Builds the session of a resumed run; the first call meets the sound copy."""
    config = _moved(read_config(folder / RUN / CONFIG_FILE), folder)
    inputs = open_inputs(config)
    initial = read_initial(folder / RUN, config.lora)
    return prepare(compile_run(config, inputs), lambda *_: None, initial)


def _moved(config: Config, folder: Path) -> Config:
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=str(folder / "model")),
        data=dataclasses.replace(config.data, train=str(folder / "rows.jsonl")),
        train=dataclasses.replace(config.train, samples=str(folder / "prompts.txt")),
        output=str(folder / RUN),
    )


def _read_run(folder: Path) -> list[object]:
    """Restores the run as `generate` and as `train --resume` do."""
    session, run = _session(folder), open_run(folder / RUN)
    with Checkpoints(folder / RUN, keep=1) as checkpoints:
        state = restore(session, checkpoints)
    initial = read_initial(folder / RUN, session.run.config.lora)
    arrays = jax.tree.leaves((run.lora, state.lora, state.optimizer_state, initial and initial.factors))
    named = [run.lora_args, run.step, run.fingerprint, state.step, state.position, state.best]
    return [*named, *map(np.asarray, arrays)]


def _write_records(folder: Path) -> None:
    """Writes a run that was killed after its checkpoint and more records."""
    write_run_folder(folder)
    for path, saved in _saved_records(folder):
        last = read_metrics(path)[-1]
        with MetricsFile(path, STEPS, saved=saved) as file:
            file.write(last | {"step": STEPS + 1})


def _saved_records(folder: Path) -> list[tuple[Path, LinesDigest]]:
    state, _ = read_state(folder / RUN / CHECKPOINT_FOLDER / str(STEPS))
    return [(folder / RUN / name, state[RECORDS][name]) for name in (METRICS_FILE, SAMPLES_FILE)]


def _records_damage(damage: Damage) -> Damage:
    return lambda chance, folder: damage(chance, folder / RUN / chance.choice((METRICS_FILE, SAMPLES_FILE)))


def _read_records(folder: Path) -> list[object]:
    """Reads the records as resumed runs and reports do."""
    found: list[list[Record]] = []
    for path, saved in _saved_records(folder):
        with MetricsFile(path, STEPS, saved=saved):
            found.append(read_metrics(path) if path.exists() else [])
    metrics, samples = found
    summaries = [training_summary(metrics), question_summary(metrics), charts(metrics, 0), before_and_after(samples)]
    return [*found, *map(repr, summaries)]


def _write_head(folder: Path) -> None:
    write_head(folder, TrainedHead(objective="classification", labels=("moon", "star", "sun"), pooling="mean"))


def _read_head(folder: Path) -> list[object]:
    """Reads a head as commands do that use a run."""
    return [repr(read_run_head(folder, "classification"))]


def _write_scores(folder: Path) -> None:
    (folder / SCORES).mkdir()
    _read_scores(folder)


def _damage_scores(chance: random.Random, folder: Path) -> str:
    return damage_any(chance, chance.choice(_files(folder / SCORES)))


def _read_scores(folder: Path) -> list[object]:
    cache = ResultCache(folder / SCORES, "model")
    scores = [np.linspace(-9, 0, 200, dtype=np.float32), np.arange(200) % 3 == 0]
    return [array for number in range(3) for array in cache.get_or_compute([number], lambda: scores)]


RUN_KINDS: Mapping[str, FileKind] = {
    "checkpoint": FileKind(
        write=write_run_folder, shared="run", damage=_damage_checkpoint, read=_read_run, digested=True
    ),
    "state": FileKind(write=write_run_folder, shared="run", damage=_damage_state, read=_read_run, digested=True),
    "metrics": FileKind(
        write=_write_records, shared="killed", damage=_records_damage(damage_any), read=_read_records, digested=True
    ),
    "metrics_lines": FileKind(
        write=_write_records, shared="killed", damage=_records_damage(damage_lines), read=_read_records, digested=True
    ),
    "head": FileKind(
        write=_write_head, damage=lambda c, f: damage_any(c, f / HEAD_FILE), read=_read_head, digested=True
    ),
    "scores": FileKind(write=_write_scores, damage=_damage_scores, read=_read_scores, digested=True),
}
