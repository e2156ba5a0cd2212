"""Encodes rows of a known format to ids and masks; Python prepares one chunk while the tokenizer works on another."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import tokenizers

from qlora_jax.data.formats.registry import FORMATS, Columns, RowFormat
from qlora_jax.data.formats.tool_calls import read_tools
from qlora_jax.data.loss_mask.by_bytes import encode_by_bytes
from qlora_jax.data.loss_mask.by_offsets import encode_segments
from qlora_jax.data.loss_mask.reference import EncodedRow, Learn
from qlora_jax.data.loss_mask.shared_prefix import shared_prefix
from qlora_jax.data.loss_mask.span_cache import make_segmenter
from qlora_jax.data.loss_mask.spans import Segment
from qlora_jax.data.readers.files import Place, Problem, Row, raise_problems
from qlora_jax.data.tokenizer.tokenizer import Tokenizer

# Rows per chunk. The encodings of a whole data set would take about 100 bytes per token; in smaller chunks the
# tokenizer's threads wait for Python's lock more often.
CHUNK = 2048


class ChunkEncodings(NamedTuple):
    """What the tokenizer made of texts: the ids that they all begin with, and of each what follows."""

    head: list[int]
    texts: Sequence[tokenizers.Encoding]


def row_problems(rows: Sequence[Row], form: RowFormat) -> list[Problem]:
    """Every row that does not fit the form or holds no assistant text."""
    problems = [(row.place, "; ".join(form.check(row.data))) for row in rows]
    return [(place, problem) for place, problem in problems if problem]


def check_rows(path: str, rows: Sequence[Row], form: RowFormat) -> None:
    """Raises one ValueError that names every row that does not fit the form or holds no assistant text."""
    raise_problems(path, row_problems(rows, form), len(rows))


def expand_examples(rows: Sequence[Row], form: RowFormat, first: int = 0) -> tuple[Sequence[Row], RowFormat]:
    """The (checked) rows' examples, numbered from `first`, and their form: a row of some forms holds several."""
    if form.examples is None:
        return rows, form
    lines = [(row.place.line, columns) for row in rows for columns in form.examples(row.data)]
    examples = [Row(Place(line, number), columns) for number, (line, columns) in enumerate(lines, start=first)]
    return examples, dataclasses.replace(FORMATS[form.example], name=form.name)


class ChunkTexts(NamedTuple):
    """Rows taken apart, ready to be encoded."""

    places: list[Place]
    segments: list[list[Segment]]
    texts: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """What makes ids and masks of rows of one form, in three steps, of which the middle one takes the time.

    A row is a conversation where the tokenizer has a chat template (which writes its own bos if it wants one), else
    plain text, which starts with bos where the tokenizer asks for it (never with two) and ends with eos, which is
    supervised. Byte-level tokenizers encode prompt and answer of plain text apart: a prompt often ends with a space
    that would else be in the answer's first token.
    """

    tokenizer: Tokenizer
    learn: Learn
    chat: bool
    segment: Callable[[Columns], list[Segment]]

    @property
    def _apart(self) -> bool:
        """Whether each segment is encoded by itself."""
        return not self.chat and self.tokenizer.is_byte_level

    def texts(self, rows: Sequence[Row], problems: list[Problem]) -> ChunkTexts:
        """The rows' segments; rows whose spans can't be exact are left out and told in `problems`."""
        made = ChunkTexts([], [], [])
        for row in rows:
            try:
                segments = self.segment(row.data)
                text = _encodable("".join([piece.text for piece in segments]))
            except ValueError as error:
                problems.append((row.place, str(error)))
                continue
            made.places.append(row.place)
            made.segments.append(segments)
            made.texts.append(text)
        return made

    def encodings(self, texts: ChunkTexts) -> ChunkEncodings:
        """The tokenizer's own work, which holds no lock of Python's."""
        if self.tokenizer.byte_lengths is None:
            return ChunkEncodings([], self.tokenizer.encode_spans(texts.texts))
        if self._apart:
            pieces = [piece.text for pieces in texts.segments for piece in pieces]
            return ChunkEncodings([], self.tokenizer.encode_fast(pieces))
        head, ids = shared_prefix(self.tokenizer, texts.texts)
        return ChunkEncodings(ids, self.tokenizer.encode_fast([text[len(head) :] for text in texts.texts]))

    def encoded(
        self, texts: ChunkTexts, encodings: ChunkEncodings, problems: list[Problem]
    ) -> tuple[list[Place], list[EncodedRow]]:
        """Where the rows stand, and what they became; those that fail are left out and told in `problems`."""
        found: list[EncodedRow | None] = [None] * len(texts.places)
        spans = encodings.texts
        if self.tokenizer.byte_lengths is not None:
            found = self._by_bytes(texts, encodings)
            spans = self.tokenizer.encode_spans(_left(texts.texts, found))
        for row, pieces, encoding in zip(
            _left(range(len(found)), found), _left(texts.segments, found), spans, strict=True
        ):
            try:
                found[row] = encode_segments(self.tokenizer, pieces, encoding, self.learn)
            except ValueError as error:
                problems.append((texts.places[row], str(error)))
        places = [place for place, row in zip(texts.places, found, strict=True) if row is not None]
        rows = [row for row in found if row is not None]
        return places, rows if self.chat else [_framed(row, self.tokenizer) for row in rows]

    def _by_bytes(self, texts: ChunkTexts, encodings: ChunkEncodings) -> list[EncodedRow | None]:
        """The rows of which bytes tell enough."""
        lengths, round_trips = self.tokenizer.byte_lengths, self.tokenizer.round_trips
        assert lengths is not None
        ids = [encodings.head + encoding.ids for encoding in encodings.texts]
        if self._apart:
            pieces = iter(ids)
            ids = [[*itertools.chain.from_iterable(itertools.islice(pieces, len(row)))] for row in texts.segments]
        found = encode_by_bytes(lengths, texts.segments, ids, self.learn)
        return [row if round_trips(text) else None for text, row in zip(texts.texts, found, strict=True)]


def make_encoder(
    form: RowFormat, tokenizer: Tokenizer, learn: Learn = "assistant", *, one_answer: bool = False
) -> Encoder:
    """The encoder of a form.

    Args:
      learn: what the loss sees: every answer, the last of a row alone, or all of it.
      one_answer: rows with more than one answer are problems, since source and target can't be told apart.

    Raises:
      ValueError: a tokenizer that lacks what the form needs.
    """
    chat = form.messages is not None and tokenizer.chat_template is not None
    segment = _conversations(form, tokenizer) if chat else _plain(form, tokenizer)
    return Encoder(tokenizer=tokenizer, learn=learn, chat=chat, segment=_checked(segment, learn, one_answer))


def prefetch_map[A, B](function: Callable[[A], B], items: Iterable[A]) -> Iterator[tuple[A, B]]:
    """(item, function(item)) of each item, in order; a thread works on one while the one before is made use of."""
    with ThreadPoolExecutor(1) as pool:
        before: tuple[A, Future[B]] | None = None
        for item in items:
            begun = item, pool.submit(function, item)
            if before is not None:
                yield before[0], before[1].result()
            before = begun
        if before is not None:
            yield before[0], before[1].result()


def encode_rows(path: str, rows: Sequence[Row], form: RowFormat, tokenizer: Tokenizer) -> list[EncodedRow]:
    """Ids and mask of each (checked) row, every answer learned.

    Raises:
      ValueError: rows whose spans can't be exact, or a tokenizer that lacks what the form needs.
    """
    encoder, problems = make_encoder(form, tokenizer), []
    chunks = (encoder.texts(chunk, problems) for chunk in itertools.batched(rows, CHUNK))
    encoded = [
        row
        for texts, encodings in prefetch_map(encoder.encodings, chunks)
        for row in encoder.encoded(texts, encodings, problems)[1]
    ]
    raise_problems(path, problems, len(rows))
    return encoded


def _conversations(form: RowFormat, tokenizer: Tokenizer) -> Callable[[Columns], list[Segment]]:
    segments, messages = make_segmenter(tokenizer), form.messages
    assert messages is not None
    has_tools = "tools" in form.optional
    return lambda row: segments(messages(row), read_tools(row) if has_tools else None)


def _plain(form: RowFormat, tokenizer: Tokenizer) -> Callable[[Columns], list[Segment]]:
    if form.plain is None:
        raise ValueError(
            f"rows of the form {form.name!r} need a chat template, and this model has none; name a jinja file: "
            "data.chat_template"
        )
    if tokenizer.eos_id is None:
        raise ValueError(f"rows of the form {form.name!r} end with eos, and this tokenizer names no eos_token")
    return form.plain


def _checked(
    segment: Callable[[Columns], list[Segment]], learn: Learn, one_answer: bool
) -> Callable[[Columns], list[Segment]]:
    """`segment`, with ValueError for a row that the settings don't fit."""

    def check(row: Columns) -> list[Segment]:
        segments = segment(row)
        answers = sum([piece.supervised for piece in segments])
        if learn == "last" and len(segments) == answers:
            raise ValueError("it is one text with no turns, so data.learn last has nothing to choose; set all")
        if one_answer and answers > 1:
            raise ValueError(
                f"{answers} answers: data.source_max_length and data.target_max_length are for rows of one prompt and "
                "one answer; set data.max_length alone"
            )
        return segments

    return check


def _encodable(text: str) -> str:
    """The text; ValueError where it is none: forms look at what is learned, not at roles and tools."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):x}"
            raise ValueError(
                f"a role or a tool holds half of a surrogate pair ({half}), which is no character"
            ) from None
    return text


def _left[T](items: Sequence[T], found: Sequence[EncodedRow | None]) -> list[T]:
    """The items of the rows that are not found yet."""
    return [item for item, row in zip(items, found, strict=True) if row is None]


def _framed(row: EncodedRow, tokenizer: Tokenizer) -> EncodedRow:
    """The row with bos before it where the tokenizer asks for one, and a supervised eos after it."""
    has_bos = row.ids[:1].tolist() == [tokenizer.bos_id]
    before = [tokenizer.bos_id] if tokenizer.add_bos_token and not has_bos else []
    ids = np.concatenate([np.array(before, np.int32), row.ids, np.array([tokenizer.eos_id], np.int32)])
    supervised = np.concatenate([np.zeros(len(before), bool), row.supervised, np.ones(1, bool)])
    return row._replace(ids=ids, supervised=supervised, source=len(before) + row.source)
