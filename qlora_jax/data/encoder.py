"""Encodes rows of a known format to ids and masks. Python prepares one chunk while the tokenizer works on another."""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import tokenizers

from qlora_jax.config.fields import TEMPLATE_CHOICES
from qlora_jax.data.formats.registry import format_of
from qlora_jax.data.formats.row_format import Columns, RowFormat, Segment
from qlora_jax.data.formats.turn_fields import by_template_kwargs, check_plain, read_template_kwargs, read_tools
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.loss_mask.span_cache import make_segmenter
from qlora_jax.data.loss_mask.spans import SegmentSearch, shared_prefix
from qlora_jax.data.loss_mask.token_spans import encode_branched, encode_by_bytes, encode_segments
from qlora_jax.data.loss_mask.turn_branches import Learn, RowText, join_text
from qlora_jax.data.loss_mask.turns import mark_dropped_reasoning
from qlora_jax.data.readers.files import Place, Problem, Row, raise_problems
from qlora_jax.data.tokenizer.render_batches import run_together, with_variables
from qlora_jax.data.tokenizer.template_pipe import Message
from qlora_jax.data.tokenizer.tokenizer import Tokenizer

# Rows per chunk. The encodings of a whole data set would take about 100 bytes per token; in smaller chunks the
# tokenizer's threads wait for Python's lock more often.
CHUNK = 2048
# Messages per conversation. Each turn is rendered with all before it: 2,000 messages take a second, 20,000 minutes.
MAX_MESSAGES = 2000


SegmentAll = Callable[[Sequence[Columns]], list[RowText | ValueError]]
# Returns the places and the ids of a chunk's rows, once the tokenizer has run. Adds bad rows to a list.
Finish = Callable[[list[Problem]], tuple[list[Place], list[EncodedRow]]]


@runtime_checkable
class RowEncoder(Protocol):
    """Makes ids and masks of rows of one format, in chunks."""

    @property
    def chat(self) -> bool:
        """True if a chat template writes the rows."""
        ...

    def begin(self, rows: Sequence[Row], problems: list[Problem]) -> Callable[[], Finish]:
        """Reads rows, and returns a function that runs the tokenizer, which may be called in another thread.

        Rows that can't be used are skipped and added to `problems`.
        """
        ...


class ChunkEncodings(NamedTuple):
    """Ids of a chunk's texts.

    Fields:
      prefix: ids that all texts begin with.
      texts: for each text, the encoding of what follows the prefix.
      branched: rows with branches, or their errors.
    """

    prefix: list[int]
    texts: Sequence[tokenizers.Encoding]
    branched: Sequence[EncodedRow | ValueError] = ()


def row_problems(rows: Sequence[Row], row_format: RowFormat) -> list[Problem]:
    """Returns (place, problem) of every row that does not fit the format or has no assistant text."""
    problems = [(row.place, "; ".join(row_format.check(row.data))) for row in rows]
    return [(place, problem) for place, problem in problems if problem]


def check_rows(path: str, rows: Sequence[Row], row_format: RowFormat) -> None:
    """Raises one ValueError that names every row that does not fit the format or has no assistant text."""
    raise_problems(path, row_problems(rows, row_format), len(rows))


def expand_examples(rows: Sequence[Row], row_format: RowFormat, first: int = 0) -> tuple[Sequence[Row], RowFormat]:
    """Returns the examples of checked rows, numbered from `first`, and their format.

    In some formats one row holds several examples.
    """
    if row_format.examples is None:
        return rows, row_format
    lines = [(row.place.line, columns) for row in rows for columns in row_format.examples(row.data)]
    examples = [Row(Place(line, number), columns) for number, (line, columns) in enumerate(lines, start=first)]
    return examples, dataclasses.replace(format_of(row_format.example), name=row_format.name)


class ChunkTexts(NamedTuple):
    """Rows as segments of text, ready to encode.

    Fields:
      places, segments, texts: of rows that are one text.
      unseen_reasoning: places of the rows of one text whose reasoning the template drops.
      branched: rows with branches, and their places.
    """

    places: list[Place]
    segments: list[list[Segment]]
    texts: list[str]
    unseen_reasoning: set[Place]
    branched: list[tuple[Place, RowText]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """Makes ids and masks of rows of one format, in three steps: segment_rows, encode_texts, mask_rows.

    The second step takes most of the time. `segment_all` returns the segments of each row, or its error.

    With a chat template, a row is a conversation, and the template writes bos if it wants one. Without a template, a
    row is plain text. It begins with one bos if the tokenizer asks for it, and ends with a supervised eos.

    Byte-level tokenizers encode the prompt and the answer of plain text separately. A prompt often ends with a space,
    which would otherwise be part of the answer's first token.
    """

    tokenizer: Tokenizer
    learn: Learn
    chat: bool
    segment_all: SegmentAll

    def begin(self, rows: Sequence[Row], problems: list[Problem]) -> Callable[[], Finish]:
        """Takes the first step; returns a function that takes the second, and returns one that takes the third."""
        texts = self.segment_rows(rows, problems)
        return lambda: functools.partial(self.mask_rows, texts, self.encode_texts(texts))

    @property
    def _encodes_separately(self) -> bool:
        """True if each segment is encoded without its neighbours."""
        return not self.chat and self.tokenizer.is_byte_level

    def segment_rows(self, rows: Sequence[Row], problems: list[Problem]) -> ChunkTexts:
        """Returns the rows' segments. Rows without exact spans are skipped and added to `problems`."""
        chunk = ChunkTexts([], [], [], set(), [])
        for row, found in zip(rows, self.segment_all([row.data for row in rows]), strict=True):
            try:
                if isinstance(found, ValueError):
                    raise found
                text = check_encodable(join_text(found.segments))
                for one in (text, *(check_encodable(join_text(branch.segments)) for branch in found.branches)):
                    self.tokenizer.check_text(one)
            except ValueError as error:
                problems.append((row.place, str(error)))
                continue
            if found.branches:
                chunk.branched.append((row.place, found))
                continue
            chunk.places.append(row.place)
            chunk.segments.append(found.segments)
            chunk.texts.append(text)
            if found.unseen_reasoning:
                chunk.unseen_reasoning.add(row.place)
        return chunk

    def encode_texts(self, texts: ChunkTexts) -> ChunkEncodings:
        """Runs the tokenizer, which releases Python's lock while it works."""
        branched = encode_branched(self.tokenizer, [row for _, row in texts.branched]) if texts.branched else ()
        return self._encode_plain(texts)._replace(branched=branched)

    def _encode_plain(self, texts: ChunkTexts) -> ChunkEncodings:
        """Encodes the rows that are one text."""
        if self.tokenizer.byte_lengths is None:
            return ChunkEncodings([], self.tokenizer.encode_spans(texts.texts))
        if self._encodes_separately:
            pieces = [piece.text for pieces in texts.segments for piece in pieces]
            return ChunkEncodings([], self.tokenizer.encode_fast(pieces))
        prefix, ids = shared_prefix(self.tokenizer, texts.texts)
        return ChunkEncodings(ids, self.tokenizer.encode_fast([text[len(prefix) :] for text in texts.texts]))

    def mask_rows(
        self, texts: ChunkTexts, encodings: ChunkEncodings, problems: list[Problem]
    ) -> tuple[list[Place], list[EncodedRow]]:
        """Returns the rows' places and their ids with masks. Rows that fail are skipped and added to `problems`."""
        found: list[EncodedRow | None] = [None] * len(texts.places)
        spans = encodings.texts
        if self.tokenizer.byte_lengths is not None:
            found = self._by_bytes(texts, encodings)
            spans = self.tokenizer.encode_spans(_remaining(texts.texts, found))
        for row, pieces, encoding in zip(
            _remaining(range(len(found)), found), _remaining(texts.segments, found), spans, strict=True
        ):
            try:
                found[row] = encode_segments(self.tokenizer, pieces, encoding, self.learn)
            except ValueError as error:
                problems.append((texts.places[row], str(error)))
        placed = [(place, row) for place, row in zip(texts.places, found, strict=True) if row is not None]
        if not self.chat:
            placed = [(place, _with_bos_and_eos(row, self.tokenizer)) for place, row in placed]
        if texts.unseen_reasoning:
            placed = [(place, row._replace(unseen_reasoning=place in texts.unseen_reasoning)) for place, row in placed]
        placed = _with_branched(placed, texts, encodings, problems)
        return [place for place, _ in placed], [row for _, row in placed]

    def _by_bytes(self, texts: ChunkTexts, encodings: ChunkEncodings) -> list[EncodedRow | None]:
        """Returns the rows whose masks follow from the byte lengths of ids; None for each other row."""
        lengths, round_trips = self.tokenizer.byte_lengths, self.tokenizer.round_trips
        assert lengths is not None
        ids = [encodings.prefix + encoding.ids for encoding in encodings.texts]
        if self._encodes_separately:
            pieces = iter(ids)
            ids = [[*itertools.chain.from_iterable(itertools.islice(pieces, len(row)))] for row in texts.segments]
        found = encode_by_bytes(lengths, texts.segments, ids, self.learn)
        return [row if round_trips(text) else None for text, row in zip(texts.texts, found, strict=True)]


def make_encoder(
    row_format: RowFormat, tokenizer: Tokenizer, learn: Learn = "assistant", *, one_answer: bool = False
) -> Encoder:
    """Returns the encoder of a row format.

    Args:
      learn: the part that the loss sees: every answer, only the last one of a row, or the whole row.
      one_answer: reports rows with more than one answer, because they have no single source and target.

    Raises:
      ValueError: the tokenizer lacks a chat template or an eos token that the format needs.
    """
    chat = row_format.messages is not None and tokenizer.chat_template is not None
    segment_all = _conversations(row_format, tokenizer, learn) if chat else _plain(row_format, tokenizer)
    return Encoder(tokenizer=tokenizer, learn=learn, chat=chat, segment_all=_checked(segment_all, learn, one_answer))


def prefetch_map[A, B](function: Callable[[A], B], items: Iterable[A]) -> Iterator[tuple[A, B]]:
    """Yields (item, function(item)) in order. A thread computes the next result while the caller uses the last one."""
    with ThreadPoolExecutor(1) as pool:
        before: tuple[A, Future[B]] | None = None
        for item in items:
            started = item, pool.submit(function, item)
            if before is not None:
                yield before[0], before[1].result()
            before = started
        if before is not None:
            yield before[0], before[1].result()


def encode_rows(path: str, rows: Sequence[Row], row_format: RowFormat, tokenizer: Tokenizer) -> list[EncodedRow]:
    """Returns the ids and the mask of each checked row, with every answer supervised.

    Raises:
      ValueError: rows without exact spans, or a tokenizer without what the format needs.
    """
    encoder, problems = make_encoder(row_format, tokenizer), []
    chunks = (encoder.segment_rows(chunk, problems) for chunk in itertools.batched(rows, CHUNK))
    encoded = [
        row
        for texts, encodings in prefetch_map(encoder.encode_texts, chunks)
        for row in encoder.mask_rows(texts, encodings, problems)[1]
    ]
    raise_problems(path, problems, len(rows))
    return encoded


def _with_branched(
    placed: list[tuple[Place, EncodedRow]], texts: ChunkTexts, encodings: ChunkEncodings, problems: list[Problem]
) -> list[tuple[Place, EncodedRow]]:
    """Returns the rows with those that have branches, by place. Rows that fail are added to `problems`."""
    if not texts.branched:
        return placed
    branched = []
    for (place, text), row in zip(texts.branched, encodings.branched, strict=True):
        if isinstance(row, ValueError):
            problems.append((place, str(row)))
        else:
            branched.append((place, row._replace(unseen_reasoning=text.unseen_reasoning)))
    return sorted([*placed, *branched], key=operator.itemgetter(0))


def _conversations(row_format: RowFormat, tokenizer: Tokenizer, learn: Learn) -> SegmentAll:
    segmenter_of, messages = by_template_kwargs(make_segmenter, tokenizer), row_format.messages
    assert messages is not None
    segmenter_of({})  # raises the template's errors before any row is read
    has_tools = "tools" in row_format.optional

    def search(row: Columns) -> SegmentSearch:
        chat = _not_too_long(messages(row))
        segmenting = segmenter_of(row)(chat, read_tools(row) if has_tools else None)
        found = yield from with_variables(segmenting, read_template_kwargs(row))
        return mark_dropped_reasoning(found.learned(learn), chat)

    return lambda rows: run_together(map(search, rows), tokenizer.start_rendering)


def _not_too_long(chat: Sequence[Message]) -> Sequence[Message]:
    """Returns the messages; raises ValueError if there are too many to render each turn with all before it."""
    if len(chat) > MAX_MESSAGES:
        raise ValueError(f"found {len(chat):,} messages, expected at most {MAX_MESSAGES:,}. Split the conversation.")
    return chat


def _plain(row_format: RowFormat, tokenizer: Tokenizer) -> SegmentAll:
    if row_format.plain is None:
        raise ValueError(
            f"rows of the format {row_format.name!r} need a chat template, and this model has none. "
            f"Set data.chat_template to {TEMPLATE_CHOICES}."
        )
    if tokenizer.eos_id is None:
        raise ValueError(
            f"rows of the format {row_format.name!r} end with eos, and this tokenizer has no eos_token. "
            "Add eos_token to its files."
        )
    plain = row_format.plain

    def segments(row: Columns) -> RowText | ValueError:
        try:
            check_plain(row)
        except ValueError as error:
            return error
        return RowText(plain(row))

    return lambda rows: [segments(row) for row in rows]


def _checked(segment_all: SegmentAll, learn: Learn, one_answer: bool) -> SegmentAll:
    """Returns `segment_all` with an error for each row that does not fit the settings."""

    def check(found: RowText | ValueError) -> RowText | ValueError:
        if isinstance(found, ValueError):
            return found
        answers = found.answers
        if learn == "last" and not found.branches and len(found.segments) == answers:
            return ValueError("one text without turns, so data.learn last has no last turn. Set data.learn to all.")
        if one_answer and answers > 1:
            return ValueError(
                f"found {answers} answers, expected one: data.source_max_length and data.target_max_length apply to "
                "rows of one prompt and one answer. Set data.max_length instead."
            )
        return found

    return lambda rows: [check(found) for found in segment_all(rows)]


def check_encodable(text: str) -> str:
    """Returns the text; raises ValueError if it is not Unicode. Formats check answers, but not roles and tools."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):x}"
            raise ValueError(
                f"a role or a tool contains {half}, half of a surrogate pair. Replace it with a whole character."
            ) from None
    return text


def _remaining[T](items: Sequence[T], found: Sequence[EncodedRow | None]) -> list[T]:
    """Returns the items of rows that have no result yet."""
    return [item for item, row in zip(items, found, strict=True) if row is None]


def _with_bos_and_eos(row: EncodedRow, tokenizer: Tokenizer) -> EncodedRow:
    """Returns the row with a supervised eos after it, and with bos before it if the tokenizer asks for one."""
    has_bos = row.ids[:1].tolist() == [tokenizer.bos_id]
    before = [tokenizer.bos_id] if tokenizer.add_bos_token and not has_bos else []
    ids = np.concatenate([np.array(before, np.int32), row.ids, np.array([tokenizer.eos_id], np.int32)])
    supervised = np.concatenate([np.zeros(len(before), bool), row.supervised, np.ones(1, bool)])
    return row._replace(ids=ids, supervised=supervised, source=len(before) + row.source)
