"""Rows of trunks and branches, and which keys their queries see by definition."""

import numpy as np


def row_of_trees(length: int, trees: list[tuple[int, list[tuple[int, int]]]]) -> np.ndarray:
    """Returns (segments, parents, depths, index in the segment) [4, T] of a row, whose padding is a separate text.

    Args:
      trees: for each tree, the trunk's positions, and (depth, positions) of each branch.
    """
    parts, segment = [], 0

    def add(parent: int, depth: int, count: int) -> None:
        nonlocal segment
        parts.append([np.full(count, segment), np.full(count, parent), np.full(count, depth), np.arange(count)])
        segment += 1

    for trunk, branches in trees:
        of_trunk = segment
        add(segment, 0, trunk)
        for depth, count in branches:
            add(of_trunk if trunk else segment, depth, count)
    add(segment, 0, length - sum(len(part[0]) for part in parts))
    return np.concatenate(parts, axis=1).astype(np.int32)


def random_trees(rng: np.random.Generator, length: int) -> np.ndarray:
    """Draws a row of trees: empty and long trunks, and branches at any depth."""
    trees, left = [], length
    while left > 8 and rng.random() < 0.9:
        trunk = int(rng.integers(0, left // 2))
        left -= trunk
        branches = []
        for _ in range(rng.integers(0, 4)):
            count = int(rng.integers(1, max(left // 3, 2)))
            if count > left:
                break
            branches.append((int(rng.integers(0, trunk + 1)), count))
            left -= count
        trees.append((trunk, branches))
    return row_of_trees(length, trees)


def visible_keys(rows_B4T: np.ndarray, window: int | None) -> np.ndarray:
    """Returns the mask [B, T, T] by definition: earlier in the row, same segment or parent before depth, in window."""
    segments, parents, depths, index = (rows_B4T[:, i] for i in range(4))
    position = depths + index
    queries, keys = np.s_[:, :, None], np.s_[:, None, :]
    length = segments.shape[1]
    earlier = np.tril(np.ones((length, length), bool))
    own = segments[queries] == segments[keys]
    of_parent = (segments[keys] == parents[queries]) & (position[keys] < depths[queries])
    near = position[queries] - position[keys] < (length if window is None else window)
    return earlier & (own | of_parent) & near
