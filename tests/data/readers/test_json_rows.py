"""Arrays are read in pieces, with the rows and lines of the whole text; rows that are too long or deep are errors."""

import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data.readers import csv_rows, files, json_rows
from qlora_jax.data.readers.files import read_rows
from qlora_jax.data.readers.json_rows import BadValue, json_array, json_lines

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


def with_lines(elements: list, indent: int | None, escape: bool) -> tuple[str, list[tuple[int, object]]]:
    """Returns an array as text, and the line and value of each element."""
    text, expected = "\n[", []
    for number, element in enumerate(elements):
        text += " \n" if number % 3 == 1 else ""
        expected.append((1 + text.count("\n"), element))
        text += json.dumps(element, indent=indent, ensure_ascii=escape) + ("\n, " if number % 2 else ",")
    return text.rstrip(", \n") + "] \n", expected


@given(st.lists(values, max_size=8), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 40))
def test_an_array_in_pieces_has_the_values_and_lines_of_the_whole(elements, indent, escape, block):
    text, expected = with_lines(elements, indent, escape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_BLOCK", block)
        assert list(json_array(io.StringIO(text, newline="\n"))) == expected


@given(st.lists(values, min_size=1, max_size=5), st.floats(0, 1, exclude_max=True), st.integers(1, 40))
def test_a_cut_off_array_has_the_same_problem_in_pieces(elements, kept, block):
    text = json.dumps(elements, indent=1)
    text = text[: max(1, int(kept * len(text)))]
    whole = list(json_array(io.StringIO(text, newline="\n")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_BLOCK", block)
        assert list(json_array(io.StringIO(text, newline="\n"))) == whole
    assert isinstance(whole[-1][1], BadValue)


@given(st.lists(values, min_size=1, max_size=6), st.sampled_from(["\n", "\r\n", " \n", "\t\r\n"]), st.booleans())
def test_lines_have_the_values_of_json_whatever_surrounds_them(elements: list, end: str, last: bool):
    text = "".join(json.dumps(element) + end for element in elements)
    text = " " + (text if last else text.removesuffix(end)) + "\n \n\r\n"
    found = json_lines(io.StringIO(text, newline="\n"))
    assert [value for _, value in found] == [json.loads(json.dumps(element)) for element in elements]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"a": 1} {', "not JSON: Extra data at column 10"),
        ('\ufeff{"a": 1}', "not JSON: Unexpected UTF-8 BOM"),
        ('{"a": }', "not JSON: Expecting value at column 7"),
        ("9" * 5000, "can't be read: Exceeds the limit"),
        ('{"a": 1, "b": 2, "b": 3}', 'can\'t be read: an object has the key "b" twice; remove one of them'),
        ('{"a": [{"c": 1, "c": 1}]} ', 'can\'t be read: an object has the key "c" twice'),
    ],
)
def test_a_wrong_line_has_the_problem_that_json_names(line: str, problem: str):
    ((_, found),) = json_lines(io.StringIO(line + "\n", newline="\n"))
    assert isinstance(found, BadValue) and found.problem.startswith(problem)


WHOLE = json.dumps({"a": [True, None, -1.5e-7, {"b": "\u00e9\ud83d\ude00 \\"}], "c": float("inf")})


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_line_or_an_array_that_is_cut_anywhere_ends_too_early(end: str):
    for length in range(1, len(WHOLE)):
        ((line, found),) = json_lines(io.StringIO(WHOLE[:length] + end, newline="\n"))
        shown = WHOLE[:length] if length <= 60 else f"{WHOLE[:57]}..."
        assert line == 1 and isinstance(found, BadValue)
        assert found.problem == f"not JSON: the line ends too early at column {length + 1}: {shown.rstrip()}"
        _, (line, found) = json_array(io.StringIO(f"[1,\n{WHOLE[:length]}", newline="\n"))
        assert line == 2 and isinstance(found, BadValue)
        assert found.problem == f"not JSON: the array ends too early at column {length + 1}; reading stops there"


def test_a_repeated_key_is_an_error_with_file_and_line(tmp_path: Path):
    path = tmp_path / "rows.json"
    for text, more in (
        ('{"a": 1}\n{"a": 2, "a": 3}\n', ""),
        ('[{"a": 1},\n{"a": 2, "a": 3}]', "; reading stops there"),
    ):
        path.write_text(text)
        message = f'{path}:2: can\'t be read: an object has the key "a" twice; remove one of them{more}'
        with pytest.raises(ValueError, match=re.escape(message)):
            read_rows(path)


def test_an_array_is_read_as_its_rows_are_used():
    file = io.StringIO(json.dumps([{"text": "a" * 1000}] * 10_000), newline="\n")
    assert next(json_array(file)) == (1, {"text": "a" * 1000})
    assert file.tell() <= 1 << 20


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("rows.jsonl", '{"text": "a"}\n{"text": "%s"}\n{"text": "b"}\n', 2),
        ("rows.json", '[{"text": "a"},\n{"text": "%s"},\n{"text": "b"}]', 2),
        ("rows.csv", "text\na\n%s\nb\n", 3),
        ("rows.csv", 'text\na\n"x\n%s"\nb\n', 3),
        ("rows.tsv", "text\na\n%s\nb\n", 3),
    ],
)
def test_a_row_that_is_too_long_is_an_error_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, line: int
):
    for module in (json_rows, csv_rows):
        monkeypatch.setattr(module, "MAX_ROW", 1000)
    monkeypatch.setattr(json_rows, "_BLOCK", 100)
    path = tmp_path / name
    path.write_text(content % ("a" * 900))
    assert len(read_rows(path)) >= 2
    path.write_text(content % (("a" * 90 + "\n") * 30 if '"x' in content else "a" * 3000))
    with pytest.raises(
        ValueError, match=rf"1 of 2 rows can't be used:\n.*{name}:{line}.*: longer than .* characters, so"
    ):
        read_rows(path)


def test_a_line_of_a_text_file_that_is_too_long_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_rows, "MAX_ROW", 1000)
    monkeypatch.setattr(files, "MAX_ROW", 1000)
    (tmp_path / "prompts.txt").write_text("a\n" + "b" * 2000)
    lines = files.read_lines(tmp_path / "prompts.txt")
    assert next(lines) == (1, "a")
    with pytest.raises(ValueError, match=r"prompts\.txt:2: longer than"):
        next(lines)


@pytest.mark.parametrize("value", ["[" * 250 + "]" * 250, '{"a": ' * 250 + "1" + "}" * 250])
def test_rows_that_are_nested_too_deeply_are_problems_of_their_own(value: str):
    deep = f'{{"a": {value}}}'
    for rows in (json_lines(io.StringIO(f'{deep}\n{{"a": 1}}')), json_array(io.StringIO(f'[{deep},\n{{"a": 1}}]'))):
        (_, first), second = rows
        assert isinstance(first, BadValue) and "nested too deeply (found more than 200 levels" in first.problem
        assert second == (2, {"a": 1})
    brackets = json.dumps({"a": "[" * 1000, "b": [[]] * 1000})
    assert list(json_lines(io.StringIO(brackets))) == [(1, json.loads(brackets))]
