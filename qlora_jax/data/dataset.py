"""load_dataset: from the settings of a run to batches and a report.

Each file becomes token rows (prepare.py), held in memory or in a folder (stored.py); files are mixed (mixture.py), and
windows of them are dealt to batches (batches.py).
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt64

from qlora_jax.config.schema import DataArgs
from qlora_jax.data.batching.batches import START, Batch, eval_batches, train_batches, window_order
from qlora_jax.data.batching.buckets import UNIT, choose_buckets, count_units
from qlora_jax.data.batching.mixture import Mixture, Part, check_weights
from qlora_jax.data.batching.packing import pack_length
from qlora_jax.data.holdout import Split, shared_rows
from qlora_jax.data.prepare import Preparation, row_chunks
from qlora_jax.data.report.stats import (
    DataReport,
    SourceReport,
    SplitReport,
    combine_reports,
    report_data,
    report_split,
)
from qlora_jax.data.row_counts import RowCounts
from qlora_jax.data.row_store import RowChunk, StoredRows, open_stored_rows, store_rows
from qlora_jax.data.rows import File, TokenRows, concatenate_rows
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, with_chat_template


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Rows ready to train on, and those held out.

    Fields:
      tokenizer: the one given, with the chat template that the settings name.
      eval: None where nothing is held out.
      buckets: lengths T that training batches come in; `eval_buckets` those of evaluation batches.
      packed: whether training rows share rows of a batch.
      report: what to show before training.
    """

    tokenizer: Tokenizer
    train: TokenRows | Mixture
    eval: TokenRows | None
    buckets: tuple[int, ...]
    eval_buckets: tuple[int, ...]
    packed: bool
    accumulation: int
    micro_batch_size: int
    seed: int
    report: DataReport

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every row is seen once: ceil(rows or packs / (accumulation * micro_batch_size))."""
        return self.report.steps_per_epoch

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the training rows as tokens, and of what the order of batches follows from.

        Two data sets with one fingerprint give the same batches at the same position.
        """
        order = (self.buckets, self.packed, self.accumulation, self.micro_batch_size, self.seed)
        return hashlib.sha256(repr((order, self.train.digest)).encode()).hexdigest()

    def window_order(self, epoch: int) -> list[int]:
        """Which window of the training rows comes when in an epoch; [0] where all rows are one."""
        return window_order(self.seed, epoch, self.train.windows).tolist()

    def train_batches(self, position: Mapping[str, int] = START) -> Iterator[Batch]:
        """Batches without end from `position` on; each carries the position that follows it."""
        return train_batches(
            self.train,
            self.buckets,
            packed=self.packed,
            accumulation=self.accumulation,
            micro_batch_size=self.micro_batch_size,
            seed=self.seed,
            pad_id=_padding(self.tokenizer),
            position=position,
        )

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Batches [1, batch_size, T] in which every held-out row is seen once; none where nothing is held out."""
        if self.eval is None:
            return iter(())
        return eval_batches(self.eval, self.eval_buckets, batch_size=batch_size, pad_id=_padding(self.tokenizer))


def load_dataset(
    data: DataArgs, tokenizer: Tokenizer, *, seed: int, micro_batch_size: int, accumulation: int
) -> Dataset:
    """The data set that `data` describes, every row read, checked and encoded, or taken from data.cache.

    Raises:
      ValueError: whatever is wrong with the files, told by file and line, all of one kind at once.
    """
    _check_held_out(data)
    if data.chat_template is not None:
        tokenizer = with_chat_template(tokenizer, data.chat_template)
    train, held = _train_sides(data, tokenizer), _held_sides(data, tokenizer)
    rows = _mixture(data, train, seed)
    held_rows = _joined(held) if held else None
    per_step = accumulation * micro_batch_size
    padded = _padded_lengths(rows, data, per_step)
    buckets = (pack_length(data.max_length),) if data.packing else padded
    report = report_data(
        rows,
        [SourceReport(side.report, weight) for side, weight in zip(train, _weights(data).values(), strict=True)],
        combine_reports([side.report for side in held]) if held else None,
        _shared(train, held),
        data.max_length,
        buckets,
        per_step,
        tokenizer,
        packed=data.packing,
    )
    return Dataset(
        tokenizer=tokenizer,
        train=rows,
        eval=held_rows,
        buckets=buckets,
        eval_buckets=_with_longest(padded, held_rows),
        packed=data.packing,
        accumulation=accumulation,
        micro_batch_size=micro_batch_size,
        seed=seed,
        report=report,
    )


def _check_held_out(data: DataArgs) -> None:
    if data.eval is not None and data.eval_fraction > 0:
        raise ValueError(
            f"data.eval ({data.eval}) and data.eval_fraction ({data.eval_fraction}) are both set; "
            "held-out rows come from one of them"
        )


def _padded_lengths(rows: TokenRows | Mixture, data: DataArgs, per_step: int) -> tuple[int, ...]:
    """The lengths that rows are padded to where none share a row of the batch."""
    units = np.sum([count_units(rows.window_lengths(0, n), data.max_length) for n in range(rows.windows)], axis=0)
    return choose_buckets(units, per_step, data.buckets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prepared:
    """One side of one file, prepared."""

    path: str
    rows: TokenRows | StoredRows
    digest: str
    report: SplitReport
    hashes: Sequence[UInt64[np.ndarray, " _"]]


def _weights(data: DataArgs) -> dict[str, float]:
    """Each training file and its weight."""
    return data.train if isinstance(data.train, dict) else {data.train: 1.0}


def _train_sides(data: DataArgs, tokenizer: Tokenizer) -> list[_Prepared]:
    side = Split(data.eval_fraction, held_out=False) if data.eval_fraction else None
    return [_prepare(path, side, data, tokenizer, in_memory=data.window is None) for path in _weights(data)]


def _held_sides(data: DataArgs, tokenizer: Tokenizer) -> list[_Prepared]:
    if data.eval is not None:
        return [_prepare(data.eval, None, data, tokenizer, in_memory=True)]
    if not data.eval_fraction:
        return []
    side = Split(data.eval_fraction, held_out=True)
    return [_prepare(path, side, data, tokenizer, in_memory=True) for path in _weights(data)]


def _prepare(path: str, side: Split | None, data: DataArgs, tokenizer: Tokenizer, *, in_memory: bool) -> _Prepared:
    row_format = data.format if isinstance(data.format, str) else data.format.get(path, "auto")
    wanted = Preparation(
        path=path, row_format=row_format, side=side, hashed=data.eval is not None, tokenizer=tokenizer, data=data
    )
    if data.cache is None:
        return _in_memory(path, list(row_chunks(wanted)))
    folder = Path(data.cache) / wanted.key()
    stored = open_stored_rows(folder, path)
    if stored is None:
        store_rows(row_chunks(wanted, in_parts=not in_memory), folder)
        stored = open_stored_rows(folder, path)
        assert stored is not None
    return _Prepared(
        path=path,
        rows=stored.read(0, len(stored)) if in_memory else stored,
        digest=stored.digest,
        report=report_split(path, stored.row_format, stored.counts),
        hashes=stored.hashes,
    )


def _in_memory(path: str, found: Sequence[RowChunk]) -> _Prepared:
    rows = concatenate_rows([piece.rows for piece in found], (File(path),))
    counts = functools.reduce(RowCounts.__add__, [piece.counts for piece in found])
    return _Prepared(
        path=path,
        rows=rows,
        digest=rows.digest,
        report=report_split(path, found[-1].row_format, counts),
        hashes=[piece.hashes for piece in found],
    )


def _mixture(data: DataArgs, sides: Sequence[_Prepared], seed: int) -> TokenRows | Mixture:
    """The training rows; those of one file in memory are their own, in the file's order."""
    weights = _weights(data)
    parts = tuple(Part(path=side.path, rows=side.rows, weight=weights[side.path], digest=side.digest) for side in sides)
    check_weights(parts)
    if len(parts) == 1 and parts[0].weight == 1 and isinstance(parts[0].rows, TokenRows):
        return parts[0].rows
    return Mixture(parts=parts, size=data.window, seed=seed)


def _joined(sides: Sequence[_Prepared]) -> TokenRows:
    """The rows of all files, each once."""
    parts = tuple(Part(path=side.path, rows=side.rows, weight=1.0, digest=side.digest) for side in sides)
    return Mixture(parts=parts, size=None, seed=0).window(0, 0).rows


def _shared(train: Sequence[_Prepared], held: Sequence[_Prepared]) -> int:
    """Held-out rows that are trained on too."""
    hashes = np.concatenate([np.zeros(0, np.uint64), *(chunk for side in held for chunk in side.hashes)])
    return shared_rows((chunk for side in train for chunk in side.hashes), hashes)


def _with_longest(buckets: tuple[int, ...], held: TokenRows | None) -> tuple[int, ...]:
    """The training buckets, and one more where a held-out row is longer than all of them."""
    longest = 0 if held is None else int(held.lengths.max())
    return buckets if longest <= buckets[-1] else (*buckets, -(-longest // UNIT) * UNIT)


def _padding(tokenizer: Tokenizer) -> int:
    """Any id will do: padding is masked by length."""
    named = (tokenizer.pad_id, tokenizer.eos_id, 0)
    return next(token for token in named if token is not None)
