"""Computes how often real batches page: lengths of real rows, batched as in training, and the pages that they move.

Lengths follow from the data and the tokenizer, and memory from compiled programs (memory.py). The moves are simulated
(policies.py); a test compares the pager with the simulation.
"""

import gzip
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from qlora_jax.config import DataArgs
from qlora_jax.data.batching.batches import plan_epoch
from qlora_jax.data.dataset import load_dataset
from qlora_jax.data.readers.files import read_rows
from qlora_jax.data.rows import TokenRows
from qlora_jax.data.tokenizer.tokenizer import load_tokenizer
from qlora_jax.io.open_model import open_model
from qlora_jax.optim.page_layout import PAGE_BYTES
from qlora_jax.training.optimizer_state import RESERVE
from scripts.fetch_smollm2 import fetch_smollm2
from scripts.study_paging.memory import StepMemory
from scripts.study_paging.policies import OURS, POLICIES, Room, simulate

MAX_LENGTH = 2048  # positions of LLaMA
ROWS_PER_STEP = 16  # over all micro-batches: the batch of the paper
STEPS = 400
ARTICLE = re.compile(r"^ = [^=]+ = \n", re.MULTILINE)


def _unchanged(path: Path) -> Iterator[dict[str, object]]:
    return (dict(row.data) for row in read_rows(str(path)))


def _conversations(path: Path) -> Iterator[dict[str, object]]:
    return ({"prompt": row["input"], "completion": row["output"]} for row in _unchanged(path))


def _solutions(path: Path) -> Iterator[dict[str, object]]:
    return ({"prompt": row["question"], "completion": row["answer"]} for row in _unchanged(path))


def _articles(path: Path) -> Iterator[dict[str, object]]:
    text = gzip.decompress(path.read_bytes()).decode("utf-8")
    return ({"text": part.strip()} for part in ARTICLE.split(text) if part.strip())


class BatchLengths(TypedDict):
    """The lengths of one data set, as stored in docs/paged-optimizers.json.

    Fields:
      name, rows: name and number of rows.
      quantiles: quantile -> tokens.
      buckets: the padded lengths.
      steps: per optimizer step, the index of its bucket as a digit.
    """

    name: str
    rows: int
    quantiles: dict[str, int]
    buckets: list[int]
    steps: str


# Data set -> reader of its file into training rows.
SOURCES: dict[str, Callable[[Path], Iterator[dict[str, object]]]] = {
    "Alpaca instructions": _unchanged,
    "GSM8K solutions": _solutions,
    "OpenAssistant conversations": _conversations,
    "WikiText-2 articles": _articles,
}


def batch_lengths(name: str, path: Path) -> BatchLengths:
    """Returns quantiles of the rows' lengths, and the padded length of STEPS optimizer steps in training order."""
    tokenizer = load_tokenizer(open_model(str(fetch_smollm2())).tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in SOURCES[name](path)), encoding="utf-8")
        args = DataArgs(train=str(rows), max_length=MAX_LENGTH)
        data = load_dataset(args, tokenizer, seed=0, micro_batch_size=1, accumulation=ROWS_PER_STEP)
    assert isinstance(data.train, TokenRows), "one file is not a mixture"
    lengths: list[int] = []
    for epoch in range(STEPS):
        lengths += [step.length for step in plan_epoch(data.train.lengths, data.buckets, ROWS_PER_STEP, 0, epoch)]
        if len(lengths) >= STEPS:
            break
    row_lengths = data.train.lengths
    return {
        "name": name,
        "rows": len(row_lengths),
        "quantiles": {str(q): int(np.quantile(row_lengths, q)) for q in (0.5, 0.9, 0.99, 1.0)},
        "buckets": list(data.buckets),
        "steps": "".join(str(data.buckets.index(length)) for length in lengths[:STEPS]),
    }


def rooms(memory: StepMemory, limit: float, rows: int, lengths: Sequence[int]) -> list[Room]:
    """Returns the pages that each step leaves room for, at least one during updates (`measured_budget`)."""
    pages = -(-memory.state // PAGE_BYTES)
    free = limit * (1 - RESERVE) - memory.fixed
    after = min(pages, max(1, int(free // PAGE_BYTES)))
    of = {n: min(pages, max(0, int((free - memory.per_batch(rows * n)) // PAGE_BYTES))) for n in set(lengths)}
    return [Room(of[length], after) for length in lengths]


def moved_pages(memory: StepMemory, limit: float, rows: int, data: BatchLengths) -> list[int] | None:
    """Returns the pages that each step but the first moves, in and out; None if a step does not fit."""
    lengths = [data["buckets"][int(index)] for index in data["steps"]]
    if memory.fixed + memory.per_batch(rows * max(lengths)) > limit * (1 - RESERVE):
        return None
    pages = -(-memory.state // PAGE_BYTES)
    moves = simulate(POLICIES[OURS], pages, rooms(memory, limit, rows, lengths))[1:]
    return [move.into + move.out for move in moves]


def most_rows(memory: StepMemory, limit: float, data: BatchLengths) -> tuple[int, list[int]] | None:
    """Returns the largest of 1, 2, 4, 8 and 16 rows at once that fits with all pages evicted, and its moves."""
    found = [(rows, moved_pages(memory, limit, rows, data)) for rows in (1, 2, 4, 8, 16)]
    fitting = [(rows, moved) for rows, moved in found if moved is not None]
    return fitting[-1] if fitting else None
