"""Holds out rows for evaluation by a hash of their content, so the choice never changes."""

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt64

from qlora_jax.data.formats.row_format import Columns, RowFormat


def content_hash(row_format: RowFormat, columns: Columns) -> int:
    """Returns 64 bits of SHA-256 over the columns that the model sees. Labels are not a part of the content."""
    # Half a surrogate pair must not fail here: it is reported later, with its row.
    text = row_format.content(columns).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


class Split(NamedTuple):
    """The training rows or the held-out rows of a file. A row is held out if hash(content) < fraction * 2**64.

    Rows of equal content are in the same split, in all files, whatever the seed and the other rows.

    Fields:
      held_out: True for the held-out rows.
    """

    fraction: float
    held_out: bool

    def contains(self, row_hash: int) -> bool:
        """Returns True if a row with that hash is in this split."""
        return (row_hash < int(self.fraction * 2**64)) == self.held_out


def check_splits(path: str, fraction: float, train_rows: int, held_out_rows: int) -> None:
    """Raises ValueError if one of a file's splits is empty."""
    if not train_rows or not held_out_rows:
        raise ValueError(
            f"{path}: data.eval_fraction {fraction} of {train_rows + held_out_rows} rows leaves {train_rows} to train "
            f"on and {held_out_rows} held out. Set data.eval to a file of held-out rows, or choose another fraction."
        )


def shared_rows(train_chunks: Iterable[UInt64[np.ndarray, " _"]], held_out: UInt64[np.ndarray, " rows"]) -> int:
    """Returns the number of held-out hashes that are also in the chunks of training hashes."""
    found = np.zeros(len(held_out), bool)
    for hashes in train_chunks:
        found |= np.isin(held_out, hashes)
    return int(found.sum())
