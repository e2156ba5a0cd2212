"""Token rows: trees and values in flat arrays, in any chunks, and what is refused."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data.branch_tree import Branch
from qlora_jax.data.readers.files import Place
from qlora_jax.data.rows import RowDigest, TokenRows, check_ids, concatenate_rows, token_rows
from tests.data.trees import Shape, encode_tree, make_trees, shapes


def rows_of(shapes: list[Shape], first: int = 0, **values: list[float]) -> TokenRows:
    encoded = [encode_tree(shape, first + n, **values) for n, shape in enumerate(shapes)]
    return token_rows("rows.jsonl", encoded, [Place(first + n + 1, first + n) for n in range(len(shapes))])


@settings(max_examples=40)
@given(st.lists(st.lists(shapes(st.integers(0, 2)), max_size=3), min_size=1, max_size=4))
def test_chunks_change_neither_rows_nor_digest(chunks: list[list[Shape]]):
    flat = [shape for chunk in chunks for shape in chunk]
    pieces, at = [], 0
    for chunk in chunks:
        pieces.append(rows_of(chunk, at, labels=[1.0, 0.5]))
        at += len(chunk)
    whole, joined = rows_of(flat, labels=[1.0, 0.5]), concatenate_rows(pieces, pieces[0].files)
    assert [joined.branches_of(n) for n in range(len(flat))] == [whole.branches_of(n) for n in range(len(flat))]
    np.testing.assert_array_equal(joined.lengths, whole.lengths)
    assert {name: array.tolist() for name, array in joined.values.items()} == {
        name: array.tolist() for name, array in whole.values.items()
    }
    digest = RowDigest()
    for piece in pieces:
        digest.update(piece)
    assert digest.hexdigest() == whole.digest == joined.digest


def test_branches_and_values_change_the_digest():
    pair = Shape(4, ((3, 4), (3, 4)))
    digests = [
        rows_of([pair]).digest,
        rows_of([pair], labels=[0.0, 1.0]).digest,
        rows_of([pair], labels=[1.0, 1.0]).digest,
        rows_of([pair], margins=[1.0, 1.0]).digest,
        rows_of([Shape(4, ((3, 3), (3, 4)))]).digest,
        rows_of([Shape(4, ((4, 4), (2, 4)))]).digest,
        dataclasses.replace(rows_of([pair]), branches=None).digest,
    ]
    assert len(set(digests)) == len(digests)


def test_rows_without_the_same_values_are_refused():
    pair = Shape(4, ((3, 4), (3, 4)))
    with pytest.raises(
        ValueError, match=r"rows\.jsonl: its rows are of another kind .* \(found values labels \[1\], expected none\)"
    ):
        concatenate_rows([rows_of([pair]), rows_of([pair], labels=[1.0])], ())
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: found the values \['labels'\], but other rows have \[\]"):
        token_rows("rows.jsonl", [encode_tree(pair, 0), encode_tree(pair, 1, labels=[1.0])], [Place(1, 0), Place(2, 1)])


def test_branches_that_contradict_their_row_are_refused_with_file_and_line():
    row = encode_tree(Shape(4, ((3, 4),)), 0)._replace(branches=(Branch(4, 5),))
    with pytest.raises(ValueError, match=r"rows\.jsonl:8 \(row 1\): the branch at 4 has depth 5, expected 0 to 4"):
        token_rows("rows.jsonl", [row], [Place(8, 0)])


def test_ids_of_every_branch_are_checked():
    rows = make_trees([Shape(3, ((4, 3), (5, 3))), Shape(3, ((4, 3), (5, 3)))])  # ids 1000 to 1011, 2000 to 2011
    assert check_ids(rows, 2012) is rows
    with pytest.raises(ValueError, match=r"trees\.jsonl:4: an id has no row .* \(found 2011, expected 0 to 2010\)"):
        check_ids(rows, 2011)
