"""Ids and masks of many rows at once, from the bytes that each id stands for, without asking where tokens lie.

The ids of a text that a byte-level tokenizer keeps (lossless.py) are its bytes, one token behind the other. So where
a token begins is the sum of the lengths before it, and a segment begins with one iff its first byte is such a place.
"""

import array
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from qlora_jax.data.loss_mask.reference import EncodedRow, Learn, supervised_segments
from qlora_jax.data.loss_mask.spans import Segment
from qlora_jax.data.tokenizer.byte_lengths import ByteLengths


def encode_by_bytes(
    lengths: ByteLengths,
    rows: Sequence[Sequence[Segment]],
    ids: Sequence[Sequence[int]],
    learn: Learn = "assistant",
) -> list[EncodedRow | None]:
    """What `encode_segments` gives for each row; None where an answer begins or ends within a token.

    None too for a row whose ids do not stand for as many bytes as its text has.

    Args:
      lengths: bytes of each id.
      rows: segments, at least one each; the tokenizer keeps their texts.
      ids: of each row's joined text.
    """
    if not rows:
        return []
    flat = np.frombuffer(b"".join([array.array("i", row) for row in ids]), np.int32)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
    # The first byte of each token, and the end.
    begins = np.concatenate([[0], np.cumsum(_sizes(lengths, flat, starts))])
    found = _first_tokens(begins, starts, rows)
    learned = [seen for row in rows for seen in supervised_segments(row, learn)]
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
    """Bytes of the text that each token stands for: a space that the tokenizer has put is none of them."""
    sizes = lengths.of_ids[flat]
    if lengths.prefix == "never":
        return sizes
    added, prefixed = lengths.added[flat], np.zeros(len(flat), bool)
    prefixed[starts[starts < len(flat)]] = True
    if lengths.prefix == "every":
        prefixed[1:] |= added[:-1]
    return sizes - (prefixed & ~added)


class _Found(NamedTuple):
    """Where segments begin among the tokens of all rows.

    Fields:
      tokens: the first token of each segment.
      sources: the first token of each row's first answer, or the end of the row.
      exact: whether the row's bytes are those of its tokens, and its answers begin and end with tokens.
    """

    tokens: Int64[np.ndarray, " segments"]
    sources: Int64[np.ndarray, " rows"]
    exact: Bool[np.ndarray, " rows"]


def _first_tokens(
    begins: Int64[np.ndarray, " tokens_and_one"],
    starts: Int64[np.ndarray, " rows_and_one"],
    rows: Sequence[Sequence[Segment]],
) -> _Found:
    pieces = [piece for row in rows for piece in row]
    edges = np.concatenate([[0], np.cumsum([len(row) for row in rows])])  # of rows among segments
    row_of = np.repeat(np.arange(len(rows)), np.diff(edges))
    ends = np.concatenate([[0], np.cumsum([_size(piece.text) for piece in pieces])])
    at = begins[starts[row_of]] + ends[:-1] - ends[edges[row_of]]
    tokens = np.clip(np.searchsorted(begins, at), starts[row_of], starts[row_of + 1])
    answers = np.array([piece.supervised for piece in pieces], bool)
    within = (begins[tokens] != at) & np.diff(answers, prepend=False)
    whole = np.diff(ends[edges]) == np.diff(begins[starts])
    sources = np.minimum.reduceat(np.where(answers, tokens, starts[row_of + 1]), edges[:-1])
    return _Found(tokens, sources, whole & (np.bincount(row_of, within, len(rows)) == 0))


def _size(text: str) -> int:
    """Bytes of a text; that of ASCII is quicker to tell."""
    return len(text) if text.isascii() else len(text.encode())
