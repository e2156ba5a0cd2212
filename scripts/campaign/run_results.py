"""Runs of a tiny model for campaigns, and the digest of all that a run must give: arrays, state, records, samples."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from qlora_jax.config import Config, write_config
from qlora_jax.inference.result_cache import digest
from qlora_jax.io.checkpoint import CHECKPOINT_FOLDER, saved_steps
from qlora_jax.training.checkpoint_state import RESUME_KEYS
from qlora_jax.training.run import METRICS_FILE, SAMPLES_FILE
from scripts.campaign.isolation import FORK
from tests.e2e.project import project
from tests.e2e.run_records import comparable_records

STEPS = 8
DIGEST, CONFIG, CACHE, MODEL, ROWS = "digest.txt", "config.yaml", "cache", "model", "rows.jsonl"
PLACES = ("config", "versions")  # of a checkpoint's state: they name paths, and libraries


def tiny_run(folder: Path, output: Path, changes: Mapping[str, Mapping[str, Any]]) -> Config:
    """Writes a model, rows and prompts into `folder` unless they are there; returns the settings of a run."""
    train = dict(steps=STEPS, micro_batch_size=2, accumulation=1, save_every=1, eval_every=0)
    data = dict(eval_fraction=0.0)
    sections = {name: dict(values) for name, values in changes.items()}
    sections["train"], sections["data"] = train | sections.get("train", {}), data | sections.get("data", {})
    config = project(folder, base=None, layers=2, **sections)
    (folder / "prompts.txt").write_text("say sun\nsay moon\n")
    return dataclasses.replace(config, output=str(output))


def moved(config: Config, folder: Path, output: Path) -> Config:
    """Returns the settings with the files that `tiny_run` wrote into another folder."""
    samples = None if config.train.samples is None else str(folder / "prompts.txt")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=str(folder / MODEL)),
        data=dataclasses.replace(config.data, train=str(folder / ROWS)),
        train=dataclasses.replace(config.train, samples=samples),
        output=str(output),
    )


def write_settings(config: Config, path: Path) -> list[str]:
    """Writes the settings of a run; returns the words of the command that trains it."""
    write_config(config, path)
    return ["train", "--config", str(path)]


def run_digest(run: Path, *, records: bool = True) -> str:
    """Returns a digest of a run's newest checkpoint and of its records and samples, without times and places.

    A forked process computes it, because orbax starts a jax backend.
    """
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: sender.send(_run_digest(run, records)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return "unreadable"
    finally:
        process.join()


def _run_digest(run: Path, records: bool) -> str:
    step = saved_steps(run)[-1]
    folder = (run / CHECKPOINT_FOLDER / str(step)).absolute()
    checkpointer = ocp.StandardCheckpointer()
    arrays = jax.tree.leaves([checkpointer.restore(folder / item) for item in ("lora", "optimizer")])
    state = json.loads((folder / "state" / "metadata").read_text())
    kept = {key: state[key] for key in RESUME_KEYS if key not in PLACES}
    files = [run / name for name in (METRICS_FILE, SAMPLES_FILE) if records and (run / name).exists()]
    return digest([step, sorted(kept.items()), *map(comparable_records, files), *map(np.asarray, arrays)])
