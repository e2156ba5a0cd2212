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

import qlora_jax as q
from qlora_jax.config import Config, DataArgs
from qlora_jax.io.run_folder.checkpoint import open_run
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.training.run import train
from tests.e2e.project import project, stop_after, write_model
from tests.marks import EXHAUSTIVE

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


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for line in lines if "loss" in (record := json.loads(line))]


@pytest.mark.slow
def test_a_classifier_learns_continues_in_memory_and_is_evaluated(tmp_path: Path) -> None:
    train_rows = write(tmp_path / "train.jsonl", rows_of("classification", 30))
    file = write(tmp_path / "test.jsonl", rows_of("classification", 60)[30:])
    base, tokenizer = q.load(str(write_model(tmp_path / "model", initializer_range=0.05)), compute_dtype="float32")
    args = {"objective": "classification", "optim.schedule": "cosine"}
    sizes = {"steps": 24, "micro_batch_size": 2, "accumulation": 2, "max_length": 64, "learning_rate": 2e-2}
    settings = {"config": args, "save_every": 24, **sizes}
    first = q.finetune(q.add_adapter(base, q.LoRA(rank=4)), tokenizer, train_rows, output=tmp_path / "a", **settings)
    found = losses(tmp_path / "a")
    assert np.mean(found[-4:]) < 0.5 * np.mean(found[:4])
    head = open_run(tmp_path / "a").head
    assert head is not None and head.text_columns == (("text",),)
    page = (tmp_path / "a" / "report.html").read_text()
    assert "as the head reads them" in page and "counts in the loss" not in page
    assert head == TrainedHead(objective="classification", labels=("moon", "star", "sun"))
    again = q.finetune(
        first.model, tokenizer, train_rows, output=tmp_path / "b", **settings | {"steps": 4, "learning_rate": 1e-4}
    )
    assert np.mean(losses(tmp_path / "b")) < 0.5 * np.mean(found[:4])
    other = {**settings, "config": args | {"head.labels": ["sun", "star", "moon"]}}
    with pytest.raises(
        ValueError, match=r"(?s)found .*\['moon', 'star', 'sun'\]; expected .*\['sun', 'star', 'moon'\]"
    ):
        q.finetune(first.model, tokenizer, train_rows, output=tmp_path / "c", **other)
    task = q.evaluate_model(again.model, tokenizer, labels=file).tasks["labels"]
    assert task.metrics["model"]["right label"].value > 0.9
    details = task.details["model"]
    assert isinstance(details, dict) and details["labels"] == ["moon", "star", "sun"]
    assert np.sum(np.array(details["confusion"])) == 30


@pytest.mark.parametrize("objective", [pytest.param("classification", marks=EXHAUSTIVE)])
def test_a_run_resumes_to_the_bit_and_refuses_other_labels(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path / "whole", objective, steps=24)
    run(config)
    cut = settings(tmp_path / "cut", objective, steps=24)
    with monkeypatch.context() as patch:
        stop_after(patch, cut, 7)
        run(cut)
    path = tmp_path / "cut" / "train.jsonl"
    rows = path.read_text()
    path.write_text(rows.replace('"label": "star"', '"label": "planet"'))
    with pytest.raises(ValueError, match=r"head.json: .*'moon', 'star', 'sun'.*'moon', 'planet', 'sun'"):
        run(cut, resume=True)
    path.write_text(rows)
    run(cut, resume=True)
    assert losses(Path(cut.output)) == losses(Path(config.output))
    again = open_run(Path(cut.output)).lora
    jax.tree.map(np.testing.assert_array_equal, again, open_run(Path(config.output)).lora)
