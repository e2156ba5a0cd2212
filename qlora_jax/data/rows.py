"""Token rows: the ids and masks of a data set in three flat arrays, and where each row came from."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32, Int64

from qlora_jax.data.encode import Encoded
from qlora_jax.data.readers import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Row i has the ids `ids[starts[i]:starts[i + 1]]`.

    Fields:
      supervised: for each id, whether the loss sees it as a target.
      numbers: the row's number in its file, from 0; `batches` and errors name rows by it.
      lines: the row's line there, from 1.
      path: the file.
    """

    ids: Int32[np.ndarray, " total"]
    supervised: Bool[np.ndarray, " total"]
    starts: Int64[np.ndarray, " rows_and_one"]
    numbers: Int64[np.ndarray, " rows"]
    lines: Int64[np.ndarray, " rows"]
    path: str

    def __len__(self) -> int:
        return len(self.numbers)

    def row(self, index: int) -> tuple[Int32[np.ndarray, " T"], Bool[np.ndarray, " T"]]:
        """(ids, supervised) of the row at `index` (not its number)."""
        span = slice(self.starts[index], self.starts[index + 1])
        return self.ids[span], self.supervised[span]

    @property
    def places(self) -> Int64[np.ndarray, " rows"]:
        """Places that each row fills in a batch: one fewer than its ids."""
        return np.diff(self.starts) - 1

    def where(self, number: int) -> str:
        """`file:line` of the row of that number."""
        index = int(np.searchsorted(self.numbers, number))
        if index == len(self) or self.numbers[index] != number:
            raise ValueError(f"{self.path}: row {number} is not among the {len(self)} rows kept")
        return f"{self.path}:{Place(int(self.lines[index]), number)}"


def token_rows(path: str, encoded: Sequence[Encoded], places: Sequence[Place]) -> TokenRows:
    """The rows in one object, in the order given (that of the file)."""
    lengths = np.array([len(row.ids) for row in encoded], np.int64)
    return TokenRows(
        ids=np.concatenate([np.zeros(0, np.int32), *(row.ids for row in encoded)]),
        supervised=np.concatenate([np.zeros(0, bool), *(row.supervised for row in encoded)]),
        starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        numbers=np.array([place.number for place in places], np.int64),
        lines=np.array([place.line for place in places], np.int64),
        path=path,
    )
