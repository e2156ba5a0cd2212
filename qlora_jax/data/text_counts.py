"""Counts rows by their texts: lengths of parts, longer answers, labels, branches, and reasoning that is not seen."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from qlora_jax.data.bad_rows import first_rows
from qlora_jax.data.branch_tree import Branch, branch_ends
from qlora_jax.data.labels import TRUTH_NAMES
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import Place
from qlora_jax.data.row_counts import NumberSummary, RowCounts
from qlora_jax.data.row_kinds import TEXT_NAMES, RowUse

UNSEEN = "the chat template does not write its reasoning"


def count_texts(use: RowUse, rows: Sequence[EncodedRow], labels: Sequence[str]) -> RowCounts:
    """Returns the counts of encoded rows, before truncation.

    Args:
      labels: names of the classes, in order.
    """
    parts = [part_lengths(use, row) for row in rows]
    extra = [one["chosen"] - one["rejected"] for one in parts] if use.kind == "pair" else []
    names = dict.fromkeys(name for one in parts for name in one)
    return RowCounts(
        text_lengths={name: dict(Counter([one[name] for one in parts if name in one])) for name in names},
        head_texts=sum(max(len(row.branches), 1) for row in rows) if use.head else 0,
        longer_chosen=sum(more > 0 for more in extra),
        longer_rejected=sum(more < 0 for more in extra),
        extra_tokens=sum(extra),
        labels=_count_labels(use, rows, labels),
        label_numbers=_summarize_numbers(use, rows),
    )


def part_lengths(use: RowUse, row: EncodedRow) -> dict[str, int]:
    """Returns the tokens of the row's prompt, if it has one, and of each text after it, without fillers."""
    branches = row.branches or (Branch(0, 0),)
    has_prompt = use.kind in ("pair", "labelled")
    prompt = row.source if has_prompt else 0
    sizes = [
        branch.depth + end - branch.begin - use.head - prompt
        for branch, end in zip(branches, branch_ends(branches, len(row.ids)), strict=True)
    ]
    return ({"prompt": prompt} if has_prompt else {}) | dict(zip(TEXT_NAMES[use.kind], sizes, strict=False))


def _count_labels(use: RowUse, rows: Sequence[EncodedRow], labels: Sequence[str]) -> Mapping[str, int]:
    if use.values not in ("desirable", "class", "classes") or not rows:
        return {}
    found = np.array([row.values["labels"] for row in rows])[:, 0]
    if use.values == "classes":
        return {name: int(count) for name, count in zip(labels, found.sum(axis=0), strict=True)}
    names = TRUTH_NAMES if use.values == "desirable" else labels
    return Counter([names[int(index)] for index in found])


def _summarize_numbers(use: RowUse, rows: Sequence[EncodedRow]) -> NumberSummary | None:
    if use.values != "number" or not rows:
        return None
    found = np.array([row.values["labels"] for row in rows])[:, 0]
    return NumberSummary(len(found), float(found.sum()), float(found.min()), float(found.max()))


def count_branched(rows: Sequence[EncodedRow], places: Sequence[Place]) -> RowCounts:
    """Returns the number of kept conversations with branches, and with reasoning that the model does not see."""
    unseen = [place for row, place in zip(rows, places, strict=True) if row.unseen_reasoning]
    return RowCounts(
        branched=sum([bool(row.branches) for row in rows]),
        unseen_reasoning=len(unseen),
        unseen_rows=first_rows([(place, UNSEEN) for place in unseen]),
    )
