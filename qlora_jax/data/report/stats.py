"""What the data looks like, as numbers: counted before training, and told by report_text.py."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qlora_jax.data.batching.buckets import bucket_of, steps_by_bucket
from qlora_jax.data.batching.mixture import Mixture
from qlora_jax.data.batching.packing import pack
from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.loss_mask.spans import Segment
from qlora_jax.data.row_counts import RowCounts
from qlora_jax.data.rows import TokenRows
from qlora_jax.data.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitReport(RowCounts):
    """The counts of one side of the data, training or held out, and the file and form that they are of."""

    path: str
    form: str
    ignored_columns: tuple[str, ...]

    @property
    def supervised_share(self) -> float:
        """Share of the targets that the loss sees."""
        return self.supervised / self.tokens


class SourceReport(NamedTuple):
    """One training file, and its weight."""

    side: SplitReport
    weight: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataReport:
    """All that a person should see before a run starts.

    Fields:
      train: of all training files together; `sources` has each.
      shared: held-out rows that are also trained on.
      unseen: new tokens that no training row has.
      buckets, steps: padded lengths, and the optimizer steps an epoch takes at each.
      rows_per_epoch: rows that an epoch draws; by their files' weights they may be fewer or more than `train` has.
      packs: how many packs these rows fill; None where they are not packed.
      windows: how many an epoch has, each shuffled by itself.
      padding_share: share of an epoch's places that hold no target.
      rows_per_step: rows, or packs, an optimizer step sees.
      example: the first training row, decoded, in runs of equal supervision.
      example_place: its `file:line`.
    """

    train: SplitReport
    sources: tuple[SourceReport, ...]
    eval: SplitReport | None
    shared: int
    unseen: tuple[str, ...]
    max_length: int
    buckets: tuple[int, ...]
    steps: tuple[int, ...]
    rows_per_epoch: int
    packs: int | None
    windows: int
    padding_share: float
    rows_per_step: int
    example: tuple[Segment, ...]
    example_place: str

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch."""
        return sum(self.steps)


def report_split(path: str, form: str, counts: RowCounts) -> SplitReport:
    """The report of one file's side."""
    known = FORMATS[FORMATS[form].example if FORMATS[form].examples else form]
    fields = {field.name: getattr(counts, field.name) for field in dataclasses.fields(RowCounts)}
    ignored = tuple(name for name in counts.columns if name not in (*known.required, *known.optional))
    return SplitReport(**fields, path=path, form=form, ignored_columns=ignored)


def combine_reports(reports: Sequence[SplitReport]) -> SplitReport:
    """One report of several files."""
    if len(reports) == 1:
        return reports[0]
    counts: RowCounts = functools.reduce(RowCounts.__add__, reports)
    fields = {field.name: getattr(counts, field.name) for field in dataclasses.fields(RowCounts)}
    path, form = (", ".join(dict.fromkeys(names)) for names in zip(*[(r.path, r.form) for r in reports], strict=True))
    return SplitReport(**fields, path=path, form=form, ignored_columns=())


class _Taken(NamedTuple):
    """What an epoch's batches are, window by window: steps at each length, packs, places filled and places held."""

    steps: np.ndarray
    packs: int
    filled: int
    held: int


def _window(places: np.ndarray, buckets: Sequence[int], rows_per_step: int, packed: bool) -> _Taken:
    if packed:
        packs = len(pack(places, buckets[-1], np.arange(len(places))))
        steps = np.array([-(-packs // rows_per_step)])
    else:
        packs = 0
        counts = np.bincount(bucket_of(places, buckets), minlength=len(buckets)).tolist()
        steps = np.array(steps_by_bucket(counts, rows_per_step))
    return _Taken(steps, packs, int(places.sum()), int((steps * buckets).sum()) * rows_per_step)


def report_data(
    train: TokenRows | Mixture,
    sources: Sequence[SourceReport],
    held: SplitReport | None,
    shared: int,
    max_length: int,
    buckets: tuple[int, ...],
    rows_per_step: int,
    tokenizer: Tokenizer,
    *,
    packed: bool = False,
) -> DataReport:
    """The whole report; steps, packs and padding are those of the first epoch."""
    windows = [_window(train.window_lengths(0, n), buckets, rows_per_step, packed) for n in range(train.windows)]
    filled, taken = sum(one.filled for one in windows), sum(one.held for one in windows)
    first, side = train.window(0, 0), combine_reports([source.side for source in sources])
    return DataReport(
        train=side,
        sources=tuple(sources),
        eval=held,
        shared=shared,
        unseen=tuple(tokenizer.decode([new]) for new in tokenizer.new_ids if new not in side.new_tokens),
        max_length=max_length,
        buckets=buckets,
        steps=tuple(np.sum([one.steps for one in windows], axis=0).tolist()),
        rows_per_epoch=len(train),
        packs=sum(one.packs for one in windows) if packed else None,
        windows=train.windows,
        padding_share=1 - filled / taken,
        rows_per_step=rows_per_step,
        example=decode_row(first.rows, int(first.indices[0]), tokenizer),
        example_place=train.where(int(first.rows.numbers[first.indices[0]])),
    )


def decode_row(rows: TokenRows, index: int, tokenizer: Tokenizer) -> tuple[Segment, ...]:
    """The row's text in runs of equal supervision; what the loss sees is decoded from the very ids of the batch."""
    ids, supervised = rows.row(index)
    changes = np.flatnonzero(np.diff(supervised)) + 1
    runs = zip(np.split(ids, changes), np.split(supervised, changes), strict=True)
    return tuple(Segment(tokenizer.decode(run.tolist()), bool(mask[0])) for run, mask in runs)
