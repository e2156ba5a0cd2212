"""Reads and writes head.json, the meaning of a sequence head's outputs, in run folders and exported adapters."""

import dataclasses
import json
from pathlib import Path
from typing import NotRequired, TypedDict

from qlora_jax.atomic_files import write_text
from qlora_jax.config.head_settings import CLASSES, HEADS, HeadObjective
from qlora_jax.io.digests import json_digest
from qlora_jax.line_digests import warn_without_digests
from qlora_jax.metadata import read_json
from qlora_jax.nn.sequence_head import HeadSpec, Pooling

HEAD_FILE = "head.json"
COPY_IT = "Copy the file from where the head was trained, or from a backup"
NAMED: dict[str, HeadObjective] = {name: name for name in HEADS}


class HeadRecord(TypedDict):
    """The contents of head.json; see `TrainedHead`. The digest is of the other values; earlier versions wrote none."""

    objective: HeadObjective
    labels: list[str]
    pooling: Pooling
    text_columns: NotRequired[list[list[str]]]
    digest: NotRequired[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedHead:
    """A trained sequence head.

    Attributes:
      objective: the objective that trained it.
      labels: names of the outputs, for classification and multi_label; else empty.
      pooling: the hidden state that stands for a sequence.
      text_columns: the columns of the texts that it was trained on, of each format of its rows, such as sentence1 and
        sentence2; empty for objectives whose rows are not texts with labels. Another head of the same meaning may have
        others.
      described: False for an adapter of another library, which does not say what its outputs mean.
    """

    objective: HeadObjective
    labels: tuple[str, ...] = ()
    pooling: Pooling = "last"
    text_columns: tuple[tuple[str, ...], ...] = dataclasses.field(default=(), compare=False)
    described: bool = True

    @property
    def outputs(self) -> int:
        """The number of outputs; 0 for embeddings, whose result is the pooled hidden state."""
        if self.objective in CLASSES:
            return len(self.labels)
        return 0 if self.objective == "embedding" else 1

    def spec(self) -> HeadSpec:
        """Returns the head's form."""
        return HeadSpec(outputs=self.outputs, pooling=self.pooling)

    def fits(self, other: "TrainedHead | None") -> bool:
        """True if training may continue from this head with the settings of `other`."""
        if self.described or other is None:
            return self == other
        return self.outputs == other.outputs and (self.outputs == 0 or self.pooling == other.pooling)

    def __str__(self) -> str:
        """The head's settings, for messages."""
        labels = f", labels={[*self.labels]}" if self.labels else ""
        return f"objective={self.objective}, pooling={self.pooling}{labels}"


def head_of(
    objective: str, labels: tuple[str, ...], pooling: Pooling, text_columns: tuple[tuple[str, ...], ...] = ()
) -> TrainedHead | None:
    """Returns the head that an objective trains; None if it has none."""
    named = NAMED.get(objective)
    if named is None:
        return None
    labels = labels if named in CLASSES else ()
    return TrainedHead(objective=named, labels=labels, pooling=pooling, text_columns=text_columns)


def check_same_head(place: str, found: TrainedHead | None, expected: TrainedHead | None) -> None:
    """Checks that training may continue with the sequence head of a model or run; a run adds one to a model without.

    Args:
      place: the model or file that has the head `found`.

    Raises:
      ValueError: it is another head than the run's; the message has both.
    """
    if found is None or found.fits(expected):
        return
    raise ValueError(
        f"{place}: its sequence head is not that of this run (found {found}; expected {expected or 'none'}). Use the "
        "objective, head.pooling and labels (head.labels, or those of the data) that trained it"
    )


def write_head(folder: Path, head: TrainedHead) -> None:
    """Writes head.json into an existing folder, unless the meaning of the outputs is unknown."""
    if head.described:
        values = {"objective": head.objective, "labels": [*head.labels], "pooling": head.pooling}
        if head.text_columns:
            values["text_columns"] = [[*columns] for columns in head.text_columns]
        record = {**values, "digest": json_digest(values)}
        write_text(folder / HEAD_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_head(folder: Path) -> TrainedHead | None:
    """Reads head.json; None if the folder has none.

    Raises:
      ValueError: it is damaged, or labels are missing or repeated.
    """
    path = folder / HEAD_FILE
    if not path.is_file():
        return None
    found = read_json(path, HeadRecord)
    values = {name: value for name, value in found.items() if name != "digest"}
    if "digest" not in found:
        warn_without_digests(folder)
    elif found["digest"] != json_digest(values):
        raise ValueError(f"{path}: damaged (its values are not those that were written). {COPY_IT}")
    head = TrainedHead(
        objective=found["objective"],
        labels=tuple(found["labels"]),
        pooling=found["pooling"],
        text_columns=tuple(map(tuple, found.get("text_columns", []))),
    )
    if len(set(head.labels)) < len(head.labels) or bool(head.labels) != (head.objective in CLASSES):
        raise ValueError(
            f"{path}: labels: found {list(head.labels)} with objective={head.objective}, expected unique names for "
            f"{' and '.join(CLASSES)}, and none for others. {COPY_IT}"
        )
    return head


def read_run_head(run: Path, objective: str) -> TrainedHead | None:
    """Reads the head.json of a run; None if its objective has no head.

    Raises:
      ValueError: the file is damaged, or missing.
    """
    head = read_head(run)
    if head is None and objective in NAMED:
        raise ValueError(
            f"{run / HEAD_FILE}: missing, but objective={objective} trains the head that it describes. {COPY_IT}"
        )
    return head
