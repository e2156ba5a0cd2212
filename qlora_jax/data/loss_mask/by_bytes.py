"""Fast path of reference.mask_segments for many rows: computes masks from byte lengths, without offsets.

If a text round-trips (tokenizer/byte_lengths.py), its tokens are its bytes in order. So a token begins at the sum of
the byte lengths before it. A segment begins with a token if its first byte is one of those positions.
"""

import array
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from qlora_jax.data.formats.row_format import Segment
from qlora_jax.data.loss_mask.reference import EncodedRow, Learn, supervised_segments
from qlora_jax.data.tokenizer.byte_lengths import ByteLengths


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
