"""load_dataset: from the settings of a run to batches and a report. The way of a row, in the order it goes.

read -> recognise the form -> check -> hold out by hash -> encode with masks -> fit lengths -> buckets -> batches
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence

from qlora_jax.config.schema import DataArgs
from qlora_jax.data.batches import START, Batch, eval_batches, train_batches
from qlora_jax.data.buckets import UNIT, choose_buckets
from qlora_jax.data.encode_rows import check_rows, encode_rows, examples_of
from qlora_jax.data.formats import Form
from qlora_jax.data.holdout import hold_out, shared_rows
from qlora_jax.data.lengths import Limits, fit_lengths
from qlora_jax.data.packing import pack_places
from qlora_jax.data.readers import Row, read_rows
from qlora_jax.data.recognise import recognise
from qlora_jax.data.report import DataReport, SideReport, report_data, report_side
from qlora_jax.data.rows import TokenRows, token_rows
from qlora_jax.data.tokenizer import Tokenizer, with_chat_template


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
    train: TokenRows
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
        digest = hashlib.sha256(repr(order).encode())
        for array in (self.train.ids, self.train.supervised, self.train.starts, self.train.numbers):
            digest.update(array.tobytes())
        return digest.hexdigest()

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
    """The data set that `data` describes, every row read, checked and encoded.

    Raises:
      ValueError: whatever is wrong with the files, told by file and line, all of one kind at once.
    """
    if data.chat_template is not None:
        tokenizer = with_chat_template(tokenizer, data.chat_template)
    sides = _sides(data)
    train, train_side = _encode_side(sides[0], tokenizer, data)
    held, held_side = _encode_side(sides[1], tokenizer, data) if len(sides) > 1 else (None, None)
    shared = shared_rows(sides[0].form, sides[0].rows, sides[1].form, sides[1].rows) if len(sides) > 1 else 0
    padded = choose_buckets(train.places, accumulation * micro_batch_size, data.buckets)
    buckets = (pack_places(data.max_length),) if data.packing else padded
    report = report_data(
        train,
        (train_side, held_side),
        shared,
        data.max_length,
        buckets,
        accumulation * micro_batch_size,
        tokenizer,
        packed=data.packing,
    )
    return Dataset(
        tokenizer=tokenizer,
        train=train,
        eval=held,
        buckets=buckets,
        eval_buckets=_with_longest(padded, held),
        packed=data.packing,
        accumulation=accumulation,
        micro_batch_size=micro_batch_size,
        seed=seed,
        report=report,
    )


@dataclasses.dataclass(frozen=True)
class _Side:
    """Checked rows of one form from one file."""

    path: str
    form: Form
    rows: Sequence[Row]


def _sides(data: DataArgs) -> list[_Side]:
    """The training side and, if anything is held out, the other."""
    if data.eval is not None and data.eval_fraction > 0:
        raise ValueError(
            f"data.eval ({data.eval}) and data.eval_fraction ({data.eval_fraction}) are both set; "
            "held-out rows come from one of them"
        )
    train = _read(data.train, data.format)
    if data.eval is not None:
        return [train, _read(data.eval, data.format)]
    if data.eval_fraction == 0:
        return [train]
    parts = hold_out(train.path, train.rows, train.form, data.eval_fraction)
    return [dataclasses.replace(train, rows=part) for part in parts]


def _read(path: str, form_name: str) -> _Side:
    rows = read_rows(path)
    form = recognise(path, rows, form_name)
    check_rows(path, rows, form)
    rows, form = examples_of(rows, form)
    return _Side(path, form, rows)


def _encode_side(side: _Side, tokenizer: Tokenizer, data: DataArgs) -> tuple[TokenRows, SideReport]:
    limits = _limits(data, tokenizer)
    apart = limits.source is not None or limits.target is not None
    encoded = encode_rows(side.path, side.rows, side.form, tokenizer, data.learn, one_answer=apart)
    fitted = fit_lengths(side.path, encoded, [row.place for row in side.rows], limits)
    rows = token_rows(side.path, fitted.rows, fitted.places)
    special = sum(bool(tokenizer.special_text.search(side.form.content(row.data))) for row in side.rows)
    return rows, report_side(rows, encoded, fitted, side.form, side.rows, special, tokenizer)


def _limits(data: DataArgs, tokenizer: Tokenizer) -> Limits:
    return Limits(
        max_length=data.max_length,
        overlong=data.overlong,
        source=data.source_max_length,
        target=data.target_max_length,
        bos_id=tokenizer.bos_id if tokenizer.add_bos_token else None,
    )


def _with_longest(buckets: tuple[int, ...], held: TokenRows | None) -> tuple[int, ...]:
    """The training buckets, and one more where a held-out row is longer than all of them."""
    longest = 0 if held is None else int(held.places.max())
    return buckets if longest <= buckets[-1] else (*buckets, -(-longest // UNIT) * UNIT)


def _padding(tokenizer: Tokenizer) -> int:
    """Any id will do: padding is masked by length."""
    named = (tokenizer.pad_id, tokenizer.eos_id, 0)
    return next(token for token in named if token is not None)
