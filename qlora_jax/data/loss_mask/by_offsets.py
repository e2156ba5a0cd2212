"""Fast path of reference.mask_segments for one row: compares offsets only where a segment begins within a token."""

import array
from collections.abc import Sequence

import numpy as np
import tokenizers
from jaxtyping import Int64

from qlora_jax.data.formats.row_format import Segment
from qlora_jax.data.loss_mask.reference import EncodedRow, Learn, encode_separately, supervised_segments
from qlora_jax.data.tokenizer.tokenizer import Tokenizer


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
