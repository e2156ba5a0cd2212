"""8-bit optimizer state trains like 32-bit state: whole runs that differ in nothing else, over three seeds."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from qlora_jax.training.metrics.metrics_file import read_metrics
from qlora_jax.training.run import train
from tests.e2e.project import project

SEEDS, STEPS = (0, 1, 2), 60


def late_log_loss(config, name: str, seed: int, folder: Path) -> float:
    """The mean of log(loss) over the last third of a run's steps."""
    config = dataclasses.replace(
        config,
        output=str(folder),
        optim=dataclasses.replace(config.optim, name=name),
        train=dataclasses.replace(config.train, seed=seed),
    )
    assert train(config, folder, resume=False, oversized=False, console=Console(file=io.StringIO())).finished
    losses = [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]
    assert len(losses) == STEPS and losses[-1] < 0.5 * losses[0]
    return float(np.mean(np.log(losses[-STEPS // 3 :])))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_curves_agree_within_the_noise_of_seeds(tmp_path):
    config = project(
        tmp_path / "project",
        lora=dict(rank=64, dropout=0.0),
        optim=dict(learning_rate=2e-3, schedule="constant"),
        train=dict(steps=STEPS, eval_every=0, save_every=0),
    )
    late = {
        name: np.array([late_log_loss(config, name, seed, tmp_path / f"{name}-{seed}") for seed in SEEDS])
        for name in ("adamw_32bit", "adamw_8bit")
    }
    difference = np.mean(late["adamw_8bit"] - late["adamw_32bit"])
    noise = np.std(late["adamw_32bit"], ddof=1)
    print(f"{late} difference {difference:.4f} noise {noise:.4f}")
    assert abs(difference) < noise
