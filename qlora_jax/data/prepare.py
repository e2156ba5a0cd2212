"""Turns the rows of a file into token rows, chunk by chunk, so a file need not fit into memory.

read -> detect the format -> check -> hold out by hash -> encode with masks -> fit lengths
"""

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import UInt64

from qlora_jax.config.schema import DataArgs
from qlora_jax.data.bad_rows import all_bad_message, count_reasons, first_rows
from qlora_jax.data.branch_tree import longest_text
from qlora_jax.data.branches.encoder import make_branch_encoder
from qlora_jax.data.branches.truncation import fit_branches
from qlora_jax.data.encoder import (
    CHUNK,
    Finish,
    RowEncoder,
    expand_examples,
    make_encoder,
    prefetch_map,
    row_problems,
)
from qlora_jax.data.formats.columns import check_names_exist, count_lookalikes, rename_columns
from qlora_jax.data.formats.detect import detect_format
from qlora_jax.data.formats.registry import format_of, optional_columns
from qlora_jax.data.formats.row_format import RowFormat
from qlora_jax.data.formats.turn_fields import Tools
from qlora_jax.data.holdout import Split, check_splits, content_hash
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import (
    BrokenRow,
    Place,
    Problem,
    Row,
    content_digest,
    no_rows_message,
    raise_problems,
    stream_rows,
)
from qlora_jax.data.row_counts import RowCounts, count_branched, count_texts
from qlora_jax.data.row_kinds import RowUse, row_use
from qlora_jax.data.row_store import RowChunk
from qlora_jax.data.rows import TokenRows, token_rows
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.data.truncation import FittedRows, LengthLimits, fit_lengths, nothing_left_message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """Settings that turn one file into token rows.

    Fields:
      row_format: name of the format, or "auto".
      split: the training rows or the held-out rows. None: all rows.
      hashed: True if the content hashes of its rows are needed.
      objective: a key of OBJECTIVES, which determines the kind of the rows.
      labels: names of the classes, in order.
      reply_tokens: positions of data.max_length that prompts leave for a reply.
      tools: schemas of functions that every row has.
    """

    path: str
    row_format: str
    split: Split | None
    hashed: bool
    tokenizer: Tokenizer
    data: DataArgs
    objective: str = "sft"
    labels: tuple[str, ...] = ()
    reply_tokens: int = 0
    tools: Tools = ()

    @property
    def use(self) -> RowUse:
        """The use that the objective makes of the rows."""
        return row_use(self.objective)

    @property
    def limits(self) -> LengthLimits:
        """Limits on the length of rows."""
        return LengthLimits(
            max_length=self.data.max_length - max(self.reply_tokens - 1, 0),  # a filler follows the prompt
            overlong=self.data.overlong,
            source=self.data.source_max_length,
            target=self.data.target_max_length,
            bos_id=self.tokenizer.bos_id if self.tokenizer.add_bos_token else None,
        )

    def key(self) -> str:
        """Returns SHA-256 of all that determines the token rows: content, settings, tokenizer, template, our code."""
        tokenizer = self.tokenizer
        template = tokenizer.chat_template or ""
        settings = [
            content_digest(self.path),
            self.row_format if self.row_format == "auto" else [self.row_format, format_of(self.row_format).version],
            self.data.columns_of(self.path),
            self.data.bad_rows,
            self.split,
            self.hashed,
            dataclasses.astuple(self.limits),
            self.data.learn,
            self.use,
            self.labels,
            dict(tokenizer.special_tokens),
            tokenizer.add_bos_token,
            template,
            dict(tokenizer.chat_template_kwargs),
            f"{tokenizer.template_date or datetime.date.today()}" if tokenizer.writes_date else "",
            tokenizers.__version__,
            importlib.metadata.version("jinja2"),
            [*self.tools],
            Path(self.path).suffixes,  # the delimiter of columns depends on them
        ]
        digest = hashlib.sha256(json.dumps(settings).encode())
        digest.update(tokenizer.exported.encode())
        digest.update(code_digest())
        return digest.hexdigest()


@functools.cache
def code_digest() -> bytes:
    """Returns SHA-256 of the code that makes rows."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.digest()


class _CheckedChunk(NamedTuple):
    """A chunk of rows, read and checked.

    Fields:
      encode: runs the tokenizer.
    """

    encode: Callable[[], Finish]
    counts: RowCounts
    hashes: UInt64[np.ndarray, " read"]

    def run(self) -> Finish:
        """Runs the tokenizer."""
        return self.encode()


def row_chunks(preparation: Preparation) -> Iterator[RowChunk]:
    """Yields the file's token rows in chunks. Discard the chunks if an error follows them.

    Raises:
      ValueError: all problems of all rows, by line, unless data.bad_rows drops these rows; or no row has anything to
        learn.
    """
    _check_settings(preparation)
    preparation.tokenizer.prepare_rendering()
    reader = _FileReader(preparation)
    whole = RowCounts()
    for checked, finish in prefetch_map(_CheckedChunk.run, reader.chunks()):
        places, encoded = finish(reader.problems)
        fitted, equal = _fit(preparation, encoded, places)
        reader.errors += fitted.problems
        rows = token_rows(preparation.path, fitted.rows, fitted.places)
        counted = RowCounts(
            truncated=fitted.truncated,
            overlong=fitted.overlong,
            unsupervised=fitted.unsupervised,
            truncated_equal=equal,
            lost_branches=fitted.lost_branches,
        )
        counts = (
            checked.counts + counted + _count_encoded(encoded, fitted.rows) + _count_kept(rows, preparation.tokenizer)
        )
        if preparation.use.kind != "text":
            counts += count_texts(preparation.use, encoded, preparation.labels)
        counts += reader.take_bad() + count_branched(fitted.rows, fitted.places)
        whole += counts
        yield RowChunk(rows, counts, checked.hashes, reader.format_name)
    if (last := reader.take_bad()).bad:
        whole += last
        yield RowChunk(token_rows(preparation.path, [], []), last, np.zeros(0, np.uint64), reader.format_name)
    _check_whole(preparation, reader, whole)


def _fit(preparation: Preparation, encoded: Sequence[EncodedRow], places: Sequence[Place]) -> tuple[FittedRows, int]:
    """Returns the rows that fit, and the number of pairs dropped because truncation made their answers equal."""
    if preparation.use.kind == "text":
        return fit_lengths(encoded, places, preparation.limits), 0
    return fit_branches(encoded, places, preparation.limits, preparation.use)


def _check_settings(preparation: Preparation) -> None:
    """Raises ValueError for settings that apply to rows of one text only."""
    if preparation.use.kind == "text":
        return
    data, plain = preparation.data, DataArgs(train=preparation.path)
    names = ("learn", "source_max_length", "target_max_length")
    used = [f"data.{name} {getattr(data, name)}" for name in names if getattr(data, name) != getattr(plain, name)]
    if used:
        raise ValueError(
            f"{', '.join(used)}: only the objective sft uses it (found objective {preparation.objective}). Remove it."
        )


def _check_whole(preparation: Preparation, reader: "_FileReader", whole: RowCounts) -> None:
    """Raises ValueError for the problems of a file that was read to its end."""
    drop = ", or set data.bad_rows=drop" if len(reader.problems) < reader.seen else ""
    fix = f"Correct the rows{drop}." if reader.problems else ""  # others have a fix in their text
    raise_problems(preparation.path, sorted(reader.problems + reader.errors), reader.seen, fix)
    if not reader.seen:
        raise ValueError(no_rows_message(preparation.path))
    if not whole.rows and not reader.others:
        raise ValueError(all_bad_message(preparation.path, reader.seen, whole.bad_reasons, whole.bad_rows))
    check_names_exist(preparation.path, reader.names, reader.columns, "data.columns")
    if preparation.split is not None:
        sizes = (reader.others, whole.rows) if preparation.split.held_out else (whole.rows, reader.others)
        check_splits(preparation.path, preparation.split.fraction, *sizes)
    if not whole.kept:
        raise ValueError(
            nothing_left_message(preparation.path, whole.rows, whole.overlong, preparation.data.max_length)
        )


class _FileReader:
    """State of reading a file."""

    def __init__(self, preparation: Preparation):
        self.problems: list[Problem] = []  # in rows that data.bad_rows may drop
        self.errors: list[Problem] = []  # in other rows
        self.seen = self.others = 0  # rows of the file, and examples of the other split
        self.names = preparation.data.columns_of(preparation.path)
        self.columns: dict[str, None] = {}
        self.encoder: RowEncoder | None = None
        self.format_name = ""
        self._preparation = preparation
        self._format: RowFormat | None = None
        self._examples = 0

    def chunks(self) -> Iterator[_CheckedChunk]:
        """Yields the file's rows in chunks. Broken rows are skipped and added to `problems`."""
        for chunk in itertools.batched(stream_rows(self._preparation.path), CHUNK):
            self.seen += len(chunk)
            broken = [found for found in chunk if isinstance(found, BrokenRow)]
            self.errors += [(found.place, found.problem) for found in broken if found.ends_file]
            self._add_bad([(found.place, found.problem) for found in broken if not found.ends_file])
            rows = self._with_tools(self._rename([found for found in chunk if isinstance(found, Row)]))
            if rows:
                yield self._check(rows)

    def take_bad(self) -> RowCounts:
        """Counts the rows with problems if they are dropped, and forgets them."""
        if self._preparation.data.bad_rows == "error":
            return RowCounts()
        problems, self.problems = self.problems, []
        return RowCounts(bad_reasons=count_reasons(problems), bad_rows=first_rows(problems))

    def _add_bad(self, problems: Sequence[Problem]) -> None:
        """Adds rows that are in neither split. If they are dropped, the report of the training rows lists them."""
        split, drops = self._preparation.split, self._preparation.data.bad_rows == "drop"
        if not (drops and split is not None and split.held_out):
            self.problems += problems

    def _rename(self, rows: list[Row]) -> list[Row]:
        """Returns the rows with our names of their columns. Rows without them are added to `problems`."""
        if not self.names:
            return rows
        renamed: list[Row] = []
        problems: list[Problem] = []
        optional = optional_columns(self._preparation.row_format)
        for row in rows:
            try:
                columns = rename_columns(row.data, self.names, "data.columns", optional)
                renamed.append(row._replace(data=columns))
            except ValueError as error:
                problems.append((row.place, str(error)))
        self._add_bad(problems)
        self.columns |= dict.fromkeys(name for row in renamed for name in row.data)
        return renamed

    def _with_tools(self, rows: list[Row]) -> list[Row]:
        """Returns the rows with the tools of all rows. Rows that have others are added to `problems`."""
        if not self._preparation.tools:
            return rows
        own = {row.place for row in rows if row.data.get("tools") or row.data.get("functions")}
        self._add_bad([(place, "has tools in a run with --tool or --environment. Remove them") for place in own])
        tools = {"tools": [*self._preparation.tools]}
        return [row._replace(data=row.data | tools) for row in rows if row.place not in own]

    def _check(self, rows: list[Row]) -> _CheckedChunk:
        row_format = self._format = self._format or detect_format(
            self._preparation.path,
            rows,
            self._preparation.row_format,
            names=self.names,
            objective=self._preparation.objective,
        )
        wrong = row_problems(rows, row_format)
        self._add_bad(wrong)
        places = {place for place, _ in wrong}
        fit = [row for row in rows if row.place not in places] if wrong else rows
        examples, row_format = expand_examples(fit, row_format, self._examples)
        self._examples += len(examples)
        if self.encoder is None:
            self.encoder, self.format_name = self._make_encoder(row_format), row_format.name
        chosen, hashes = self._choose(examples, row_format)
        encode = self.encoder.begin(chosen, self.problems)
        columns = dict.fromkeys(name for row in chosen for name in row.data)
        special = self._preparation.tokenizer.special_text
        names = (*row_format.required, *row_format.optional)
        with_special = sum([any([_contains_special(special, row.data.get(name)) for name in names]) for row in chosen])
        lookalikes = {} if self.encoder.chat else count_lookalikes(chosen, row_format)
        counts = RowCounts(special_text=with_special, columns=tuple(columns), lookalikes=lookalikes)
        return _CheckedChunk(encode, counts, hashes)

    def _make_encoder(self, row_format: RowFormat) -> RowEncoder:
        limits, preparation = self._preparation.limits, self._preparation
        if preparation.use.kind != "text":
            return make_branch_encoder(row_format, preparation.tokenizer, preparation.use, preparation.labels)
        one_answer = limits.source is not None or limits.target is not None
        return make_encoder(row_format, preparation.tokenizer, preparation.data.learn, one_answer=one_answer)

    def _choose(self, rows: Sequence[Row], row_format: RowFormat) -> tuple[Sequence[Row], UInt64[np.ndarray, " read"]]:
        """Returns the rows of the split, and their content hashes if these are needed."""
        split, hashed = self._preparation.split, self._preparation.hashed
        if split is None and not hashed:
            return rows, np.zeros(0, np.uint64)
        hashes = [content_hash(row_format, row.data) for row in rows]
        taken = [split is None or split.contains(one) for one in hashes]
        self.others += len(rows) - sum(taken)
        chosen = list(itertools.compress(rows, taken))
        return chosen, np.array(list(itertools.compress(hashes, taken)) if hashed else [], np.uint64)


def _contains_special(special: re.Pattern[str], value: object) -> bool:
    """Returns True if `value`, or a text inside it, contains a special token."""
    if isinstance(value, str):
        return special.search(value) is not None
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any([_contains_special(special, one) for one in inner])


def _count_encoded(encoded: Sequence[EncodedRow], kept: Sequence[EncodedRow]) -> RowCounts:
    return RowCounts(
        rows=len(encoded),
        lengths=dict(Counter([longest_text(len(row.ids), row.branches) for row in encoded])),
        cut=sum([row.cut for row in kept]),
        lost_ends=sum([row.lost_ends for row in kept]),
        lossy=sum([row.lossy for row in kept]),
    )


def _count_kept(rows: TokenRows, tokenizer: Tokenizer) -> RowCounts:
    bos_id = -1 if tokenizer.bos_id is None else tokenizer.bos_id
    first, second = (rows.ids[rows.starts[:-1] + offset] == bos_id for offset in (0, 1))
    supervised = rows.supervised.copy()
    supervised[rows.starts[:-1]] = False  # no position predicts a row's first id
    return RowCounts(
        kept=len(rows),
        doubled_bos=int((first & second).sum()),
        without_bos=int((~first).sum()) if tokenizer.add_bos_token else 0,
        tokens=int(rows.lengths.sum()),
        supervised=int(supervised.sum()),
        new_tokens=_count(rows.ids, tokenizer.new_ids),
    )


def _count(ids: np.ndarray, wanted: Sequence[int]) -> dict[int, int]:
    """Returns how often each wanted id occurs in `ids`, if it occurs."""
    found, counts = np.unique(ids[np.isin(ids, wanted)], return_counts=True) if wanted else ((), ())
    return {int(token): int(count) for token, count in zip(found, counts, strict=True)}
