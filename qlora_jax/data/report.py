"""What the data looks like, as numbers: counted before training, and told by report_text.py."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from qlora_jax.data.buckets import bucket_of, places_taken, steps_by_bucket
from qlora_jax.data.encode import Encoded
from qlora_jax.data.formats import Form
from qlora_jax.data.lengths import Fitted
from qlora_jax.data.packing import pack
from qlora_jax.data.readers import Row
from qlora_jax.data.rows import TokenRows
from qlora_jax.data.spans import Segment
from qlora_jax.data.tokenizer import Tokenizer

PERCENTILES = (1, 25, 50, 75, 95, 100)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideReport:
    """One side of the data, training or held out.

    Fields:
      rows, kept: rows of the file on this side, and those left after length handling.
      percentiles: tokens a row before truncation, at PERCENTILES.
      truncated, overlong, unsupervised: as in lengths.Fitted.
      cut: rows in which a token was cut at the start or end of an answer, as generation cuts it.
      lossy: rows that do not decode to their own text.
      special_text: rows whose own text spells a special token; it is encoded as that token.
      doubled_bos, without_bos: rows that begin with bos twice, and without it although the tokenizer asks for it.
      tokens, supervised: targets of the kept rows, and those among them that the loss sees.
    """

    path: str
    form: str
    ignored_columns: tuple[str, ...]
    rows: int
    kept: int
    percentiles: tuple[int, ...]
    truncated: int
    overlong: int
    unsupervised: int
    cut: int
    lossy: int
    special_text: int
    doubled_bos: int
    without_bos: int
    tokens: int
    supervised: int

    @property
    def supervised_share(self) -> float:
        """Share of the targets that the loss sees."""
        return self.supervised / self.tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataReport:
    """All that a person should see before a run starts.

    Fields:
      shared: held-out rows that are also trained on.
      buckets, steps: padded lengths, and the optimizer steps an epoch takes at each.
      packs: how many packs the rows fill; None where they are not packed.
      padding_share: share of an epoch's places that hold no target.
      rows_per_step: rows, or packs, an optimizer step sees.
      example: the first training row, decoded, in runs of equal supervision.
      example_place: its `file:line`.
    """

    train: SideReport
    eval: SideReport | None
    shared: int
    max_length: int
    buckets: tuple[int, ...]
    steps: tuple[int, ...]
    packs: int | None
    padding_share: float
    rows_per_step: int
    example: tuple[Segment, ...]
    example_place: str

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch."""
        return sum(self.steps)


def report_side(
    rows: TokenRows,
    encoded: Sequence[Encoded],
    fitted: Fitted,
    form: Form,
    read: Sequence[Row],
    special_text: int,
    tokenizer: Tokenizer,
) -> SideReport:
    """The numbers of one side: `read` and `encoded` before length handling, `fitted` and `rows` after it."""
    columns = dict.fromkeys(name for row in read for name in row.data)
    lengths = np.array([len(row.ids) for row in encoded])
    first_ids = np.zeros(len(rows.ids), bool)
    first_ids[rows.starts[:-1]] = True
    bos_id = -1 if tokenizer.bos_id is None else tokenizer.bos_id
    first, second = (rows.ids[rows.starts[:-1] + place] == bos_id for place in (0, 1))
    return SideReport(
        path=rows.path,
        form=form.name,
        ignored_columns=tuple(name for name in columns if name not in (*form.required, *form.optional)),
        rows=len(encoded),
        kept=len(rows),
        percentiles=tuple(int(np.percentile(lengths, p, method="inverted_cdf")) for p in PERCENTILES),
        truncated=fitted.truncated,
        overlong=fitted.overlong,
        unsupervised=fitted.unsupervised,
        cut=sum(row.cut for row in fitted.rows),
        lossy=sum(row.lossy for row in fitted.rows),
        special_text=special_text,
        doubled_bos=int((first & second).sum()),
        without_bos=int((~first).sum()) if tokenizer.add_bos_token else 0,
        tokens=int(rows.places.sum()),
        supervised=int((rows.supervised & ~first_ids).sum()),
    )


def report_data(
    train: TokenRows,
    sides: tuple[SideReport, SideReport | None],
    shared: int,
    max_length: int,
    buckets: tuple[int, ...],
    rows_per_step: int,
    tokenizer: Tokenizer,
    *,
    packed: bool = False,
) -> DataReport:
    """The whole report, from the rows that will be trained on."""
    packs = len(pack(train.places, buckets[-1], np.arange(len(train)))) if packed else None
    if packs is None:
        counts = np.bincount(bucket_of(train.places, buckets), minlength=len(buckets)).tolist()
        steps, taken = steps_by_bucket(counts, rows_per_step), places_taken(train.places, buckets, rows_per_step)
    else:
        steps = [-(-packs // rows_per_step)]
        taken = steps[0] * rows_per_step * buckets[0]
    return DataReport(
        train=sides[0],
        eval=sides[1],
        shared=shared,
        max_length=max_length,
        buckets=buckets,
        steps=tuple(steps),
        packs=packs,
        padding_share=1 - int(train.places.sum()) / taken,
        rows_per_step=rows_per_step,
        example=decode_row(train, 0, tokenizer),
        example_place=train.where(int(train.numbers[0])),
    )


def decode_row(rows: TokenRows, index: int, tokenizer: Tokenizer) -> tuple[Segment, ...]:
    """The row's text in runs of equal supervision; what the loss sees is decoded from the very ids of the batch."""
    ids, supervised = rows.row(index)
    changes = np.flatnonzero(np.diff(supervised)) + 1
    runs = zip(np.split(ids, changes), np.split(supervised, changes), strict=True)
    return tuple(Segment(tokenizer.decode(run.tolist()), bool(mask[0])) for run, mask in runs)
