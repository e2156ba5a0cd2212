"""How often real batches page: lengths of real rows, batched as training does, and the pager's rule over their needs.

Lengths are facts of the data and the tokenizer; needs come from compiled programs (memory.py); what moves is the
simulation (policies.py), which the pager itself is held to.
"""

import gzip
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.config import DataArgs
from qlora_jax.data.batching.batches import plan_epoch
from qlora_jax.data.dataset import load_dataset
from qlora_jax.data.readers.files import read_rows
from qlora_jax.data.tokenizer.tokenizer import load_tokenizer
from qlora_jax.io.open_model import open_model
from qlora_jax.optim.page_layout import PAGE_BYTES
from qlora_jax.training.paging_budget import RESERVE
from scripts.fetch_smollm2 import fetch_smollm2
from scripts.study_paging.memory import Needs
from scripts.study_paging.policies import OURS, POLICIES, Room, simulate

MAX_LENGTH = 2048  # of LLaMA
ROWS_A_STEP = 16  # micro-batches accumulated included: the paper's batch
STEPS = 400
ARTICLE = re.compile(r"^ = [^=]+ = \n", re.MULTILINE)


def _as_they_are(path: Path) -> Iterator[dict[str, Any]]:
    return (dict(row.data) for row in read_rows(str(path)))


def _turns(path: Path) -> Iterator[dict[str, Any]]:
    return ({"prompt": row["input"], "completion": row["output"]} for row in _as_they_are(path))


def _solutions(path: Path) -> Iterator[dict[str, Any]]:
    return ({"prompt": row["question"], "completion": row["answer"]} for row in _as_they_are(path))


def _articles(path: Path) -> Iterator[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()).decode("utf-8")
    return ({"text": part.strip()} for part in ARTICLE.split(text) if part.strip())


# Data set -> how its file becomes rows that training reads.
SOURCES: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    "Alpaca instructions": _as_they_are,
    "GSM8K solutions": _solutions,
    "OpenAssistant conversations": _turns,
    "WikiText-2 articles": _articles,
}


def batch_lengths(name: str, path: Path) -> dict[str, Any]:
    """Quantiles of rows' lengths, and the padded length of each of STEPS optimizer steps, in training's own order."""
    tokenizer = load_tokenizer(open_model(str(fetch_smollm2())).tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in SOURCES[name](path)), encoding="utf-8")
        args = DataArgs(train=str(rows), max_length=MAX_LENGTH)
        data = load_dataset(args, tokenizer, seed=0, micro_batch_size=1, accumulation=ROWS_A_STEP)
    lengths: list[int] = []
    for epoch in range(STEPS):
        lengths += [step.length for step in plan_epoch(data.train.lengths, data.buckets, ROWS_A_STEP, 0, epoch)]
        if len(lengths) >= STEPS:
            break
    places = data.train.lengths
    return {
        "name": name,
        "rows": len(places),
        "quantiles": {str(q): int(np.quantile(places, q)) for q in (0.5, 0.9, 0.99, 1.0)},
        "buckets": list(data.buckets),
        "steps": "".join(str(data.buckets.index(length)) for length in lengths[:STEPS]),
    }


def rooms(needs: Needs, limit: float, rows: int, lengths: Sequence[int]) -> list[Room]:
    """Pages that each step leaves room for; one is updated wherever it lies (qlora_jax.training.paging_budget)."""
    pages = -(-needs.state // PAGE_BYTES)
    free = limit * (1 - RESERVE) - needs.held
    after = min(pages, max(1, int(free // PAGE_BYTES)))
    of = {n: min(pages, max(0, int((free - needs.moving(rows * n)) // PAGE_BYTES))) for n in set(lengths)}
    return [Room(of[length], after) for length in lengths]


def moved_pages(needs: Needs, limit: float, rows: int, data: dict[str, Any]) -> list[int] | None:
    """Pages that each step moves, in and out, after the first, which brings all; None where a step does not fit."""
    lengths = [data["buckets"][int(index)] for index in data["steps"]]
    if needs.held + needs.moving(rows * max(lengths)) > limit * (1 - RESERVE):
        return None
    pages = -(-needs.state // PAGE_BYTES)
    moves = simulate(POLICIES[OURS], pages, rooms(needs, limit, rows, lengths))[1:]
    return [move.into + move.out for move in moves]


def most_rows(needs: Needs, limit: float, data: dict[str, Any]) -> tuple[int, list[int]] | None:
    """(the most rows at once that fit with all pages away, of 1, 2, 4, 8 and 16; what they move); None: not one."""
    found = [(rows, moved_pages(needs, limit, rows, data)) for rows in (1, 2, 4, 8, 16)]
    fitting = [(rows, moved) for rows, moved in found if moved is not None]
    return fitting[-1] if fitting else None
