"""Comma- and tab-separated files: fields, lines, and the words of each error."""

import csv
import gzip
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.config.schema import DataArgs
from qlora_jax.data.dataset import load_dataset
from qlora_jax.data.readers.csv_rows import DIALECTS, parse_columns
from qlora_jax.data.readers.files import read_rows

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=12)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=8))
def test_what_csv_writes_is_read_back(rows):
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([("prompt", "completion"), *rows])
    read = list(parse_columns(io.StringIO(out.getvalue(), newline="\n"), DIALECTS[".csv"]))
    assert [(row["prompt"], row["completion"]) for _, row in read] == rows
    line = 2
    for found, row in read:
        assert found == line
        line += 1 + row["prompt"].count("\n") + row["completion"].count("\n")


def test_a_lone_quote_in_a_tab_separated_file_swallows_no_row(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text('prompt\tcompletion\n"Half a quote\tyes\nanother\tno "\n')
    assert [row.data for row in read_rows(path)] == [
        {"prompt": '"Half a quote', "completion": "yes"},
        {"prompt": "another", "completion": 'no "'},
    ]


def test_gzipped_with_a_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbfprompt,completion\r\n"1,5","a\r\nb"\r\n\r\nx,y\r\n'))
    rows = read_rows(path)
    assert [row.data for row in rows] == [{"prompt": "1,5", "completion": "a\r\nb"}, {"prompt": "x", "completion": "y"}]
    assert [row.place.line for row in rows] == [2, 5]


def test_columns_without_a_name_are_told_among_those_not_used(tmp_path, tokenizer):
    """pandas writes its index without a name, and spreadsheets empty columns."""
    path = tmp_path / "rows.csv"
    path.write_text(",prompt,completion,,\n0,Q,A,,\n1,R,B,,\n")
    dataset = load_dataset(DataArgs(train=str(path)), tokenizer, seed=0, micro_batch_size=1, accumulation=1)
    nameless = ("column 1 (without a name)", "column 4 (without a name)", "column 5 (without a name)")
    assert (dataset.report.train.kept, dataset.report.train.ignored_columns) == (2, nameless)
    values = dict(zip(nameless, ("1", "", ""), strict=True))
    assert read_rows(path)[1].data == {"prompt": "R", "completion": "B", **values}


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("prompt;completion\n1,5;a, b\n", [("1,5", "a, b")]),
        ('prompt;"completion"\r\n"Q;1";"A\n2"\r\n', [("Q;1", "A\n2")]),
        ("\n\r\nprompt;completion\nQ;A\n", [("Q", "A")]),
        ("prompt\tcompletion\nQ\tA, B; C\n", [("Q", "A, B; C")]),
        ("prompt|completion\nQ|A\n", [("Q", "A")]),
        ("prompt,completion\nQ;1,A\n", [("Q;1", "A")]),
        ('"prompt",completion\nQ;1,A\n', [("Q;1", "A")]),
    ],
)
def test_the_header_decides_how_columns_are_separated(tmp_path, content, rows):
    path = tmp_path / "rows.csv"
    path.write_bytes(content.encode())
    assert [tuple(row.data.values()) for row in read_rows(path)] == rows
    assert [*read_rows(path)[0].data] == ["prompt", "completion"]


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"\r', "\nSEP=;"])
def test_a_line_for_the_separator_comes_before_the_header(tmp_path, first):
    path = tmp_path / "rows.csv"
    path.write_bytes(f"\ufeff{first}\nprompt, or text;completion\n1,5;a, b\nR\n".encode())
    line = first.count("\n") + 4
    with pytest.raises(ValueError, match=rf"1 of 2 rows can't be used:\n.*csv:{line} \(row 2\): found 1 fields"):
        read_rows(path)
    path.write_bytes(path.read_bytes().removesuffix(b"R\n"))
    assert [row.data for row in read_rows(path)] == [{"prompt, or text": "1,5", "completion": "a, b"}]


@pytest.mark.parametrize("name", ["sep=x", "sep="])
def test_a_header_like_the_line_for_the_separator_stays_one(tmp_path, name):
    path = tmp_path / "rows.csv"
    path.write_text(f"{name}\n1\n")
    assert read_rows(path)[0].data == {name: "1"}


def test_a_separator_inside_a_quoted_name_does_not_count(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('id;"text, or title"\n1;A\n')
    assert read_rows(path)[0].data == {"id": "1", "text, or title": "A"}


def test_a_file_of_one_column_has_no_separator(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text\nOnce; upon | a time\n")
    assert read_rows(path)[0].data == {"text": "Once; upon | a time"}


def test_lines_are_counted_from_the_first_also_if_it_is_blank(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("\n\nprompt;completion\nQ;A\nR\n")
    with pytest.raises(ValueError, match=r"1 of 2 rows can't be used:\n.*csv:5 \(row 2\): found 1 fields"):
        read_rows(path)


def test_a_field_may_be_long(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"text\n{'a' * 300_000}\n")
    assert len(read_rows(path)[0].data["text"]) == 300_000


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", r"the first line has to name each column once .found \[\]"),
        ("a,a\n1,2\n", r"each column once .found \['a', 'a'\]"),
        (
            ",a,,a\n0,1,2,3\n",
            r"each column once .found \['', 'a', '', 'a'\].\. Write the names there",
        ),
        (",\n1,2\n", r"the first line has to name each column once .found \['', ''\]"),
        ("prompt,completion\n", "found no rows, expected a line of column names and then rows"),
        (
            "prompt,completion\n1,2\n1,2,3\n4\n",
            r"2 of 3 rows.*\n.*:3 .*found 3 fields, expected the header's 2.*\n.*:4 .*found 1 f",
        ),
        ('prompt,completion\n1,"2\n', r"1 of 1 rows.*\n.*:2.*not ','-separated: unexpected end of data"),
        ('prompt,completion\n1,"2"x\n', r":2.*not ','-separated"),
    ],
)
def test_broken_files_are_told_by_line(tmp_path, content, told):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=told):
        read_rows(path)
