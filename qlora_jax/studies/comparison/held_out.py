"""Checks that held-out rows are in none of the files that training or the search of learning rates sees."""

import hashlib
import json
from collections.abc import Iterator, Sequence

from qlora_jax.data.readers.files import Row, stream_rows
from qlora_jax.evaluation.row_measures import MEASURES
from qlora_jax.studies.comparison.settings import TaskSettings


def shared_row_problems(task: TaskSettings, training: Sequence[str]) -> list[str]:
    """Returns a problem per file that shares rows with the held-out rows; empty if none does.

    Rows are equal if all their columns are. Texts have no rows, and are not compared.

    Args:
      training: the files of training rows.
    """
    path = next((task.evaluate[kind] for kind in MEASURES if kind != "text" and task.evaluate.get(kind)), None)
    if not isinstance(path, str):
        return []
    held_out = set(_digests(path))
    files = {"train": training, "search": [task.search]}
    problems = []
    for name, paths in files.items():
        for seen in filter(None, paths):
            shared = len(held_out.intersection(_digests(seen)))
            if shared:
                problems.append(
                    f"{name}: {seen} has {shared} of the {len(held_out)} held-out rows of {path}. Remove them from it"
                )
    return problems


def _digests(path: str) -> Iterator[bytes]:
    """Yields a digest of each row that can be read; a run reports the others."""
    for row in stream_rows(path):
        if isinstance(row, Row):
            yield hashlib.sha256(json.dumps(row.data, sort_keys=True).encode("utf-8", "surrogatepass")).digest()[:16]
