"""The way of a file's rows to token rows, some at a time, so that a file need not fit into memory.

read -> detect_format the form -> check -> hold out by hash -> encode with masks -> fit lengths
"""

import dataclasses
import hashlib
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import tokenizers
from jaxtyping import UInt64

from qlora_jax.config.schema import DataArgs
from qlora_jax.data.encoder import (
    CHUNK,
    ChunkEncodings,
    ChunkTexts,
    Encoder,
    expand_examples,
    make_encoder,
    prefetch_map,
    row_problems,
)
from qlora_jax.data.formats.detect import detect_format
from qlora_jax.data.formats.registry import RowFormat
from qlora_jax.data.holdout import Split, check_splits, content_hash
from qlora_jax.data.lengths import Limits, fit_lengths, nothing_left_message
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import (
    BrokenRow,
    Problem,
    Row,
    content_digest,
    no_rows_message,
    raise_problems,
    stream_rows,
)
from qlora_jax.data.row_counts import RowCounts
from qlora_jax.data.row_store import RowChunk
from qlora_jax.data.rows import TokenRows, token_rows
from qlora_jax.data.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is made of one file.

    Fields:
      form: a form's name, or auto.
      side: which of its rows are taken; None: all.
      hashed: whether the hashes of its rows' content are wanted.
    """

    path: str
    row_format: str
    side: Split | None
    hashed: bool
    tokenizer: Tokenizer
    data: DataArgs

    @property
    def limits(self) -> Limits:
        """How long rows may be."""
        return Limits(
            max_length=self.data.max_length,
            overlong=self.data.overlong,
            source=self.data.source_max_length,
            target=self.data.target_max_length,
            bos_id=self.tokenizer.bos_id if self.tokenizer.add_bos_token else None,
        )

    def key(self) -> str:
        """SHA-256 of all that the token rows follow from: content, settings, tokenizer and template, our own code."""
        tokenizer = self.tokenizer
        template = tokenizer.chat_template or ""
        settings = [
            content_digest(self.path),
            self.row_format,
            self.side,
            self.hashed,
            dataclasses.astuple(self.limits),
            self.data.learn,
            dict(tokenizer.special_tokens),
            tokenizer.add_bos_token,
            template,
            time.strftime("%x") if "strftime_now" in template else "",  # templates may write the day
            tokenizers.__version__,
            jinja2.__version__,
            Path(self.path).suffixes,  # they tell how fields are told apart
        ]
        digest = hashlib.sha256(json.dumps(settings).encode())
        digest.update(tokenizer.exported.encode())
        for file in sorted(Path(__file__).parent.rglob("*.py")):
            digest.update(file.read_bytes())
        return digest.hexdigest()


class _Read(NamedTuple):
    """Some rows, read, checked and taken apart."""

    texts: ChunkTexts
    counts: RowCounts
    hashes: UInt64[np.ndarray, " read"]


def row_chunks(wanted: Preparation, *, in_parts: bool = False) -> Iterator[RowChunk]:
    """The file's token rows, a chunk of its rows at a time.

    What comes before an error has been yielded already: it is for nothing.

    Raises:
      ValueError: whatever is wrong with the rows, told by line, all at once; no row that can be learned from.
    """
    reading = _Reading(wanted, in_parts)
    whole = RowCounts()
    for read, encodings in prefetch_map(reading.encode, reading.chunks()):
        assert reading.encoder is not None
        places, encoded = reading.encoder.encoded(read.texts, encodings, reading.problems)
        fitted = fit_lengths(encoded, places, wanted.limits)
        reading.problems += fitted.problems
        rows = token_rows(wanted.path, fitted.rows, fitted.places)
        counted = RowCounts(truncated=fitted.truncated, overlong=fitted.overlong, unsupervised=fitted.unsupervised)
        counts = read.counts + counted + _of_encoded(encoded, fitted.rows) + _of_rows(rows, wanted.tokenizer)
        whole += counts
        yield RowChunk(rows, counts, read.hashes, reading.format_name)
    raise_problems(wanted.path, sorted(reading.problems), reading.seen)
    if not reading.seen:
        raise ValueError(no_rows_message(wanted.path))
    if wanted.side is not None:
        sides = (reading.others, whole.rows) if wanted.side.held_out else (whole.rows, reading.others)
        check_splits(wanted.path, wanted.side.fraction, *sides)
    if not whole.kept:
        raise ValueError(nothing_left_message(wanted.path, whole.rows, whole.overlong, wanted.data.max_length))


class _Reading:
    """Where the reading of a file stands."""

    def __init__(self, wanted: Preparation, in_parts: bool):
        self.problems: list[Problem] = []
        self.seen = self.others = 0  # rows of the file, and examples of the other side
        self.encoder: Encoder | None = None
        self.format_name = ""
        self._wanted, self._in_parts = wanted, in_parts
        self._format: RowFormat | None = None
        self._examples = 0

    def chunks(self) -> Iterator[_Read]:
        """Rows by chunks; those that are wrong are left out and told in `problems`."""
        for chunk in itertools.batched(stream_rows(self._wanted.path, in_parts=self._in_parts), CHUNK):
            self.seen += len(chunk)
            self.problems += [(found.place, found.problem) for found in chunk if isinstance(found, BrokenRow)]
            rows = [found for found in chunk if isinstance(found, Row)]
            if rows:
                yield self._take(rows)

    def encode(self, read: _Read) -> ChunkEncodings:
        """The tokenizer's own work."""
        assert self.encoder is not None
        return self.encoder.encodings(read.texts)

    def _take(self, rows: list[Row]) -> _Read:
        row_format = self._format = self._format or detect_format(self._wanted.path, rows, self._wanted.row_format)
        wrong = row_problems(rows, row_format)
        self.problems += wrong
        places = {place for place, _ in wrong}
        fit = [row for row in rows if row.place not in places] if wrong else rows
        examples, row_format = expand_examples(fit, row_format, self._examples)
        self._examples += len(examples)
        if self.encoder is None:
            self.encoder, self.format_name = self._make_encoder(row_format), row_format.name
        chosen, hashes = self._choose(examples, row_format)
        texts = self.encoder.texts(chosen, self.problems)
        columns = dict.fromkeys(name for row in chosen for name in row.data)
        special = self._wanted.tokenizer.special_text
        names = (*row_format.required, *row_format.optional)
        spelled = sum([any([_spells(special, row.data.get(name)) for name in names]) for row in chosen])
        counts = RowCounts(rows=len(chosen), special_text=spelled, columns=tuple(columns))
        return _Read(texts, counts, hashes)

    def _make_encoder(self, row_format: RowFormat) -> Encoder:
        limits, wanted = self._wanted.limits, self._wanted
        apart = limits.source is not None or limits.target is not None
        return make_encoder(row_format, wanted.tokenizer, wanted.data.learn, one_answer=apart)

    def _choose(self, rows: Sequence[Row], row_format: RowFormat) -> tuple[Sequence[Row], UInt64[np.ndarray, " read"]]:
        """The rows of the side that is wanted, and the hashes of their content where these are wanted."""
        side, hashed = self._wanted.side, self._wanted.hashed
        if side is None and not hashed:
            return rows, np.zeros(0, np.uint64)
        hashes = [content_hash(row_format, row.data) for row in rows]
        taken = [side is None or side.contains(one) for one in hashes]
        self.others += len(rows) - sum(taken)
        chosen = list(itertools.compress(rows, taken))
        return chosen, np.array(list(itertools.compress(hashes, taken)) if hashed else [], np.uint64)


def _spells(special: re.Pattern[str], value: Any) -> bool:
    """Whether a text in `value`, or in what it holds, has a special token in it."""
    if isinstance(value, str):
        return special.search(value) is not None
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any([_spells(special, one) for one in inner])


def _of_encoded(encoded: Sequence[EncodedRow], kept: Sequence[EncodedRow]) -> RowCounts:
    return RowCounts(
        lengths=dict(Counter([len(row.ids) for row in encoded])),
        cut=sum([row.cut for row in kept]),
        lossy=sum([row.lossy for row in kept]),
    )


def _of_rows(rows: TokenRows, tokenizer: Tokenizer) -> RowCounts:
    bos_id = -1 if tokenizer.bos_id is None else tokenizer.bos_id
    first, second = (rows.ids[rows.starts[:-1] + place] == bos_id for place in (0, 1))
    supervised = rows.supervised.copy()
    supervised[rows.starts[:-1]] = False  # a row's first id is no target
    return RowCounts(
        kept=len(rows),
        doubled_bos=int((first & second).sum()),
        without_bos=int((~first).sum()) if tokenizer.add_bos_token else 0,
        tokens=int(rows.lengths.sum()),
        supervised=int(supervised.sum()),
        new_tokens=_count(rows.ids, tokenizer.new_ids),
    )


def _count(ids: np.ndarray, wanted: Sequence[int]) -> dict[int, int]:
    """How often `ids` has each of those that are wanted; of those that it has."""
    found, counts = np.unique(ids[np.isin(ids, wanted)], return_counts=True) if wanted else ((), ())
    return {int(token): int(count) for token, count in zip(found, counts, strict=True)}
