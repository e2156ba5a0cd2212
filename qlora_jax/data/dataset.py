"""load_dataset: from the settings of a run to batches and a report.

Each file becomes token rows (prepare.py), in memory or in a cache folder (row_store.py). Files are mixed
(batching/mixture.py), and windows of them are dealt to batches (batching/batches.py).
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
from qlora_jax.data.rows import File, TokenRows, check_ids, concatenate_rows
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, with_chat_template, with_template_kwargs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Rows to train on, and held-out rows.

    Fields:
      tokenizer: the given tokenizer, with the chat template that the settings name.
      eval: held-out rows, or None.
      buckets, eval_buckets: padded lengths T of training batches, and of evaluation batches.
      packed: True if several training rows share a row of a batch.
      report: the report to show before training.
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
        """Optimizer steps per epoch: ceil(rows or packs / (accumulation * micro_batch_size))."""
        return self.report.steps_per_epoch

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the training rows as tokens, and of the settings that determine the order of batches.

        Data sets with equal fingerprints give the same rows at the same position, in any split into micro-batches.
        """
        return self._fingerprint(self.accumulation * self.micro_batch_size)

    def fingerprint_of_split(self, accumulation: int, micro_batch_size: int) -> str:
        """Returns the fingerprint in the checkpoints of earlier versions, which depends on the split, too."""
        return self._fingerprint(accumulation, micro_batch_size)

    def _fingerprint(self, *rows_of_step: int) -> str:
        order = (self.buckets, self.packed, *rows_of_step, self.seed)
        return hashlib.sha256(repr((order, self.train.digest)).encode()).hexdigest()

    def window_order(self, epoch: int) -> list[int]:
        """Returns the windows of the training rows in the order of an epoch; [0] if all rows are one window."""
        return window_order(self.seed, epoch, self.train.windows).tolist()

    def train_batches(self, position: Mapping[str, int] = START) -> Iterator[Batch]:
        """Yields batches without end, from `position` on. Each has the position that follows it."""
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
        """Yields batches [1, batch_size, T] with every held-out row once; none without held-out rows."""
        if self.eval is None:
            return iter(())
        return eval_batches(self.eval, self.eval_buckets, batch_size=batch_size, pad_id=_padding(self.tokenizer))


def load_dataset(
    data: DataArgs, tokenizer: Tokenizer, *, seed: int, micro_batch_size: int, accumulation: int
) -> Dataset:
    """Loads the data set that `data` describes: reads, checks and encodes every row, or reads data.cache.

    Raises:
      ValueError: problems of settings, files or rows. All problems of a file's rows are in one error, by line.
    """
    _check_eval_settings(data)
    if data.chat_template is not None:
        tokenizer = with_chat_template(tokenizer, data.chat_template)
    if data.chat_template_kwargs:
        tokenizer = with_template_kwargs(tokenizer, data.chat_template_kwargs, "data.chat_template_kwargs")
    train, held_out = _prepare_train(data, tokenizer), _prepare_eval(data, tokenizer)
    rows = _mixture(data, train, seed)
    eval_rows = _concatenate(held_out) if held_out else None
    per_step = accumulation * micro_batch_size
    padded = _padded_lengths(rows, data, per_step)
    buckets = (pack_length(data.max_length),) if data.packing else padded
    report = report_data(
        rows,
        [SourceReport(split.report, weight) for split, weight in zip(train, _weights(data).values(), strict=True)],
        combine_reports([split.report for split in held_out]) if held_out else None,
        _count_shared(train, held_out),
        data.max_length,
        buckets,
        per_step,
        tokenizer,
        packed=data.packing,
    )
    return Dataset(
        tokenizer=tokenizer,
        train=rows,
        eval=eval_rows,
        buckets=buckets,
        eval_buckets=_with_longest(padded, eval_rows),
        packed=data.packing,
        accumulation=accumulation,
        micro_batch_size=micro_batch_size,
        seed=seed,
        report=report,
    )


def _check_eval_settings(data: DataArgs) -> None:
    if data.eval is not None and data.eval_fraction > 0:
        raise ValueError(
            f"data.eval: found both data.eval ({data.eval}) and data.eval_fraction ({data.eval_fraction}), expected "
            "one. Remove one of them."
        )


def _padded_lengths(rows: TokenRows | Mixture, data: DataArgs, per_step: int) -> tuple[int, ...]:
    """Returns the lengths that rows are padded to without packing."""
    units = np.sum([count_units(rows.window_lengths(0, n), data.max_length) for n in range(rows.windows)], axis=0)
    return choose_buckets(units, per_step, data.buckets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prepared:
    """One split of one file as token rows."""

    path: str
    rows: TokenRows | StoredRows
    digest: str
    report: SplitReport
    hashes: Sequence[UInt64[np.ndarray, " _"]]


def _weights(data: DataArgs) -> dict[str, float]:
    """Returns each training file and its weight."""
    return data.train if isinstance(data.train, dict) else {data.train: 1.0}


def _prepare_train(data: DataArgs, tokenizer: Tokenizer) -> list[_Prepared]:
    split = Split(data.eval_fraction, held_out=False) if data.eval_fraction else None
    return [_prepare(path, split, data, tokenizer, in_memory=data.window is None) for path in _weights(data)]


def _prepare_eval(data: DataArgs, tokenizer: Tokenizer) -> list[_Prepared]:
    if data.eval is not None:
        return [_prepare(data.eval, None, data, tokenizer, in_memory=True)]
    if not data.eval_fraction:
        return []
    split = Split(data.eval_fraction, held_out=True)
    return [_prepare(path, split, data, tokenizer, in_memory=True) for path in _weights(data)]


def _prepare(path: str, split: Split | None, data: DataArgs, tokenizer: Tokenizer, *, in_memory: bool) -> _Prepared:
    row_format = data.format if isinstance(data.format, str) else data.format.get(path, "auto")
    preparation = Preparation(
        path=path, row_format=row_format, split=split, hashed=data.eval is not None, tokenizer=tokenizer, data=data
    )
    if data.cache is None:
        return _in_memory(path, list(row_chunks(preparation)), tokenizer.rows)
    folder = Path(data.cache) / preparation.key()
    stored = open_stored_rows(folder, path, tokenizer.rows)
    if stored is None:
        store_rows(row_chunks(preparation), folder)
        stored = open_stored_rows(folder, path, tokenizer.rows)
        if stored is None:
            raise ValueError(f"data.cache: {folder} can't be read back after it was written. Check the disk.")
    return _Prepared(
        path=path,
        rows=stored.read(0, len(stored)) if in_memory else stored,
        digest=stored.digest,
        report=report_split(path, stored.row_format, stored.counts),
        hashes=stored.hashes,
    )


def _in_memory(path: str, chunks: Sequence[RowChunk], id_limit: int | None) -> _Prepared:
    rows = check_ids(concatenate_rows([chunk.rows for chunk in chunks], (File(path),)), id_limit)
    counts = functools.reduce(RowCounts.__add__, [chunk.counts for chunk in chunks])
    return _Prepared(
        path=path,
        rows=rows,
        digest=rows.digest,
        report=report_split(path, chunks[-1].row_format, counts),
        hashes=[chunk.hashes for chunk in chunks],
    )


def _mixture(data: DataArgs, splits: Sequence[_Prepared], seed: int) -> TokenRows | Mixture:
    """Returns the training rows: those of one file in memory in its order, otherwise a mixture of files."""
    weights = _weights(data)
    parts = tuple(
        Part(path=split.path, rows=split.rows, weight=weights[split.path], digest=split.digest) for split in splits
    )
    check_weights(parts)
    if len(parts) == 1 and parts[0].weight == 1 and isinstance(parts[0].rows, TokenRows):
        return parts[0].rows
    return Mixture(parts=parts, size=data.window, seed=seed)


def _concatenate(splits: Sequence[_Prepared]) -> TokenRows:
    """Returns the rows of all files, each once."""
    parts = tuple(Part(path=split.path, rows=split.rows, weight=1.0, digest=split.digest) for split in splits)
    return Mixture(parts=parts, size=None, seed=0).window(0, 0).rows


def _count_shared(train: Sequence[_Prepared], held_out: Sequence[_Prepared]) -> int:
    """Returns the number of held-out rows that are also trained on."""
    hashes = np.concatenate([np.zeros(0, np.uint64), *(chunk for split in held_out for chunk in split.hashes)])
    return shared_rows((chunk for split in train for chunk in split.hashes), hashes)


def _with_longest(buckets: tuple[int, ...], held_out: TokenRows | None) -> tuple[int, ...]:
    """Returns the training buckets, and one more if a held-out row is longer than all of them."""
    longest = 0 if held_out is None else int(held_out.lengths.max())
    return buckets if longest <= buckets[-1] else (*buckets, -(-longest // UNIT) * UNIT)


def _padding(tokenizer: Tokenizer) -> int:
    """Returns a padding id. Any id works, because padding is masked by length."""
    named = (tokenizer.pad_id, tokenizer.eos_id, 0)
    return next(token for token in named if token is not None)
