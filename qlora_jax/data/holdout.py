"""Which rows are held out for evaluation: by a hash of their content, so that the choice never changes."""

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt64

from qlora_jax.data.formats.registry import Columns, RowFormat


def content_hash(row_format: RowFormat, columns: Columns) -> int:
    """64 bits of SHA-256 over what the model gets to see of the row."""
    # Half a surrogate pair, which is told later, is no reason to fail here.
    text = row_format.content(columns).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


class Split(NamedTuple):
    """One side of a file: a row is held out iff hash(content) < fraction * 2**64.

    Rows of equal content are on the same side, in this file and in any other, whatever the seed and the other rows.
    """

    fraction: float
    held: bool

    def takes(self, hashed: int) -> bool:
        """Whether a row of that hash is on this side."""
        return (hashed < int(self.fraction * 2**64)) == self.held


def check_splits(path: str, fraction: float, trained: int, held: int) -> None:
    """Raises ValueError where one side of a file is empty."""
    if not trained or not held:
        raise ValueError(
            f"{path}: data.eval_fraction {fraction} of {trained + held} rows leaves {trained} to train on and "
            f"{held} held out. Name a file of held-out rows (data.eval), or choose another fraction."
        )


def shared_rows(trained: Iterable[UInt64[np.ndarray, " _"]], held: UInt64[np.ndarray, " held"]) -> int:
    """How many of the held-out hashes are among those trained on, which come in pieces."""
    found = np.zeros(len(held), bool)
    for hashes in trained:
        found |= np.isin(held, hashes)
    return int(found.sum())
