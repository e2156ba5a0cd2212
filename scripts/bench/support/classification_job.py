"""Prepares classification with two GLUE tasks: the same rows, steps and initial values for both libraries.

A job is a JSON file next to arrays. Our worker reads packed batches, the opponent the ids and labels of the same rows.
"""

import csv
import dataclasses
import gzip
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from qlora_jax.api.data import prepare_data
from qlora_jax.config import LoraArgs, ModelArgs, OptimArgs
from qlora_jax.data.batching.packing import PRESENT, Batch
from qlora_jax.data.dataset import Dataset
from qlora_jax.data.readers.files import Place, Row
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from qlora_jax.evaluation.heads.rows import encode_head_rows
from qlora_jax.evaluation.task import TaskContext
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.io.peft.head_adapters import split_head, with_head
from qlora_jax.io.peft.writer import in_peft_format
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelParts, combine, partition
from qlora_jax.models.precision import weight_format
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.objectives.objective import LABELS
from qlora_jax.optim.schedule import make_schedule
from scripts.bench.support.environment import ROOT

LABEL_NAMES = ("0", "1")
HEAD = TrainedHead(objective="classification", labels=LABEL_NAMES)
LORA = LoraArgs(rank=16, alpha=32.0)
Rows = list[dict[str, str]]


def _sst2_rows(text: str) -> Rows:
    return [*csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)]


def _mrpc_rows(text: str) -> Rows:
    names = {"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label"}
    rows = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [{ours: row[theirs] for theirs, ours in names.items()} for row in rows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A classification task of two labels.

    Attributes:
      train, held_out: names of its files.
      read: returns the rows of a file's text.
      max_length: positions of a pack, which is one step.
      train_rows, held_out_rows: rows to train on, drawn by the seed; and the first rows of the held-out file.
      seeds: runs.
    """

    train: str
    held_out: str
    read: Callable[[str], Rows]
    max_length: int
    train_rows: int
    held_out_rows: int
    seeds: int


TASKS = {
    "sst2": Task(
        train="sst2_train.tsv.gz",
        held_out="sst2_dev.tsv.gz",
        read=_sst2_rows,
        max_length=256,
        train_rows=512,
        held_out_rows=600,
        seeds=2,
    ),
    "mrpc": Task(
        train="mrpc_train.txt.gz",
        held_out="mrpc_test.txt.gz",
        read=_mrpc_rows,
        max_length=512,
        train_rows=256,
        held_out_rows=400,
        seeds=1,
    ),
}


def read_split(name: str, read: Callable[[str], Rows]) -> Rows:
    """Returns the rows of a file of GLUE.

    Raises:
      OSError: the file is absent.
    """
    folder = Path(os.environ.get("QLORA_JAX_LOCAL_DATA", ROOT.parent / "shared/data/local_only"))
    path = folder / name
    if not path.exists():
        raise OSError(f"{path}: not found. Set QLORA_JAX_LOCAL_DATA to the folder that holds GLUE's {name}")
    with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as file:
        return read(file.read())


def write_job(
    folder: Path, model: str, train: Rows, held_out: Rows, *, max_length: int, seeds: Sequence[int], **limits: int
) -> Path:
    """Writes a job into a folder, and returns its file.

    Args:
      limits: `train_rows`, the rows that each seed draws; and `steps`, the most steps of a run.
    """
    source = open_model(model)
    config, tokenizer = model_config(source.config), load_tokenizer(source.tokenizer)
    datasets = {seed: _dataset(train, tokenizer, max_length, seed, limits["train_rows"]) for seed in seeds}
    steps = min(limits["steps"], *(dataset.steps_per_epoch for dataset in datasets.values()))
    optim = OptimArgs(learning_rate=5e-4, schedule="linear", warmup_ratio=0.1, warmup_start="first", max_grad_norm=1.0)
    runs = [_write_run(folder, seed, dataset, steps) for seed, dataset in datasets.items()]
    _write_initial_values(folder, model, seeds)
    job = {
        "model": model,
        "optim": dataclasses.asdict(optim),
        "rank": LORA.rank,
        "alpha": LORA.alpha,
        "rates": np.asarray(make_schedule(optim, steps)(np.arange(steps))).tolist(),
        "labels": [*LABEL_NAMES],
        "pad": tokenizer.eos_id,
        "runs": runs,
        "held_out": _held_out_ids(held_out, tokenizer, config),
        "right": [LABEL_NAMES.index(row["label"]) for row in held_out],
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    return path


def _dataset(rows: Rows, tokenizer: Tokenizer, max_length: int, seed: int, count: int) -> Dataset:
    drawn = random.Random(seed).sample(rows, min(count, len(rows)))
    return prepare_data(
        drawn,
        tokenizer,
        max_length=max_length,
        micro_batch_size=1,
        accumulation=1,
        packing=True,
        seed=seed,
        config={"objective": "classification", "head.labels": [*LABEL_NAMES]},
    )


def _write_run(folder: Path, seed: int, dataset: Dataset, steps: int) -> dict[str, object]:
    """Writes the batches of a run, and returns its description, with the texts of each step."""
    batches = [batch for batch, _ in zip(dataset.train_batches(), range(steps), strict=False)]
    arrays = [batch.arrays() for batch in batches]
    slots = max(each[PRESENT].shape[-1] for each in arrays)
    assert all(each[PRESENT].shape[-1] == slots for each in arrays), "all packs have the same number of slots"
    save_file(
        {name: np.stack([each[name] for each in arrays]) for name in arrays[0]}, folder / f"batches-{seed}.safetensors"
    )
    return {
        "seed": seed,
        "batches": str(folder / f"batches-{seed}.safetensors"),
        "initial": str(folder / f"initial-{seed}.safetensors"),
        "steps": [_texts_of(batch) for batch in batches],
    }


def _texts_of(batch: Batch) -> list[tuple[list[int], int]]:
    """Returns the ids and the label of each text of a pack."""
    assert batch.sequences is not None
    present, labels = batch.slots[PRESENT][0, 0], batch.slots[LABELS][0, 0]
    return [
        (batch.inputs[0, 0][batch.sequences[0, 0] == slot].tolist(), int(labels[slot]))
        for slot in np.flatnonzero(present).tolist()
    ]


def _held_out_ids(rows: Rows, tokenizer: Tokenizer, config: ModelConfig) -> list[list[int]]:
    context = TaskContext(tokenizer=tokenizer, max_positions=config.max_positions, stop_ids=frozenset(), head=HEAD)
    named = [Row(Place(number + 1, number), dict(row)) for number, row in enumerate(rows)]
    return [ids.tolist() for ids in encode_head_rows("held-out rows", named, None, context).texts]


def load_base(model: str, compute_dtype: str = "auto") -> tuple[ModelConfig, ModelParts]:
    """Returns a model's features and its parts, in NF4 with double quantization."""
    source = open_model(model)
    config = model_config(source.config)
    args = ModelArgs(path=model, compute_dtype=compute_dtype)  # pyright: ignore[reportArgumentType]
    return config, partition(load_model(source, config, weight_format(args, config)).model)


def with_new_head(base: ModelParts, seed: int) -> ModelParts:
    """Returns the parts with a new adapter on all linear layers and a new head."""
    model, key = combine(base), jax.random.key(seed)
    attach_method(model, LORA, key)
    model.add_sequence_head(HEAD.spec(), key)
    return partition(model)


def _write_initial_values(folder: Path, model: str, seeds: Sequence[int]) -> None:
    """Writes what the adapter and the head of each run start with, by PEFT's names."""
    config, base = load_base(model)
    for seed in seeds:
        bare, score = split_head(with_new_head(base, seed).lora)
        tensors = with_head(*in_peft_format(bare, LORA, config, model), score, HEAD, config)[1]
        save_file(tensors, folder / f"initial-{seed}.safetensors")


def read_batches(path: str) -> list[Mapping[str, np.ndarray]]:
    """Returns the arrays of each step."""
    arrays = load_file(path)
    return [{name: array[step] for name, array in arrays.items()} for step in range(len(arrays["inputs"]))]
