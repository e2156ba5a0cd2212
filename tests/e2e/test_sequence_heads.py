"""Runs of a tiny model with a sequence head: labels from the data, resuming, evaluation, and refusals."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from qlora_jax.api.evaluate import evaluate_side_by_side
from qlora_jax.config import Config, DataArgs
from qlora_jax.evaluation.settings import EvaluateArgs
from qlora_jax.io.checkpoint import open_run
from qlora_jax.io.head_file import TrainedHead
from qlora_jax.training.run import train
from tests.e2e.project import project, stop_after

WORDS = ["sun", "moon", "star"]


def rows_of(objective: str, count: int) -> list[dict[str, Any]]:
    """Learnable rows: the label, the better answer or the positive follows from a word of the text."""
    rows: list[dict[str, Any]] = []
    for index in range(count):
        word, other = WORDS[index % 3], WORDS[(index + 1) % 3]
        text = f"{index * 7 % 10} the {word}"
        found = {
            "classification": {"text": text, "label": word},
            "multi_label": {"text": text, "label": [word, "sky"] if index % 2 else [word]},
            "regression": {"text": text, "label": index % 3 - 1},
            "reward": {"prompt": f"{index} say sun", "chosen": f"{word} sun", "rejected": f"{other} moon {index % 4}"},
            "embedding": {"anchor": text, "positive": f"{word} {index % 5}"},
        }
        rows.append(found[objective])
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(folder: Path, objective: str, packing: bool = False, **changes: Any) -> Config:
    config = project(folder, optim=dict(learning_rate=2e-2), train=dict(eval_every=0, **changes))
    data = DataArgs(train=str(write(folder / "train.jsonl", rows_of(objective, 30))), max_length=64, packing=packing)
    return dataclasses.replace(config, data=data, objective=objective)


def run(config: Config, resume: bool = False) -> None:
    train(config, Path(config.output), resume=resume, oversized=False, console=Console(file=io.StringIO()))


def losses(config: Config) -> list[float]:
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for line in lines if "loss" in (record := json.loads(line))]


@pytest.mark.slow
def test_a_classifier_learns_resumes_to_the_bit_and_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path / "whole", "classification", steps=24)
    run(config)
    found = losses(config)
    assert np.mean(found[-4:]) < 0.5 * np.mean(found[:4])
    assert open_run(Path(config.output)).head == TrainedHead(objective="classification", labels=("moon", "star", "sun"))
    file = write(tmp_path / "test.jsonl", rows_of("classification", 60)[30:])
    result = evaluate_side_by_side(EvaluateArgs(run=config.output, labels=str(file)))
    assert list(result.labels) == ["checkpoint"]
    metrics = result.tasks["labels"].metrics["checkpoint"]
    assert metrics["right label"].value > 0.9
    details = result.tasks["labels"].details["checkpoint"]
    assert isinstance(details, dict) and details["labels"] == ["moon", "star", "sun"]
    assert np.sum(np.array(details["confusion"])) == 30

    cut = settings(tmp_path / "cut", "classification", steps=24)
    with monkeypatch.context() as patch:
        stop_after(patch, cut, 7)
        run(cut)
    run(cut, resume=True)
    assert losses(cut) == found
    again = open_run(Path(cut.output)).lora
    jax.tree.map(np.testing.assert_array_equal, again, open_run(Path(config.output)).lora)
