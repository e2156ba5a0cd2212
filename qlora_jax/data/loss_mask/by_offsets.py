"""Segments of text to token ids with a mask, exact at every boundary between supervised and not."""

import array
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32, Int64

from qlora_jax.data.loss_mask.spans import Segment
from qlora_jax.data.tokenizer.tokenizer import Tokenizer

Learn = Literal["assistant", "last", "all"]


def _last_alone(answers: list[bool]) -> list[bool]:
    last = max((index for index, answer in enumerate(answers) if answer), default=-1)
    return [index == last for index in range(len(answers))]


# Which segments the loss sees, from those that are answers.
SUPERVISED_SEGMENTS: dict[Learn, Callable[[list[bool]], list[bool]]] = {
    "assistant": lambda answers: answers,
    "last": _last_alone,
    "all": lambda answers: [True] * len(answers),
}


class EncodedRow(NamedTuple):
    """One row of tokens.

    Fields:
      supervised: which ids the loss sees as targets.
      source: how many ids come before the first answer; all of them where there is none.
      cut: a token had to be cut at a boundary, see `encode_segments`.
      lossy: the ids decode to another text: the tokenizer has no token for some of its characters, or rewrites them.
    """

    ids: Int32[np.ndarray, " T"]
    supervised: Bool[np.ndarray, " T"]
    source: int
    cut: bool
    lossy: bool


def encode_segments(
    tokenizer: Tokenizer, row: Sequence[Segment], encoding: tokenizers.Encoding, learn: Learn = "assistant"
) -> EncodedRow:
    """The ids of the row's joined text, and for each id whether the loss sees it.

    Where one token would reach over a boundary (an answer that begins with several spaces, say), the text is encoded
    piece by piece instead, so that the ids are those of generation: the prompt's, then the answer's. Such a row is
    marked `cut`; every other has the ids of the whole text.

    Args:
      encoding: of the joined text, from `tokenizer.encode_spans`, which is fast on many rows at once.

    Raises:
      ValueError: the pieces of a cut row do not decode to its text, so its mask can't be exact.
    """
    text = "".join([segment.text for segment in row])
    ids, cut = encoding.ids, False
    lossy, starts = _is_lossy(tokenizer, text, ids), _starts(row, len(text), encoding)
    if starts is None:
        at = _segment_of_each(tokenizer, row, text, encoding)
        if cut := at is None:
            ids, at = _piecewise(tokenizer, row, encoding)
        starts = np.searchsorted(at, np.arange(len(row))).tolist()
    supervised = np.zeros(len(ids), bool)
    answers = [segment.supervised for segment in row]
    for start, stop, learned in zip(starts, [*starts[1:], len(ids)], SUPERVISED_SEGMENTS[learn](answers), strict=True):
        supervised[start:stop] = learned
    source = starts[answers.index(True)] if True in answers else len(ids)
    # Faster than np.array, on the way of every token.
    return EncodedRow(np.frombuffer(array.array("i", ids), np.int32), supervised, source, cut, lossy)


def _is_lossy(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> bool:
    if tokenizer.round_trips(text):
        return False
    decoded = tokenizer.decode(ids)
    # Spaces aside: some tokenizers put one first, or take those around a special token.
    return decoded != text and "".join(decoded.split()) != "".join(text.split())


def _starts(row: Sequence[Segment], length: int, encoding: tokenizers.Encoding) -> list[int] | None:
    """The index of each segment's first token, or None where one begins within a token."""
    starts, at = [], 0
    for segment in row:
        token = len(encoding) if at == length else encoding.char_to_token(at)
        if token is None or (at < length and (encoding.token_to_chars(token) or (None,))[0] != at):
            return None
        starts.append(token)
        at += len(segment.text)
    return starts


def _piecewise(
    tokenizer: Tokenizer, row: Sequence[Segment], encoding: tokenizers.Encoding
) -> tuple[list[int], Int64[np.ndarray, " T"]]:
    """The ids of each segment by itself, and the index of each id's segment."""
    pieces = tokenizer.encode_batch([segment.text for segment in row])
    ids = [token for piece in pieces for token in piece]
    if tokenizer.decode(ids) != tokenizer.decode(encoding.ids):
        raise ValueError(
            "a token reaches over the start or end of an answer, and the tokenizer can't encode the two apart"
        )
    return ids, np.repeat(np.arange(len(row)), [len(piece) for piece in pieces])


def _segment_of_each(
    tokenizer: Tokenizer, row: Sequence[Segment], text: str, encoding: tokenizers.Encoding
) -> Int64[np.ndarray, " T"] | None:
    """The index of each token's segment, from its offsets, or None where a token reaches over a boundary."""
    spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    answers = np.array([segment.supervised for segment in row])
    bounds = np.cumsum([len(segment.text) for segment in row])
    first, last = _segments_of(spans, bounds)
    runs = np.cumsum(np.diff(answers, prepend=answers[:1]))
    over = np.flatnonzero(runs[first] != runs[last])
    if any(encoding.ids[index] not in tokenizer.added_ids for index in over):
        return None
    # An added token may swallow the spaces around it; it belongs where its own text is.
    for index in over:
        begin, end = spans[index]
        spans[index, 0] += len(text[begin:end]) - len(text[begin:end].lstrip())
    return _segments_of(spans, bounds)[0]


def _segments_of(spans: Int64[np.ndarray, "T 2"], bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the segment that holds each token's first character, and its last one."""
    begin, end = spans[:, 0], np.maximum(spans[:, 1] - 1, spans[:, 0])
    first, last = (np.searchsorted(bounds, at, side="right") for at in (begin, end))
    return np.minimum(first, len(bounds) - 1), np.minimum(last, len(bounds) - 1)
