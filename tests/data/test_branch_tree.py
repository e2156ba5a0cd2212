"""Trees: their sizes, and which branches are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data.branch_tree import (
    Branch,
    branch_problem,
    concatenate_branches,
    join_branches,
    lay_out,
    longest_text,
    no_branches,
    whole_texts,
)
from tests.data.trees import Shape, Target, encode_tree, make_trees, shapes, targets_of_row


def test_a_pair_repeats_only_the_last_position_of_its_prompt():
    """Prompt 1 2 3, chosen 4 5, rejected 6."""
    ids = np.array([1, 2, 3, 4, 5, 3, 6], np.int32)
    supervised = np.array([0, 0, 0, 1, 1, 0, 1], bool)
    row = lay_out(ids, supervised, (Branch(2, 2), Branch(5, 2)))
    assert row.inputs.tolist() == [1, 2, 3, 4, 3]
    assert (row.targets * row.weights).tolist() == [0, 0, 4, 5, 6]
    assert row.segments.tolist() == [0, 0, 1, 1, 2] and row.parents.tolist() == [0] * 5
    assert row.depths.tolist() == [0, 0, 2, 2, 2] and row.branches.tolist() == [-1, -1, 0, 0, 1]


def test_two_texts_without_a_trunk_are_segments_of_their_own():
    row = lay_out(np.arange(5, dtype=np.int32), np.zeros(5, bool), (Branch(0, 0), Branch(3, 0)))
    assert row.inputs.tolist() == [0, 1, 3] and row.targets.tolist() == [1, 2, 4]
    assert row.segments.tolist() == row.parents.tolist() == row.branches.tolist() == [0, 0, 1]


@given(st.lists(shapes(st.integers(0, 4)), min_size=1, max_size=6))
def test_lengths_are_the_positions_filled(drawn: list[Shape]):
    rows = make_trees(drawn)
    for index, shape in enumerate(drawn):
        filled = lay_out(*rows.row(index), rows.branches_of(index))
        expected = shape.trunk + sum(size - 1 for size, _ in shape.branches) - (not shape.branches)
        assert rows.lengths[index] == len(filled.inputs) == expected
        texts = [shape.trunk, *(depth + size for size, depth in shape.branches)]
        assert longest_text(len(rows.row(index)[0]), rows.branches_of(index)) == max(texts)


@given(st.lists(st.lists(shapes(st.integers(0, 3)), max_size=4), min_size=1, max_size=4))
def test_joined_chunks_have_the_branches_of_their_rows(chunks: list[list[Shape]]):
    encoded = [[encode_tree(shape, seed).branches for seed, shape in enumerate(chunk)] for chunk in chunks]
    whole = concatenate_branches([join_branches(rows) for rows in encoded])
    flat = [row for rows in encoded for row in rows]
    assert [whole.row(index) for index in range(len(flat))] == flat
    assert whole.counts.tolist() == [len(row) for row in flat]
    assert no_branches(3).counts.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("branches", "problem"),
    [
        ([Branch(2, 2), Branch(5, 3)], "the branch at 5 has depth 3, expected 0 to 2, the trunk's ids"),
        ([Branch(2, 2), Branch(3, 2)], "the branch at 2 has 1 ids, expected at least 2"),
        ([Branch(2, 2), Branch(6, 2)], "the branch at 6 has 1 ids, expected at least 2"),
        ([Branch(4, 2)], "the first id of the branch at 4 is supervised, but no position predicts it"),
        ([Branch(2, 2), Branch(5, 0)], None),
        ([], None),
    ],
)
def test_branches_that_contradict_their_ids_are_reported(branches: list[Branch], problem: str | None):
    assert branch_problem(branches, np.array([0, 0, 0, 1, 1, 0, 1], bool)) == problem


@given(shapes(st.integers(0, 4)))
def test_whole_texts_have_each_target_once_behind_its_own_text(shape: Shape):
    rows = make_trees([shape])
    texts = whole_texts(*rows.row(0), rows.branches_of(0))
    found = [Target(int(ids[n]), tuple(ids[:n].tolist())) for ids, mask in texts for n in np.flatnonzero(mask[1:]) + 1]
    assert sorted(found) == sorted(targets_of_row(rows, 0))
