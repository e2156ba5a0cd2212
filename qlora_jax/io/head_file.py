"""Reads and writes head.json, the meaning of a sequence head's outputs, in run folders and exported adapters."""

import dataclasses
import json
from pathlib import Path
from typing import TypedDict

from qlora_jax.atomic_files import write_text
from qlora_jax.config.head_settings import CLASSES, HEADS, HeadObjective
from qlora_jax.metadata import read_json
from qlora_jax.nn.sequence_head import HeadSpec, Pooling

HEAD_FILE = "head.json"
NAMED: dict[str, HeadObjective] = {name: name for name in HEADS}


class HeadRecord(TypedDict):
    """The contents of head.json; see `TrainedHead`."""

    objective: HeadObjective
    labels: list[str]
    pooling: Pooling


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedHead:
    """A trained sequence head.

    Attributes:
      objective: the objective that trained it.
      labels: names of the outputs, for classification and multi_label; else empty.
      pooling: the hidden state that stands for a sequence.
    """

    objective: HeadObjective
    labels: tuple[str, ...] = ()
    pooling: Pooling = "last"

    @property
    def outputs(self) -> int:
        """The number of outputs; 0 for embeddings, whose result is the pooled hidden state."""
        if self.objective in CLASSES:
            return len(self.labels)
        return 0 if self.objective == "embedding" else 1

    def spec(self, init_std: float = 0.02) -> HeadSpec:
        """Returns the head's form.

        Args:
          init_std: standard deviation of initial values, `initializer_range` of the model's config.
        """
        return HeadSpec(outputs=self.outputs, pooling=self.pooling, init_std=init_std)


def head_of(objective: str, labels: tuple[str, ...], pooling: Pooling) -> TrainedHead | None:
    """Returns the head that an objective trains; None if it has none."""
    named = NAMED.get(objective)
    if named is None:
        return None
    return TrainedHead(objective=named, labels=labels if named in CLASSES else (), pooling=pooling)


def write_head(folder: Path, head: TrainedHead) -> None:
    """Writes head.json into an existing folder."""
    write_text(folder / HEAD_FILE, json.dumps(dataclasses.asdict(head), indent=2, ensure_ascii=False) + "\n")


def read_head(folder: Path) -> TrainedHead | None:
    """Reads head.json; None if the folder has none.

    Raises:
      MetadataError: it is damaged.
      ValueError: labels are missing or repeated.
    """
    path = folder / HEAD_FILE
    if not path.is_file():
        return None
    found = read_json(path, HeadRecord)
    head = TrainedHead(objective=found["objective"], labels=tuple(found["labels"]), pooling=found["pooling"])
    if len(set(head.labels)) < len(head.labels) or bool(head.labels) != (head.objective in CLASSES):
        raise ValueError(
            f"{path}: labels: found {list(head.labels)} with objective={head.objective}, expected unique names for "
            f"{' and '.join(CLASSES)}, and none for others. Copy the file from where the head was trained"
        )
    return head
