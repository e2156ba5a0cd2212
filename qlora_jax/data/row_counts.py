"""Counts of rows, taken while they are read. Counts of chunks add up to those of the file."""

import collections
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qlora_jax.data.bad_rows import BadRow, first_rows, merge_reasons, merge_rows
from qlora_jax.data.branch_tree import Branch, branch_ends
from qlora_jax.data.class_labels import TRUTH_NAMES
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import Place
from qlora_jax.data.row_kinds import TEXT_NAMES, RowUse
from qlora_jax.untrusted_json import JsonObject

PERCENTILES = (1, 25, 50, 75, 95, 100)
_HISTOGRAMS = ("lengths", "new_tokens")  # by numbers
_LISTED = ("bad_rows", "unseen_rows")
_OTHERS = ("text_lengths", "labels", "label_numbers", "lookalikes", "columns", "bad_reasons")
_NOT_COUNTS = {*_HISTOGRAMS, *_LISTED, *_OTHERS}


class NumberSummary(NamedTuple):
    """The number, sum, smallest and largest of numbers."""

    count: int
    total: float
    smallest: float
    largest: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowCounts:
    """Counts of rows.

    Fields:
      rows, kept: rows encoded, and rows left after length handling.
      truncated, overlong, unsupervised: see lengths.FittedRows.
      lost_branches: branches that truncated rows lost, with the turns in them.
      lost_ends: answers of truncated rows that lost their end.
      cut: rows in which a token crossed the start or end of an answer, so prompt and answer were encoded separately.
      lossy: rows that do not decode to their own text.
      unseen_reasoning: kept rows with reasoning that the chat template does not write, so the model does not see it.
      branched: kept rows with branches.
      special_text: rows whose text contains the text of a special token, which is encoded as that token.
      doubled_bos, without_bos: rows that begin with two bos, and without bos although the tokenizer asks for one.
      tokens, supervised: targets of the kept rows, and those that the loss sees.
      truncated_equal: pairs dropped because truncation made their answers equal.
      head_texts: texts whose last position a head reads.
      longer_chosen, longer_rejected: pairs whose chosen, or rejected, answer has more tokens, before truncation.
      extra_tokens: tokens of the chosen answers less those of the rejected ones.
      lengths: number of rows by number of tokens of their longest text, before truncation.
      text_lengths: for rows of several texts, the number of rows by tokens of each part, such as `prompt` and `chosen`.
      labels: number of rows by label.
      label_numbers: summary of labels that are numbers; None for rows without them.
      new_tokens: number of occurrences in kept rows by id of a new token, if any.
      lookalikes: number of rows of plain text that look like conversations of another format, by its name.
      columns: column names, in the order of their first occurrence.
      bad_reasons: number of rows that data.bad_rows dropped, by reason. They are not in `rows`.
      bad_rows: the first of these rows.
      unseen_rows: the first rows of `unseen_reasoning`.
    """

    rows: int = 0
    kept: int = 0
    truncated: int = 0
    overlong: int = 0
    unsupervised: int = 0
    lost_branches: int = 0
    lost_ends: int = 0
    cut: int = 0
    lossy: int = 0
    unseen_reasoning: int = 0
    branched: int = 0
    special_text: int = 0
    doubled_bos: int = 0
    without_bos: int = 0
    tokens: int = 0
    supervised: int = 0
    truncated_equal: int = 0
    head_texts: int = 0
    longer_chosen: int = 0
    longer_rejected: int = 0
    extra_tokens: int = 0
    lengths: Mapping[int, int] = dataclasses.field(default_factory=dict)
    text_lengths: Mapping[str, Mapping[int, int]] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    label_numbers: NumberSummary | None = None
    new_tokens: Mapping[int, int] = dataclasses.field(default_factory=dict)
    lookalikes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    columns: tuple[str, ...] = ()
    bad_reasons: Mapping[str, int] = dataclasses.field(default_factory=dict)
    bad_rows: tuple[BadRow, ...] = ()
    unseen_rows: tuple[BadRow, ...] = ()

    def __add__(self, other: "RowCounts") -> "RowCounts":
        names = {field.name for field in dataclasses.fields(RowCounts)} - _NOT_COUNTS
        counts: dict[str, int] = {name: getattr(self, name) + getattr(other, name) for name in names}
        return RowCounts(
            **counts,  # pyright: ignore[reportArgumentType] (all are numbers)
            lengths=_sum(self.lengths, other.lengths),
            new_tokens=_sum(self.new_tokens, other.new_tokens),
            text_lengths={
                name: _sum(self.text_lengths.get(name, {}), other.text_lengths.get(name, {}))
                for name in dict.fromkeys((*self.text_lengths, *other.text_lengths))
            },
            labels={
                name: self.labels.get(name, 0) + other.labels.get(name, 0)  # also 0, of a column without a positive
                for name in dict.fromkeys((*self.labels, *other.labels))
            },
            label_numbers=_merge(self.label_numbers, other.label_numbers),
            lookalikes=_sum(self.lookalikes, other.lookalikes),
            columns=tuple(dict.fromkeys((*self.columns, *other.columns))),
            bad_reasons=merge_reasons(self.bad_reasons, other.bad_reasons),
            bad_rows=merge_rows(self.bad_rows, other.bad_rows),
            unseen_rows=merge_rows(self.unseen_rows, other.unseen_rows),
        )

    @property
    def bad(self) -> int:
        """Number of rows that data.bad_rows dropped."""
        return sum(self.bad_reasons.values())

    @property
    def percentiles(self) -> tuple[int, ...]:
        """Tokens per row at PERCENTILES."""
        return percentiles(self.lengths)

    def to_dict(self) -> dict[str, object]:
        """Returns the fields for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, stored: JsonObject) -> "RowCounts":
        """Returns the counts of `to_dict`, which JSON has stored: its keys are text and its tuples lists."""
        maps = {name: _by_number(stored[name]) for name in _HISTOGRAMS}
        texts = {name: _by_number(counts) for name, counts in stored["text_lengths"].items()}
        listed = {name: tuple(BadRow(*row) for row in stored[name]) for name in _LISTED}
        numbers = None if stored["label_numbers"] is None else NumberSummary(*stored["label_numbers"])
        others = {"text_lengths": texts, "label_numbers": numbers, "columns": tuple(stored["columns"])}
        return cls(**{**stored, **maps, **listed, **others})


def percentiles(lengths: Mapping[int, int]) -> tuple[int, ...]:
    """Returns the percentiles of row lengths that PERCENTILES lists; each is the length of a row.

    Args:
      lengths: number of rows by length; not empty.
    """
    found, seen, ascending = [], 0, sorted(lengths.items())
    rows = sum(lengths.values())
    for percentile in PERCENTILES:
        while seen * 100 < percentile * rows and ascending:
            length, count = ascending.pop(0)
            seen += count
        found.append(length)
    return tuple(found)


def _by_number(counts: Mapping[str, int]) -> dict[int, int]:
    return {int(key): count for key, count in counts.items()}


def _sum[K](a: Mapping[K, int], b: Mapping[K, int]) -> dict[K, int]:
    return dict(collections.Counter(a) + collections.Counter(b))


def _merge(a: NumberSummary | None, b: NumberSummary | None) -> NumberSummary | None:
    if a is None or b is None:
        return a or b
    return NumberSummary(a.count + b.count, a.total + b.total, min(a.smallest, b.smallest), max(a.largest, b.largest))


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
