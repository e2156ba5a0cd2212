"""What an evaluation finds, as the flat numbers of a record, which trackers draw; and back again."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qlora_jax.inference.measures import Measure

LOW, HIGH = "_low", "_high"  # ends of names: of a share's interval


class Share(NamedTuple):
    """A share of right answers, from 0 to 1, with its 95 % interval.

    Fields:
      name: its key in records; `words`: what it is a share of.
    """

    name: str
    words: str
    value: float
    low: float
    high: float


def figures(task: str, measures: Sequence[Measure]) -> dict[str, float]:
    """Each measure by its task and name; of one with an interval also its ends.

    `letters`, "right by letter" is letters_right_by_letter, letters_right_by_letter_low, letters_right_by_letter_high;
    what a name has in brackets is left out.
    """
    found: dict[str, float] = {}
    for measure in measures:
        name = f"{task}_{_key(measure.name)}"
        found[name] = measure.value
        if measure.interval is not None:
            found[name + LOW], found[name + HIGH] = measure.interval
    return found


def _key(name: str) -> str:
    return re.sub(r"\W+", "_", name.partition(" (")[0])


def shares(record: Mapping[str, Any], task: str) -> list[Share]:
    """The shares of a task that a record has, in order."""
    names = [name for name in record if name.startswith(f"{task}_") and name + LOW in record]
    return [
        Share(name, name.removeprefix(f"{task}_").replace("_", " "), *(record[name + end] for end in ("", LOW, HIGH)))
        for name in names
    ]


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is more than a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
