"""Random rows that are trees, and what a position of a batch sees, by definition."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from qlora_jax.data.batching.packing import Batch
from qlora_jax.data.branch_tree import Branch
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import Place
from qlora_jax.data.rows import TokenRows, token_rows


class Shape(NamedTuple):
    """Ids of a trunk, and ids and depth of each branch."""

    trunk: int
    branches: tuple[tuple[int, int], ...]


def shapes(branches: st.SearchStrategy[int]) -> st.SearchStrategy[Shape]:
    """Shapes of rows with such numbers of branches; a row of none is one text."""

    @st.composite
    def shape(draw: st.DrawFn) -> Shape:
        trunk, count = draw(st.integers(0, 20)), draw(branches)
        if not count:
            return Shape(max(trunk, 2), ())
        return Shape(trunk, tuple((draw(st.integers(2, 9)), draw(st.integers(0, trunk))) for _ in range(count)))

    return shape()


def encode_tree(shape: Shape, seed: int, **values: list[float]) -> EncodedRow:
    """A row of that shape. All its ids differ from those of rows with other seeds, and about half are supervised."""
    total = shape.trunk + sum(size for size, _ in shape.branches)
    begins = shape.trunk + np.cumsum([0, *(size for size, _ in shape.branches)])[:-1]
    supervised = np.random.default_rng(seed).random(total) < 0.5
    branches = tuple(Branch(int(at), depth) for at, (_, depth) in zip(begins, shape.branches, strict=False))
    supervised[[branch.begin for branch in branches]] = False
    ids = 1000 * (seed + 1) + np.arange(total, dtype=np.int32)
    return EncodedRow(ids, supervised, 0, False, False, branches, values)


def make_trees(shapes: list[Shape]) -> TokenRows:
    """Rows of those shapes, numbered 0, 3, 6, ... as if others were dropped."""
    encoded = [encode_tree(shape, seed) for seed, shape in enumerate(shapes)]
    return token_rows("trees.jsonl", encoded, [Place(3 * n + 1, 3 * n) for n in range(len(shapes))])


class Target(NamedTuple):
    """A supervised target, and the text before it."""

    id: int
    text: tuple[int, ...]


def targets_of_row(rows: TokenRows, index: int) -> list[Target]:
    """Every supervised target of a row: those of its trunk, or whole text, and those of each branch."""
    ids, supervised = rows.row(index)
    branches = rows.branches_of(index)
    edges = [branch.begin for branch in branches] + [len(ids)]
    found = [Target(int(ids[n]), tuple(ids[:n].tolist())) for n in range(1, edges[0]) if supervised[n]]
    for branch, end in zip(branches, edges[1:], strict=True):
        before = ids[: branch.depth].tolist()
        own = ids[branch.begin : end].tolist()
        found += [Target(own[n], (*before, *own[:n])) for n in range(1, len(own)) if supervised[branch.begin + n]]
    return found


def targets_of_batch(batch: Batch) -> list[Target]:
    """Every target with a weight in the batch, and the inputs that its position sees, in the order of their positions.

    k is visible to q if it is not behind it, and in its segment or within the depth of its segment's parent.
    """
    assert batch.segments is not None and batch.parents is not None and batch.depths is not None
    found = []
    for at in np.ndindex(*batch.inputs.shape[:2]):
        segments, parents, depths = batch.segments[at], batch.parents[at], batch.depths[at]
        positions = depths + np.arange(len(segments)) - np.searchsorted(segments, segments)
        for q in np.flatnonzero(batch.weights[at]):
            own, trunk = segments == segments[q], (segments == parents[q]) & (positions < depths[q])
            seen = np.flatnonzero(own | trunk)
            seen = seen[seen <= q]
            assert positions[seen].tolist() == list(range(len(seen)))
            found.append(Target(int(batch.targets[at][q]), tuple(batch.inputs[at][seen].tolist())))
    return found
