"""Labels of rows: their values, the names of classes in a file, and labels that are refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from qlora_jax.config.objectives import ValueKind
from qlora_jax.config.schema import DataArgs
from qlora_jax.data.class_labels import find_labels, value_reader
from tests.data.loading import load


@pytest.mark.parametrize(
    ("kind", "row", "values"),
    [
        ("none", {"label": 1}, {}),
        *[("desirable", {"label": label}, {"labels": [1.0]}) for label in (True, 1, 1.0, "1", "true", " True")],
        *[("desirable", {"label": label}, {"labels": [0.0]}) for label in (False, 0, "0", "false")],
        ("margin", {}, {"margins": [0.0, 0.0]}),
        ("margin", {"margin": 2}, {"margins": [2.0, 2.0]}),
        *[("margin", {"margin": margin}, {"margins": [0.0, 0.0]}) for margin in (None, "", 0, "0")],
        ("margin", {"margin": "1.5"}, {"margins": [1.5, 1.5]}),
        ("class", {"label": "b"}, {"labels": [1.0]}),
        ("class", {"label": " a "}, {"labels": [0.0]}),
        *[("class", {"label": label}, {"labels": [2.0]}) for label in (3, 3.0, "3", "3.0", " 3.00 ")],
        ("classes", {"label": ["b", 3]}, {"labels": [[0.0, 1.0, 1.0]]}),
        ("classes", {"label": []}, {"labels": [[0.0, 0.0, 0.0]]}),
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
        *[
            (kind, {name: value}, f"{name} is not a finite number in f32")
            for kind, name in (("number", "label"), ("margin", "margin"))
            for value in (True, "x", [], "nan", math.nan, math.inf, 10**400, 1e39, "1e39")
        ],
        ("number", {"label": None}, "label is not a finite number in f32 .found None"),
    ],
)
def test_labels_that_are_refused(kind: ValueKind, row: dict[str, Any], problem: str):
    with pytest.raises(ValueError, match=problem):
        value_reader(kind, ("a", "b", "3"))(row)


def test_labels_in_columns_of_their_own():
    read = value_reader("classes", ("a", "3.0"), label_columns=True)
    assert read({"text": "t", "a": 1, "3.0": "0", "label": "other"}) == {"labels": [[1.0, 0.0]]}
    for row, problem in (({"a": 1, "label": ["a"]}, "for the labels '3.0' of head.labels"), ({"a": 2}, "3.0")):
        with pytest.raises(ValueError, match=problem):
            read(row)


def test_truth_values_have_the_names_of_json():
    assert value_reader("class", ("false", "true"))({"label": True}) == {"labels": [1.0]}


def test_classes_of_files_are_sorted_by_value_then_by_name(write_rows: Callable):
    a = write_rows([{"text": "t", "label": label} for label in (10, 2, "x", -1, None, "nan", "B")], "a.jsonl")
    b = write_rows([{"text": "t", "class": label} for label in ("2.0", "neutral")], "b.jsonl")
    data = DataArgs(train={a: 1.0, b: 1.0}, columns={b: {"label": "class"}})
    assert find_labels(data, "classification") == ("2", "10", "B", "nan", "neutral", "x")
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


@pytest.mark.parametrize("objective", ["classification", "multi_label", "regression"])
def test_a_missing_column_of_labels_is_an_error_with_the_setting(tokenizer, write_rows: Callable, objective: str):
    path = write_rows([{"text": "t", "sentiment": 1}] * 2)
    labels, named = ("no", "yes") if objective != "regression" else (), {"train": path, "objective": objective}
    hint = "no column for the labels 'no', 'yes' of head.labels" if objective == "multi_label" else "data.columns"
    with pytest.raises(ValueError, match=hint) as error:
        load(tokenizer, labels=labels, **named)
    assert path in str(error.value)
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: no column 'label'"):
        load(tokenizer, labels=labels, **{**named, "train": write_rows([{"text": "t", "label": 1}, {"text": "t"}])})


@pytest.mark.parametrize("objective", ["classification", "multi_label"])
def test_rows_of_another_kind_are_named_rather_than_their_missing_labels(write_rows: Callable, objective: str):
    path = write_rows([{"asked": "Q", "chosen": "a", "rejected": "b"}] * 2)
    data = DataArgs(train=path, columns={"prompt": "asked"})
    with pytest.raises(ValueError, match=rf"{path}: objective: {objective} trains on .*format 'preference'.*to dpo, "):
        find_labels(data, objective)


@pytest.mark.parametrize("objective", ["classification", "regression"])
def test_columns_of_labels_are_of_multi_label_only(tokenizer, write_rows: Callable, objective: str):
    path = write_rows([{"text": "t", "a": 1}])
    with pytest.raises(
        ValueError, match=rf"{objective} trains on texts with a label .*'text-label-columns'.*multi_label"
    ):
        load(tokenizer, train=path, format="text-label-columns", objective=objective, labels=("a", "b"))


def test_columns_of_labels_without_a_positive_are_used(tokenizer, write_rows: Callable):
    path = write_rows([{"text": "t", "a": 1, "b": 0, "c": 1}] * 2)
    report = load(tokenizer, train=path, objective="multi_label", labels=("a", "b")).report.train
    assert (report.labels, report.ignored_columns) == ({"a": 2, "b": 0}, ("c",))
