"""Statistics of a data set, counted before training. text.py prints them."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from qlora_jax.config.objectives import ValueKind
from qlora_jax.data.batching.mixture import Mixture
from qlora_jax.data.batching.packing import bucket_of, pack, packed_lengths, steps_by_bucket
from qlora_jax.data.branch_tree import branch_ends
from qlora_jax.data.class_labels import label_text
from qlora_jax.data.formats.registry import format_of
from qlora_jax.data.formats.turn_fields import TEMPLATE_KWARGS
from qlora_jax.data.row_counts import RowCounts
from qlora_jax.data.row_kinds import TEXT_NAMES, row_use
from qlora_jax.data.rows import TokenRows
from qlora_jax.data.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitReport(RowCounts):
    """Counts of training rows or of held-out rows.

    Fields:
      path: file, or files.
      form: name of the row format.
      ignored_columns: columns that the format does not use.
    """

    path: str
    form: str
    ignored_columns: tuple[str, ...]

    @property
    def supervised_share(self) -> float:
        """Share of the targets that the loss sees."""
        return self.supervised / self.tokens


class ShownText(NamedTuple):
    """A piece of an example row.

    Fields:
      supervised: True if the loss sees it.
      name: the text that begins with it, such as `rejected`; empty for a row of one text, and within a text.
    """

    text: str
    supervised: bool
    name: str = ""


class RowParts(NamedTuple):
    """The texts and the label of a row, for examples.

    Fields:
      names: names of a row's texts, in order.
      head: True if each text ends with a filler, at which a head reads it.
      values: kind of its label.
      labels: names of the classes, in order.
    """

    names: tuple[str, ...]
    head: bool
    values: ValueKind = "none"
    labels: tuple[str, ...] = ()


ONE_TEXT = RowParts((), head=False)


def row_parts(objective: str, labels: tuple[str, ...]) -> RowParts:
    """Returns the texts and the label of an objective's rows."""
    use = row_use(objective)
    return RowParts(TEXT_NAMES[use.kind], use.head, use.values, labels)


class SourceReport(NamedTuple):
    """Counts of one training file, and its weight."""

    split: SplitReport
    weight: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataReport:
    """Statistics that a person should see before a run.

    Fields:
      train: counts of all training files together.
      sources: counts of each training file.
      eval: counts of held-out rows, or None.
      shared: number of held-out rows that are also trained on.
      unseen: new tokens that are in no training row.
      side: the side on which rows are truncated.
      buckets, steps: padded lengths, and the optimizer steps per epoch at each.
      rows_per_epoch: rows that an epoch uses. Weights of files may make them fewer or more than those of `train`.
      packs: number of packs that these rows fill; None without packing.
      windows: windows per epoch. Each is shuffled separately.
      padding_share: share of an epoch's positions without a target.
      rows_per_step: rows, or packs, per optimizer step.
      example: the first training row as text, split where supervision changes.
      example_place: its `file:line`.
      example_label: its label; empty if it has none.
      parts: the texts of a row.
    """

    train: SplitReport
    sources: tuple[SourceReport, ...]
    eval: SplitReport | None
    shared: int
    unseen: tuple[str, ...]
    max_length: int
    side: str
    buckets: tuple[int, ...]
    steps: tuple[int, ...]
    rows_per_epoch: int
    packs: int | None
    windows: int
    padding_share: float
    rows_per_step: int
    example: tuple[ShownText, ...]
    example_place: str
    example_label: str
    parts: RowParts

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return sum(self.steps)


def report_split(path: str, form: str, counts: RowCounts) -> SplitReport:
    """Returns the report of one split of one file."""
    found = format_of(form)
    known = format_of(found.example) if found.examples else found
    fields = {field.name: getattr(counts, field.name) for field in dataclasses.fields(RowCounts)}
    for name in ("bad_rows", "unseen_rows"):
        fields[name] = tuple(row._replace(path=path) for row in fields[name])
    used = {*known.required, *known.optional, TEMPLATE_KWARGS, *counts.labels}  # labels may be columns
    # Rewards get the other columns of prompts.
    ignored = () if known.kind == "prompt" else tuple(name for name in counts.columns if name not in used)
    return SplitReport(**fields, path=path, form=form, ignored_columns=ignored)


def combine_reports(reports: Sequence[SplitReport]) -> SplitReport:
    """Returns one report of several files."""
    if len(reports) == 1:
        return reports[0]
    counts: RowCounts = functools.reduce(RowCounts.__add__, reports)
    fields = {field.name: getattr(counts, field.name) for field in dataclasses.fields(RowCounts)}
    path, form = (", ".join(dict.fromkeys(names)) for names in zip(*[(r.path, r.form) for r in reports], strict=True))
    return SplitReport(**fields, path=path, form=form, ignored_columns=())


class _WindowStats(NamedTuple):
    """Batches of one window.

    Fields:
      steps: steps at each padded length.
      packs: number of packs; 0 without packing.
      filled, total: positions with a target, and all positions.
    """

    steps: Int64[np.ndarray, " buckets"]
    packs: int
    filled: int
    total: int


def _window_stats(
    lengths: Int64[np.ndarray, " rows"], buckets: Sequence[int], rows_per_step: int, packed: bool, sequences: int
) -> _WindowStats:
    if packed:
        packs = len(pack(packed_lengths(lengths, sequences), buckets[-1], np.arange(len(lengths))))
        steps = np.array([-(-packs // rows_per_step)])
    else:
        packs = 0
        counts = np.bincount(bucket_of(lengths, buckets), minlength=len(buckets)).tolist()
        steps = np.array(steps_by_bucket(counts, rows_per_step))
    return _WindowStats(steps, packs, int(lengths.sum()), int((steps * buckets).sum()) * rows_per_step)


def report_data(
    train: TokenRows | Mixture,
    sources: Sequence[SourceReport],
    eval_report: SplitReport | None,
    shared: int,
    max_length: int,
    buckets: tuple[int, ...],
    rows_per_step: int,
    tokenizer: Tokenizer,
    *,
    side: str,
    parts: RowParts,
    packed: bool = False,
    sequences: int = 0,
) -> DataReport:
    """Returns the report. Steps, packs and padding are those of the first epoch.

    Args:
      side: the side on which rows are truncated, in words.
      parts: the texts and the label of a row.
      sequences: sequences of each row, which have slots in a batch; 0: no slots.
    """
    windows = [
        _window_stats(train.window_lengths(0, n), buckets, rows_per_step, packed, sequences)
        for n in range(train.windows)
    ]
    filled, total = sum(one.filled for one in windows), sum(one.total for one in windows)
    first, combined = train.window(0, 0), combine_reports([source.split for source in sources])
    shown = int(first.indices[0])
    return DataReport(
        train=combined,
        sources=tuple(sources),
        eval=eval_report,
        shared=shared,
        unseen=tuple(tokenizer.decode([new]) for new in tokenizer.new_ids if new not in combined.new_tokens),
        max_length=max_length,
        side=side,
        buckets=buckets,
        steps=tuple(np.sum([one.steps for one in windows], axis=0).tolist()),
        rows_per_epoch=len(train),
        packs=sum(one.packs for one in windows) if packed else None,
        windows=train.windows,
        padding_share=1 - filled / total,
        rows_per_step=rows_per_step,
        example=decode_row(first.rows, shown, tokenizer, parts),
        example_place=train.where(int(first.rows.numbers[shown])),
        example_label=row_label(first.rows, shown, parts),
        parts=parts,
    )


def decode_row(rows: TokenRows, index: int, tokenizer: Tokenizer, parts: RowParts) -> tuple[ShownText, ...]:
    """Decodes the row's ids, split where supervision changes and where a text begins.

    An id of the prompt with which all branches begin is shown once. Fillers are not shown.
    """
    (ids, supervised), branches = rows.row(index), rows.branches_of(index)
    if not branches:
        end = len(ids) - parts.head
        return tuple(_runs(tokenizer, ids[:end], supervised[:end]))
    trunk = branches[0].begin
    is_shared = trunk > 0 and {(branch.depth, int(ids[branch.begin])) for branch in branches} == {
        (trunk, int(ids[trunk]))
    }
    prompt = trunk + is_shared
    shown = [*_runs(tokenizer, ids[:prompt], supervised[:prompt])]
    for number, (branch, end) in enumerate(zip(branches, branch_ends(branches, len(ids)), strict=True)):
        span = slice(branch.begin + is_shared, end - parts.head)
        name = parts.names[number] if parts.names else f"branch {number + 1}"
        pieces = _runs(tokenizer, ids[span], supervised[span])
        shown += [piece._replace(name="" if at else name) for at, piece in enumerate(pieces)]
    return tuple(shown)


def row_label(rows: TokenRows, index: int, parts: RowParts) -> str:
    """Returns the row's label as text; empty if it has none."""
    return label_text(parts.values, {name: values[index] for name, values in rows.values.items()}, parts.labels)


def _runs(
    tokenizer: Tokenizer, ids: Int32[np.ndarray, " n"], supervised: Bool[np.ndarray, " n"]
) -> Iterator[ShownText]:
    if not len(ids):
        return
    changes = np.flatnonzero(np.diff(supervised)) + 1
    for run, mask in zip(np.split(ids, changes), np.split(supervised, changes), strict=True):
        yield ShownText(tokenizer.decode(run.tolist()), bool(mask[0]))
