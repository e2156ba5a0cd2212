"""Labels of rows: their values, the names of classes in a file, and labels that are refused."""

from collections.abc import Callable
from typing import Any

import pytest

from qlora_jax.config.schema import DataArgs
from qlora_jax.data.labels import find_labels, value_reader
from qlora_jax.data.row_kinds import ValueKind


@pytest.mark.parametrize(
    ("kind", "row", "values"),
    [
        ("none", {"label": 1}, {}),
        *[("desirable", {"label": label}, {"labels": [1.0]}) for label in (True, 1, 1.0, "1", "true", " True")],
        *[("desirable", {"label": label}, {"labels": [0.0]}) for label in (False, 0, "0", "false")],
        ("margin", {}, {"margins": [0.0, 0.0]}),
        ("margin", {"margin": 2}, {"margins": [2.0, 2.0]}),
        ("margin", {"margin": None}, {"margins": [0.0, 0.0]}),
        ("class", {"label": "b"}, {"labels": [1.0]}),
        ("class", {"label": " a "}, {"labels": [0.0]}),
        ("class", {"label": 3.0}, {"labels": [2.0]}),
        ("classes", {"label": ["b", 3]}, {"labels": [[0.0, 1.0, 1.0]]}),
        ("classes", {"label": []}, {"labels": [[0.0, 0.0, 0.0]]}),
        ("classes", {"a": 1, "b": "0", "3": False}, {"labels": [[1.0, 0.0, 0.0]]}),
        ("number", {"label": "-2.5e0"}, {"labels": [-2.5]}),
        ("number", {"label": 4}, {"labels": [4.0]}),
    ],
)
def test_values(kind: ValueKind, row: dict[str, Any], values: dict[str, Any]):
    assert value_reader(kind, ("a", "b", "3"))(row) == values


@pytest.mark.parametrize(
    ("kind", "row", "problem"),
    [
        *[("desirable", {"label": label}, "label is not binary") for label in (2, 0.5, None, "yes", [], -1)],
        ("class", {"label": "c"}, "unknown label .found 'c', expected one of 'a', 'b', '3'."),
        *[("class", {"label": label}, "expected a name or a whole number") for label in (None, [1], 0.5, " ")],
        ("class", {"label": -1}, "the row has no label"),
        ("classes", {"label": "a"}, "label is not a list of names"),
        ("classes", {"label": ["z"]}, "unknown label"),
        ("classes", {"a": 1, "b": 0}, "none for the labels '3' of head.labels"),
        ("classes", {"a": 1, "b": 0, "3": 2}, "3 is not binary"),
        *[("number", {"label": label}, "label is not a number") for label in (None, True, "x", "nan", "1e999")],
    ],
)
def test_labels_that_are_refused(kind: ValueKind, row: dict[str, Any], problem: str):
    with pytest.raises(ValueError, match=problem):
        value_reader(kind, ("a", "b", "3"))(row)


def test_classes_of_files_are_sorted_by_value_then_by_name(write_rows: Callable):
    a = write_rows([{"text": "t", "label": label} for label in (10, 2, "x", -1, None, "B")], "a.jsonl")
    b = write_rows([{"text": "t", "class": label} for label in ("2", "neutral")], "b.jsonl")
    data = DataArgs(train={a: 1.0, b: 1.0}, columns={b: {"label": "class"}})
    assert find_labels(data, "classification") == ("2", "10", "B", "neutral", "x")
    assert find_labels(data, "regression") == find_labels(data, "dpo") == ()
    listed = write_rows([{"text": "t", "label": label} for label in (["b"], [], ["c", "a"])], "c.jsonl")
    assert find_labels(DataArgs(train=listed), "multi_label") == ("a", "b", "c")


@pytest.mark.parametrize(("labels", "found"), [([1, 1], "found 1"), ([*range(1200)], "found 1001")])
def test_other_numbers_of_classes_are_refused(write_rows: Callable, labels: list[int], found: str):
    path = write_rows([{"text": "t", "label": label} for label in labels])
    with pytest.raises(
        ValueError, match=rf"wrong number of classes in the column 'label' \({found}, expected at least"
    ):
        find_labels(DataArgs(train=path), "classification")
