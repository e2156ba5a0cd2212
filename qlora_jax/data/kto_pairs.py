"""KL pairs of KTO: each prompt with its own completion, and with the completion of another row of the same file.

KTO compares a completion's reward with an estimate of the policy's distance from the reference, which it takes from
prompts with completions that belong to others. The other row is `shift` rows further on, and the last rows go on with
the first. The shift follows from the seed and the number of rows, so neither packing nor batches nor the number of
processes change a pair, no row is its own, and each completion is used once. Windows read the other rows in order, too.

A row of a file is one text: a prompt, and a supervised completion. Paired, it is a tree with two branches.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Bool, Int32, Int64

from qlora_jax.data.branch_tree import Branches
from qlora_jax.data.row_store import StoredRows
from qlora_jax.data.rows import TokenRows, concatenate_rows

Completion = tuple[Int32[np.ndarray, " n"], Bool[np.ndarray, " n"]]


def kl_shift(path: str, rows: int, seed: int, eval_fraction: float = 0.0) -> int:
    """Returns how many rows further on the completion of a row's KL pair is: 1 to rows - 1.

    Args:
      eval_fraction: data.eval_fraction, if it split the file's rows; 0 otherwise.

    Raises:
      ValueError: the file has a single row.
    """
    if rows < 2:
        split = f" in each split of data.eval_fraction {eval_fraction}" if eval_fraction else ""
        change = ", choose another fraction" if eval_fraction else ""
        raise ValueError(
            f"{path}: KTO's KL pairs take the completion of another row of the file (found {rows} row, expected at "
            f"least 2{split}). Add rows{change}, or set preference.loss_type to apo_zero_unpaired, which needs no "
            "pairs."
        )
    return int(np.random.default_rng([seed, rows]).integers(1, rows))


def wrapped_ranges(begin: int, end: int, n: int) -> list[tuple[int, int]]:
    """Returns [begin, end) of a file of n rows that repeats without end, as ranges of the file."""
    edges = [begin, *range((begin // n + 1) * n, end, n), end]
    return [(a % n, a % n + b - a) for a, b in itertools.pairwise(edges) if b > a]


def pair_rows(rows: TokenRows, shift: int, max_length: int) -> TokenRows:
    """Returns all rows of a file as trees, each with the completion of the row `shift` rows further on."""
    others = np.roll(np.arange(len(rows)), -shift).tolist()
    return _pair(rows, _completions(rows, others), max_length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedRows:
    """Stored rows as trees. Only rows that are read use memory."""

    stored: StoredRows
    shift: int
    max_length: int

    branching = True

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def number_limit(self) -> int:
        """One more than the highest number of a row."""
        return self.stored.number_limit

    @property
    def value_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of a row's values by name: those of two sequences."""
        return {name: (2 * shape[0], *shape[1:]) for name, shape in self.stored.value_shapes.items()}

    def read(self, start: int, stop: int) -> TokenRows:
        """Reads rows start to stop - 1, and the completions that they are paired with."""
        pieces = [self.stored.read(*span) for span in self._others(start, stop)]
        others = concatenate_rows(pieces, pieces[0].files)
        return _pair(self.stored.read(start, stop), _completions(others, range(len(others))), self.max_length)

    def lengths(self, start: int, stop: int) -> Int64[np.ndarray, " rows"]:
        """Reads the positions that rows start to stop - 1 fill in a batch, without reading ids."""
        prompts, own = self._sizes(start, stop)
        others = np.concatenate([self._sizes(*span)[1] for span in self._others(start, stop)])
        return prompts + own - 1 + np.minimum(others, self.max_length - prompts)

    def branch_counts(self, start: int, stop: int) -> Int64[np.ndarray, " rows"]:
        """Returns the number of branches of rows start to stop - 1."""
        return np.full(stop - start, 2)

    def line(self, number: int) -> int:
        """Returns the line of the row with that number; raises ValueError if it was dropped."""
        return self.stored.line(number)

    def _others(self, start: int, stop: int) -> list[tuple[int, int]]:
        return wrapped_ranges(start + self.shift, stop + self.shift, len(self.stored))

    def _sizes(self, start: int, stop: int) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
        """Reads the ids of each row's prompt, and of its completion."""
        starts, supervised = self.stored.read_mask(start, stop)
        prompts = _prompt_sizes(starts, supervised)
        return prompts, np.diff(starts) - prompts


def paired_digest(digest: str, shift: int, max_length: int) -> str:
    """Returns SHA-256 of a file's rows as trees, from the digest of its rows."""
    return hashlib.sha256(repr((digest, "KL pairs", shift, max_length)).encode()).hexdigest()


def _prompt_sizes(
    starts: Int64[np.ndarray, " rows_and_one"], supervised: Bool[np.ndarray, " total"]
) -> Int64[np.ndarray, " rows"]:
    """Returns the number of ids before each row's first target. A row's first id is never a target."""
    marked = np.flatnonzero(supervised)
    return marked[np.searchsorted(marked, starts[:-1] + 1)] - starts[:-1]


def _completions(rows: TokenRows, indices: Iterable[int]) -> Iterator[Completion]:
    prompts = _prompt_sizes(rows.starts, rows.supervised)
    for index in indices:
        ids, supervised = rows.row(index)
        yield ids[prompts[index] :], supervised[prompts[index] :]


def _pair(rows: TokenRows, others: Iterable[Completion], max_length: int) -> TokenRows:
    """Returns rows as trees: the prompt without its last id, and that id before each completion.

    Args:
      others: the second completion of each row. It is cut so that prompt and completion have `max_length` ids at most.
    """
    prompts, sizes = _prompt_sizes(rows.starts, rows.supervised), np.diff(rows.starts)
    ids, supervised = [], []
    for index, (completion, mask) in enumerate(others):
        own, own_mask = rows.row(index)
        room, last = max_length - prompts[index], prompts[index] - 1
        ids += [own, own[last : last + 1], completion[:room]]
        supervised += [own_mask & (np.arange(len(own)) > last), np.zeros(1, bool), mask[:room]]
    added = np.array([len(one) for one in ids[2::3]], np.int64)
    count = len(rows)
    return dataclasses.replace(
        rows,
        ids=np.concatenate(ids),
        supervised=np.concatenate(supervised),
        starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes + 1 + added)]),
        branches=Branches(
            first=2 * np.arange(count + 1),
            begin=np.stack([prompts - 1, sizes], axis=1).ravel(),
            depth=np.repeat(prompts - 1, 2).astype(np.int32),
        ),
        values={name: np.repeat(values, 2, axis=1) for name, values in rows.values.items()},
    )
