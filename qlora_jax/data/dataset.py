"""load_dataset: from the settings of a run to batches and a report.

Each file becomes token rows (prepare.py), in memory or in a cache folder (row_store.py). Files are mixed
(batching/mixture.py), and windows of them are dealt to batches (batching/batches.py).
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt64

from qlora_jax.config.schema import DataArgs
from qlora_jax.data.batching.batches import START, eval_batches, train_batches, window_order
from qlora_jax.data.batching.mixture import Mixture, Part, check_kinds, check_weights, count_sequences
from qlora_jax.data.batching.packing import UNIT, Batch, choose_buckets, count_units, pack_length
from qlora_jax.data.class_labels import find_labels
from qlora_jax.data.formats.turn_fields import Tools
from qlora_jax.data.holdout import Split, shared_rows
from qlora_jax.data.kto_pairs import PairedRows, kl_shift, pair_rows, paired_digest
from qlora_jax.data.prepare import Preparation, row_chunks
from qlora_jax.data.report.stats import (
    DataReport,
    SourceReport,
    SplitReport,
    combine_reports,
    report_data,
    report_split,
    row_parts,
)
from qlora_jax.data.row_counts import RowCounts
from qlora_jax.data.row_kinds import row_use
from qlora_jax.data.row_store import StoredRows, open_stored_rows, store_rows
from qlora_jax.data.rows import (
    File,
    TokenRows,
    ValuesByNumber,
    attach_values,
    check_ids,
    concatenate_rows,
    with_branches,
)
from qlora_jax.data.tokenizer.tokenizer import (
    Tokenizer,
    with_chat_template,
    with_template_date,
    with_template_kwargs,
)
from qlora_jax.data.truncation import truncated_side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Rows to train on, and held-out rows.

    Fields:
      tokenizer: the given tokenizer, with the chat template that the settings name.
      eval: held-out rows, or None.
      buckets, eval_buckets: padded lengths T of training batches, and of evaluation batches.
      packed: True if several training rows share a row of a batch.
      sequences: sequences of each row, which have slots in batches; 0 for supervised finetuning, which needs no slots.
      labels: names of the classes, in order; empty if the objective has none.
      digest: SHA-256 of the training rows as they were loaded.
      report: the report to show before training.
    """

    tokenizer: Tokenizer
    train: TokenRows | Mixture
    eval: TokenRows | None
    buckets: tuple[int, ...]
    eval_buckets: tuple[int, ...]
    packed: bool
    sequences: int
    labels: tuple[str, ...]
    accumulation: int
    micro_batch_size: int
    seed: int
    digest: str
    report: DataReport

    @property
    def branching(self) -> bool:
        """True if training rows may be trees, so that their batches have `parents` and `depths`."""
        return self.train.branching

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
        return hashlib.sha256(repr((order, self.digest)).encode()).hexdigest()

    def window_order(self, epoch: int) -> list[int]:
        """Returns the windows of the training rows in the order of an epoch; [0] if all rows are one window."""
        return window_order(self.seed, epoch, self.train.windows).tolist()

    def train_batches(self, position: Mapping[str, int] = START) -> Iterator[Batch]:
        """Yields batches without end, from `position` on. Each has the position that follows it."""
        return train_batches(
            self.train,
            self.buckets,
            packed=self.packed,
            sequences=self.sequences,
            accumulation=self.accumulation,
            micro_batch_size=self.micro_batch_size,
            seed=self.seed,
            pad_id=padding_id(self.tokenizer),
            position=position,
        )

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields batches [1, batch_size, T] with every held-out row once; none without held-out rows."""
        if self.eval is None:
            return iter(())
        return self._once(self.eval, batch_size)

    def each_row_once(self, batch_size: int) -> Iterator[Batch]:
        """Yields batches [1, batch_size, T] with every training row once, whatever the files' weights."""
        for rows in self.train.chunks():
            yield from self._once(rows, batch_size)

    def _once(self, rows: TokenRows, batch_size: int) -> Iterator[Batch]:
        padding = padding_id(self.tokenizer)
        return eval_batches(rows, self.eval_buckets, batch_size=batch_size, pad_id=padding, sequences=self.sequences)

    def with_values(self, name: str, values: ValuesByNumber) -> "Dataset":
        """Returns the data set with one more value per training sequence, which batches have under `name`.

        The fingerprint stays, because the order of batches does.

        Args:
          values: [train.number_limit, sequences], indexed by the rows' numbers.
        """
        found, expected = values.shape[:2], (self.train.number_limit, self.sequences)
        if found != expected:
            raise ValueError(f"values {name}: they belong to other rows (found shape {found}, expected {expected})")
        if isinstance(self.train, Mixture):
            rows = dataclasses.replace(self.train, attached={**self.train.attached, name: values})
        else:
            rows = attach_values(self.train, {name: values})
        return dataclasses.replace(self, train=rows)


def load_dataset(
    data: DataArgs,
    tokenizer: Tokenizer,
    *,
    seed: int,
    micro_batch_size: int,
    accumulation: int,
    objective: str = "sft",
    labels: Sequence[str] = (),
    kl_pairs: bool = False,
    reply_tokens: int = 0,
    tools: Tools = (),
) -> Dataset:
    """Loads the data set that `data` describes: reads, checks and encodes every row, or reads data.cache.

    Args:
      objective: a key of OBJECTIVES, which determines the kind of the rows.
      labels: names of the classes, in order; empty: those in the training data, if the objective has classes.
      kl_pairs: gives each row the completion of another one, too (kto_pairs.py).
      reply_tokens: positions of data.max_length that prompts leave for a reply.
      tools: schemas of functions that every row has.

    Raises:
      ValueError: problems of settings, files or rows. All problems of a file's rows are in one error, by line.
    """
    _check_eval_settings(data)
    tokenizer = with_template(tokenizer, data)
    source = _Source(data, tokenizer, objective, tuple(labels) or find_labels(data, objective), reply_tokens, tools)
    train, held_out = _prepare_train(source), _prepare_eval(source)
    if kl_pairs:
        train, held_out = ([_paired(split, seed, data) for split in splits] for splits in (train, held_out))
    parts, held_out_parts = _parts(train, _weights(data)), _parts(held_out, {})
    check_weights(parts)
    check_kinds([*parts, *held_out_parts])
    sequences = 0 if row_use(objective).kind == "text" else count_sequences([*parts, *held_out_parts])
    rows, longest = _mixture(data, parts, seed), max(part.longest for part in parts)
    eval_rows = _concatenate(held_out_parts, branching=rows.branching) if held_out else None
    per_step = accumulation * micro_batch_size
    padded = _padded_lengths(rows, data, per_step, longest)
    buckets = (max(pack_length(data.max_length), _rounded_up(longest)),) if data.packing else padded
    report = report_data(
        rows,
        [SourceReport(split.report, weight) for split, weight in zip(train, _weights(data).values(), strict=True)],
        combine_reports([split.report for split in held_out]) if held_out else None,
        _count_shared(train, held_out),
        data.max_length,
        buckets,
        per_step,
        tokenizer,
        side=truncated_side(data),
        parts=row_parts(objective, source.labels),
        packed=data.packing,
        sequences=sequences,
    )
    return Dataset(
        tokenizer=tokenizer,
        train=rows,
        eval=eval_rows,
        buckets=buckets,
        eval_buckets=_with_longest(padded, eval_rows),
        packed=data.packing,
        sequences=sequences,
        labels=source.labels,
        accumulation=accumulation,
        micro_batch_size=micro_batch_size,
        seed=seed,
        digest=rows.digest,
        report=report,
    )


def load_held_out(data: DataArgs, tokenizer: Tokenizer) -> TokenRows | None:
    """Loads the held-out rows of a run of supervised finetuning, as `load_dataset` does; None if it has none.

    Raises:
      ValueError: problems of files or rows.
    """
    source = _Source(data, with_template(tokenizer, data), "sft", ())
    splits = _prepare_eval(source)
    parts = _parts(splits, {})
    return _concatenate(parts, branching=any(part.rows.branching for part in parts)) if splits else None


def with_template(tokenizer: Tokenizer, data: DataArgs) -> Tokenizer:
    """Returns the tokenizer with the chat template, its arguments and its date that the settings give."""
    if data.chat_template is not None:
        tokenizer = with_chat_template(tokenizer, data.chat_template)
    if data.chat_template_kwargs:
        tokenizer = with_template_kwargs(tokenizer, data.chat_template_kwargs, "data.chat_template_kwargs")
    return with_template_date(tokenizer, data.template_date)


def _check_eval_settings(data: DataArgs) -> None:
    if data.eval is not None and data.eval_fraction > 0:
        raise ValueError(
            f"data.eval: found both data.eval ({data.eval}) and data.eval_fraction ({data.eval_fraction}), expected "
            "one. Remove one of them."
        )


def _padded_lengths(rows: TokenRows | Mixture, data: DataArgs, per_step: int, longest: int) -> tuple[int, ...]:
    """Returns the lengths that rows are padded to without packing.

    Args:
      longest: positions of the longest row of all epochs.
    """
    limit = max(data.max_length, longest)
    units = np.sum([count_units(rows.window_lengths(0, n), limit) for n in range(rows.windows)], axis=0)
    last = -(-longest // UNIT)
    units[last] = max(units[last], 1)  # files with weights below 1 may have it in another epoch
    return choose_buckets(units, per_step, data.buckets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prepared:
    """One split of one file as token rows."""

    path: str
    rows: TokenRows | StoredRows | PairedRows
    digest: str
    report: SplitReport
    hashes: Sequence[UInt64[np.ndarray, " _"]]


def _weights(data: DataArgs) -> dict[str, float]:
    """Returns each training file and its weight."""
    return data.train if isinstance(data.train, dict) else {data.train: 1.0}


class _Source(NamedTuple):
    """All that determines the rows of a data set. See `load_dataset`."""

    data: DataArgs
    tokenizer: Tokenizer
    objective: str
    labels: tuple[str, ...]
    reply_tokens: int = 0
    tools: Tools = ()


def _prepare_train(source: _Source) -> list[_Prepared]:
    data = source.data
    split = Split(data.eval_fraction, held_out=False) if data.eval_fraction else None
    return [_prepare(path, split, source, in_memory=data.window is None) for path in _weights(data)]


def _prepare_eval(source: _Source) -> list[_Prepared]:
    data = source.data
    if data.eval is not None:
        return [_prepare(data.eval, None, source, in_memory=True)]
    if not data.eval_fraction:
        return []
    split = Split(data.eval_fraction, held_out=True)
    return [_prepare(path, split, source, in_memory=True) for path in _weights(data)]


def _prepare(path: str, split: Split | None, source: _Source, *, in_memory: bool) -> _Prepared:
    data, tokenizer = source.data, source.tokenizer
    preparation = Preparation(
        path=path,
        row_format=data.format_of(path),
        split=split,
        hashed=data.eval is not None,
        tokenizer=tokenizer,
        data=data,
        objective=source.objective,
        labels=source.labels,
        reply_tokens=source.reply_tokens,
        tools=source.tools,
    )
    if data.cache is None:
        chunks = list(row_chunks(preparation))
        rows = check_ids(concatenate_rows([chunk.rows for chunk in chunks], (File(path),)), tokenizer.rows)
        counts = functools.reduce(RowCounts.__add__, [chunk.counts for chunk in chunks])
        return _Prepared(
            path=path,
            rows=rows,
            digest=rows.digest,
            report=report_split(path, chunks[-1].row_format, counts),
            hashes=[chunk.hashes for chunk in chunks],
        )
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


def _paired(split: _Prepared, seed: int, data: DataArgs) -> _Prepared:
    """Returns a split whose rows have the completions of others, too."""
    fraction = 0.0 if data.eval is not None else data.eval_fraction
    rows, shift, max_length = split.rows, kl_shift(split.path, len(split.rows), seed, fraction), data.max_length
    assert not isinstance(rows, PairedRows)
    if isinstance(rows, TokenRows):
        paired = pair_rows(rows, shift, max_length)
    else:
        paired = PairedRows(stored=rows, shift=shift, max_length=max_length)
    return dataclasses.replace(split, rows=paired, digest=paired_digest(split.digest, shift, max_length))


def _parts(splits: Sequence[_Prepared], weights: Mapping[str, float]) -> tuple[Part, ...]:
    return tuple(
        Part(path=split.path, rows=split.rows, weight=weights.get(split.path, 1.0), digest=split.digest)
        for split in splits
    )


def _mixture(data: DataArgs, parts: tuple[Part, ...], seed: int) -> TokenRows | Mixture:
    """Returns the training rows: those of one file in memory in its order, otherwise a mixture of files."""
    if len(parts) == 1 and parts[0].weight == 1 and isinstance(parts[0].rows, TokenRows):
        return parts[0].rows
    return Mixture(parts=parts, size=data.window, seed=seed)


def _concatenate(parts: tuple[Part, ...], *, branching: bool) -> TokenRows:
    """Returns the rows of all files, each once; `branching` if other rows are trees."""
    rows = Mixture(parts=parts, size=None, seed=0).window(0, 0).rows
    return with_branches(rows) if branching else rows


def _count_shared(train: Sequence[_Prepared], held_out: Sequence[_Prepared]) -> int:
    """Returns the number of held-out rows that are also trained on."""
    hashes = np.concatenate([np.zeros(0, np.uint64), *(chunk for split in held_out for chunk in split.hashes)])
    return shared_rows((chunk for split in train for chunk in split.hashes), hashes)


def _with_longest(buckets: tuple[int, ...], held_out: TokenRows | None) -> tuple[int, ...]:
    """Returns the training buckets, and one more if a held-out row is longer than all of them."""
    longest = 0 if held_out is None else int(held_out.lengths.max())
    return buckets if longest <= buckets[-1] else (*buckets, _rounded_up(longest))


def _rounded_up(length: int) -> int:
    """Returns the smallest padded length of a row of `length` positions."""
    return -(-length // UNIT) * UNIT


def padding_id(tokenizer: Tokenizer) -> int:
    """Returns a padding id. Any id works, because padding is masked by length."""
    named = (tokenizer.pad_id, tokenizer.eos_id, 0)
    return next(token for token in named if token is not None)
