"""Fast paths of reference.mask_segments for many rows: masks from byte lengths or offsets, and those of branches.

If a text round-trips (tokenizer/byte_lengths.py), its tokens are its bytes in order. So a token begins at the sum of
the byte lengths before it. A segment begins with a token if its first byte is one of those positions.
"""

import array
import bisect
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32, Int64

from qlora_jax.data.formats.row_format import Segment
from qlora_jax.data.loss_mask.reference import (
    EncodedRow,
    Learn,
    TokenText,
    encode_separately,
    join_texts,
    separate_turn,
    supervised_segments,
)
from qlora_jax.data.loss_mask.spans import is_always_found
from qlora_jax.data.loss_mask.turn_branches import RowText
from qlora_jax.data.tokenizer.byte_lengths import ByteLengths
from qlora_jax.data.tokenizer.tokenizer import Tokenizer


def encode_by_bytes(
    lengths: ByteLengths,
    rows: Sequence[Sequence[Segment]],
    ids: Sequence[Sequence[int]],
    learn: Learn = "assistant",
) -> list[EncodedRow | None]:
    """Returns for each row the same as `reference.mask_segments`, or None if bytes are not enough to know it.

    They are not enough if an answer begins or ends within a token, or if the ids stand for another number of bytes
    than the text has.

    Args:
      lengths: bytes that each id stands for.
      rows: segments of each row, at least one. Their joined texts round-trip.
      ids: token ids of each row's joined text.
      learn: the part that the loss sees.
    """
    if not rows:
        return []
    flat = np.frombuffer(b"".join([array.array("i", row) for row in ids]), np.int32)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
    # Position of each token's first byte, and of the end.
    begins = np.concatenate([[0], np.cumsum(_sizes(lengths, flat, starts))])
    found = _first_tokens(begins, starts, rows)
    learned = [learned for row in rows for learned in supervised_segments(row, learn)]
    supervised = np.repeat(learned, np.diff(found.tokens, append=len(flat)))
    return [
        EncodedRow(flat[start:stop], supervised[start:stop], source - start, False, False) if exact else None
        for (start, stop), source, exact in zip(
            itertools.pairwise(starts.tolist()), found.sources.tolist(), found.exact.tolist(), strict=True
        )
    ]


def _sizes(
    lengths: ByteLengths, flat: Int32[np.ndarray, " tokens"], starts: Int64[np.ndarray, " rows_and_one"]
) -> Int64[np.ndarray, " tokens"]:
    """Returns the bytes of the text that each token stands for, without a space that the tokenizer added."""
    sizes = lengths.of_ids[flat]
    if lengths.prefix == "never":
        return sizes
    added, prefixed = lengths.added[flat], np.zeros(len(flat), bool)
    prefixed[starts[starts < len(flat)]] = True
    if lengths.prefix == "every":
        prefixed[1:] |= added[:-1]
    return sizes - (prefixed & ~added)


class _Boundaries(NamedTuple):
    """Positions of segments among the tokens of all rows.

    Fields:
      tokens: first token of each segment.
      sources: first token of each row's first answer, or the end of the row.
      exact: True if the tokens have as many bytes as the row, and its answers begin and end with tokens.
    """

    tokens: Int64[np.ndarray, " segments"]
    sources: Int64[np.ndarray, " rows"]
    exact: Bool[np.ndarray, " rows"]


def _first_tokens(
    begins: Int64[np.ndarray, " tokens_and_one"],
    starts: Int64[np.ndarray, " rows_and_one"],
    rows: Sequence[Sequence[Segment]],
) -> _Boundaries:
    pieces = [piece for row in rows for piece in row]
    edges = np.concatenate([[0], np.cumsum([len(row) for row in rows])])  # first segment of each row, and the end
    row_of = np.repeat(np.arange(len(rows)), np.diff(edges))
    ends = np.concatenate([[0], np.cumsum([_size(piece.text) for piece in pieces])])
    at = begins[starts[row_of]] + ends[:-1] - ends[edges[row_of]]
    tokens = np.clip(np.searchsorted(begins, at), starts[row_of], starts[row_of + 1])
    answers = np.array([piece.supervised for piece in pieces], bool)
    within = (begins[tokens] != at) & np.diff(answers, prepend=False)
    whole = np.diff(ends[edges]) == np.diff(begins[starts])
    sources = np.minimum.reduceat(np.where(answers, tokens, starts[row_of + 1]), edges[:-1])
    return _Boundaries(tokens, sources, whole & (np.bincount(row_of, within, len(rows)) == 0))


def _size(text: str) -> int:
    """Returns the number of bytes of a text. That of ASCII text needs no encoding."""
    return len(text) if text.isascii() else len(text.encode())


def encode_segments(
    tokenizer: Tokenizer, row: Sequence[Segment], encoding: tokenizers.Encoding, learn: Learn = "assistant"
) -> EncodedRow:
    """Returns the same row as `reference.mask_segments`, from an encoding that was made before.

    Args:
      row: segments of text, in order.
      encoding: of the joined text, from `tokenizer.encode_spans`, which is fast on many texts at once.
      learn: the part that the loss sees.

    Raises:
      ValueError: a token crosses the start or end of an answer, and the segments' ids do not decode to the text.
    """
    text = "".join([segment.text for segment in row])
    ids, cut = encoding.ids, False
    lossy, starts = is_lossy(tokenizer, text, ids), _starts(row, len(text), encoding)
    if starts is None:
        at = _owners(tokenizer, row, text, encoding)
        if cut := at is None:
            ids, at = encode_separately(tokenizer, row, encoding)
        starts = np.searchsorted(at, np.arange(len(row))).tolist()
    supervised = np.zeros(len(ids), bool)
    answers = [segment.supervised for segment in row]
    for start, stop, learned in zip(starts, [*starts[1:], len(ids)], supervised_segments(row, learn), strict=True):
        supervised[start:stop] = learned
    source = starts[answers.index(True)] if True in answers else len(ids)
    # Faster than np.array, which every token would pass through.
    return EncodedRow(np.frombuffer(array.array("i", ids), np.int32), supervised, source, cut, lossy)


def is_lossy(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> bool:
    """Returns True if the ids decode to another text."""
    if tokenizer.round_trips(text):
        return False
    decoded = tokenizer.decode(ids)
    # Without spaces: some tokenizers add one first, or take those around a special token.
    return decoded != text and "".join(decoded.split()) != "".join(text.split())


def _starts(row: Sequence[Segment], length: int, encoding: tokenizers.Encoding) -> list[int] | None:
    """Returns the index of each segment's first token, or None if one begins within a token."""
    starts, at = [], 0
    for segment in row:
        token = len(encoding) if at == length else encoding.char_to_token(at)
        if token is None or (at < length and (encoding.token_to_chars(token) or (None,))[0] != at):
            return None
        starts.append(token)
        at += len(segment.text)
    return starts


def _owners(
    tokenizer: Tokenizer, row: Sequence[Segment], text: str, encoding: tokenizers.Encoding
) -> Int64[np.ndarray, " T"] | None:
    """Returns the segment that owns each token, or None if a token crosses the start or end of an answer."""
    spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    answers = np.array([segment.supervised for segment in row])
    bounds = np.cumsum([len(segment.text) for segment in row])
    first, last = _segments_of(spans, bounds)
    runs = np.cumsum(np.diff(answers, prepend=answers[:1]))
    over = np.flatnonzero(runs[first] != runs[last])
    if any(encoding.ids[index] not in tokenizer.added_ids for index in over):
        return None
    # An added token may have swallowed the spaces before it. Its owner is the segment with its first other character.
    for index in over:
        begin, end = spans[index]
        spans[index, 0] += len(text[begin:end]) - len(text[begin:end].lstrip())
    return _segments_of(spans, bounds)[0]


def _segments_of(spans: Int64[np.ndarray, "T 2"], bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the segments that hold each token's first character and its last one."""
    begin, end = spans[:, 0], np.maximum(spans[:, 1] - 1, spans[:, 0])
    first, last = (np.searchsorted(bounds, at, side="right") for at in (begin, end))
    return np.minimum(first, len(bounds) - 1), np.minimum(last, len(bounds) - 1)


# Encodes rows with branches. Each turn's prompt has the ids that inference gives the model, to the id.
#
# A tokenizer finds special tokens before it splits the text between them. So texts are encoded in pieces that end with
# special tokens, and equal pieces of all rows only once: a history that ten turns share is encoded once.
#
# A turn begins where the ids of its prompt, encoded alone, end. If a token of the whole text crosses that place or the
# end of the turn, the turn becomes a branch: the ids of its prompt, then those of its reply.


class _Pieces(NamedTuple):
    """A text in pieces, which join to it, and the turns in it.

    Fields:
      ends: index of the character after each piece.
      spans: [start, stop) of each turn, in characters.
    """

    texts: list[str]
    ends: list[int]
    spans: list[tuple[int, int]]

    def before(self, at: int) -> tuple[int, str]:
        """Returns the number of whole pieces before the character `at`, and the text between them and it."""
        count = bisect.bisect_right(self.ends, at)
        start = self.ends[count - 1] if count else 0
        return count, self.texts[count][: at - start] if at > start else ""

    def wanted(self) -> Iterator[str]:
        """Yields the texts to encode."""
        yield from self.texts
        yield from (self.before(at)[1] for at in itertools.chain.from_iterable(self.spans))


Ids = Mapping[str, list[int]]


def encode_branched(tokenizer: Tokenizer, rows: Sequence[RowText]) -> list[EncodedRow | ValueError]:
    """Returns the same rows as `reference.mask_branches`, or the errors that it raises."""
    ends_piece = functools.cache(functools.partial(_ends_piece, tokenizer))
    splits = [[_split(tokenizer, ends_piece, text, spans) for text, spans in row.texts()] for row in rows]
    found = _encode(tokenizer, splits)
    return [_encoded_row(tokenizer, row, pieces, found) for row, pieces in zip(rows, splits, strict=True)]


def _encoded_row(tokenizer: Tokenizer, row: RowText, pieces: Sequence[_Pieces], found: Ids) -> EncodedRow | ValueError:
    if not all([_is_whole(tokenizer, text, found) for one in pieces for text in one.texts[:-1]]):
        pieces = [_Pieces([text], [len(text)], spans) for text, spans in row.texts()]
        found = _encode(tokenizer, [pieces])
    texts = dict.fromkeys(text for one in pieces for text in one.texts)
    lossy = any([is_lossy(tokenizer, text, found[text]) for text in texts])
    try:
        return join_texts([*_sequences(tokenizer, pieces, found)], lossy)
    except ValueError as error:
        return error


def _split(tokenizer: Tokenizer, ends_piece: Callable[[str], bool], text: str, spans: list[tuple[int, int]]) -> _Pieces:
    """Returns the text in pieces that end with special tokens."""
    ends = [match.end() for match in tokenizer.special_text.finditer(text) if ends_piece(match.group())]
    if not ends or ends[-1] < len(text):
        ends.append(len(text))
    return _Pieces([text[start:end] for start, end in zip([0, *ends], ends, strict=False)], ends, spans)


def _ends_piece(tokenizer: Tokenizer, token: str) -> bool:
    """Returns True if a text can be encoded in two parts, the first of which ends with this special token."""
    lengths = tokenizer.byte_lengths
    return lengths is not None and lengths.prefix != "first" and is_always_found(tokenizer, token)


def _is_whole(tokenizer: Tokenizer, piece: str, found: Ids) -> bool:
    """Returns True if the last id of a piece is a special token. Another added token may overlap its beginning."""
    token = tokenizer.backend.id_to_token(found[piece][-1])
    return token is not None and piece.endswith(token) and tokenizer.special_text.fullmatch(token) is not None


def _encode(tokenizer: Tokenizer, splits: Sequence[Sequence[_Pieces]]) -> Ids:
    wanted = [*dict.fromkeys(text for row in splits for pieces in row for text in pieces.wanted())]
    return dict(zip(wanted, [encoding.ids for encoding in tokenizer.encode_fast(wanted)], strict=True))


def _sequences(tokenizer: Tokenizer, texts: Sequence[_Pieces], found: Ids) -> Iterator[TokenText]:
    """Yields the trunk, and each branch. Turns that a token crosses become branches, which come last."""
    apart: list[TokenText] = []
    for pieces in texts:
        ids = [found[text] for text in pieces.texts]
        starts = [0, *itertools.accumulate(map(len, ids))]
        whole, spans = [*itertools.chain.from_iterable(ids)], []
        for start, stop in pieces.spans:
            (count, before), (last, reply) = pieces.before(start), pieces.before(stop)
            begin, end = starts[count] + len(found[before]), starts[last] + len(found[reply])
            prompt = whole[: starts[count]] + found[before]
            if whole[:begin] == prompt and whole[starts[last] : end] == found[reply]:
                spans.append((begin, end))
                continue
            text = "".join(pieces.texts)[:stop]
            apart.append(separate_turn(tokenizer, prompt, text[start:], tokenizer.encode(text)))
        if spans or pieces is texts[0]:
            yield TokenText(whole, spans)
    yield from apart
