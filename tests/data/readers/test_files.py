"""Files as people write them: byte order marks, line ends, wrong suffixes, broken rows. Errors name file and line."""

import gzip
import json
import re
from pathlib import Path

import pytest

from qlora_jax.data.readers.files import Place, Row, read_rows

ROWS = [{"text": "a"}, {"text": "b\u2028c", "more": 1}, {"text": "é"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
ARRAY = json.dumps(ROWS, ensure_ascii=False, indent=1)


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("rows.jsonl", LINES + "\n", [1, 2, 3]),
        ("no_last_newline.jsonl", LINES, [1, 2, 3]),
        ("mark.jsonl", "\ufeff" + LINES, [1, 2, 3]),
        ("windows.jsonl", LINES.replace("\n", "\r\n") + "\r\n", [1, 2, 3]),
        ("blank.jsonl", "\n\n" + LINES.replace("\n", "\n \t\n") + "\n\n", [3, 5, 7]),
        ("lines_despite_the_name.json", LINES, [1, 2, 3]),
        ("array.json", ARRAY, [2, 5, 9]),
        ("array_despite_the_name.jsonl", "\ufeff \n" + ARRAY + "\n", [3, 6, 10]),
        ("one_line.json", json.dumps(ROWS), [1, 1, 1]),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_layout_gives_the_same_rows(tmp_path: Path, name: str, content: str, lines: list[int], zipped: bool):
    raw = content.encode()
    path = tmp_path / (name + ".gz" if zipped else name)
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    assert read_rows(path) == [Row(Place(line, n), row) for n, (line, row) in enumerate(zip(lines, ROWS, strict=True))]


def test_a_gzip_file_is_known_by_its_bytes(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_bytes(gzip.compress(LINES.encode()))
    assert len(read_rows(tmp_path / "rows.jsonl")) == 3


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "found no rows"),
        (b"\xef\xbb\xbf\n\n", "found no rows"),
        (b"[]", "found no rows"),
        (b'{"a": 1}\n{"a": \xff}\n', r":2: byte 15 is not UTF-8"),
        (
            b'{"a": 1}\n{"a": }\n\n{"a": 2\n',
            r"2 of 3 rows(.|\n)*:2: not JSON: Expecting value at column 7(.|\n)*:4 \(row 3\)",
        ),
        (
            b'{"a": 1}\n[1, 2]\n"x"\n',
            r"2 of 3 rows(.|\n)*:2: expected an object(.|\n)*found \[1, 2\](.|\n)*:3: .*found \"x\"",
        ),
        (b'{"a":\n  1\n}\n', r":1: not JSON"),
        (b'[{"a": 1},\n 7]', r"1 of 2 rows(.|\n)*:2: expected an object"),
        (b'[{"a": 1},\n {"a": }]', r":2: not JSON: Expecting value at column 8"),
        (b'[{"a": 1}\n {"a": 2}]', r":2: not JSON: expected ',' or '\]'"),
        (b'[{"a": 1},\n]', r":2: not JSON: expected a row after the comma"),
        (b'[{"a": 1},\n{"a": 2}', r":2 \(row 3\): not JSON: the array ends too early at column 9"),
        (b"[1, 1, 1]", r"bad\.jsonl:1 \(rows 1, 2, 3\): expected an object"),
        (b'[1, 1,\n {"a": 2}, 1]', r"bad\.jsonl:1 \(rows 1, 2\), 2 \(row 4\): expected an object"),
        (b'{"a": "\x01"}\n', r":1: not JSON: Invalid control character at column 8"),
        (b'{"a": "b', r":1: not JSON: the line ends too early at column 9"),
        (b'[{"a": "\x01"}]', r":1: not JSON: Invalid control character at column 9"),
        (b'[{"a": 1}]\n\n{"a": 2}', r":3 \(row 2\): more text after the end of the array"),
    ],
)
def test_bad_content_is_told_by_line(tmp_path: Path, content: bytes, told: str):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=told) as error:
        read_rows(tmp_path / "bad.jsonl")
    assert str(tmp_path / "bad.jsonl") in str(error.value)


def test_prose_is_told_with_what_rows_are(tmp_path: Path):
    for name, content in (("a.txt", b"Once upon\na time\n"), ("a.txt.gz", gzip.compress(b"\n Once"))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"Write rows such as .*tab-separated.* end its name in \.tsv\.$") as error:
            read_rows(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: not a file of rows (found text that begins with 'O'")
    (tmp_path / "rows.txt").write_text(LINES)
    assert len(read_rows(tmp_path / "rows.txt")) == 3


@pytest.mark.parametrize("content", ['{\n  "prompt": "a"\n}\n', '\n{ \r\n"data": [{"a": 1}]}'])
def test_an_object_over_several_lines_is_an_error_that_says_how_to_write_it(tmp_path: Path, content: str):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"rows\.json: a JSON object over several lines .*jq -c \. FILE.*its list NAME\."
    ):
        read_rows(tmp_path / "rows.json")


def test_a_folder_is_an_error_that_says_how_to_get_a_file_of_rows(tmp_path: Path):
    with pytest.raises(ValueError, match=rf"^{tmp_path}: a folder, expected a file of rows\. Name a file in it"):
        read_rows(tmp_path)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match=r"load_from_disk\(FOLDER\)\.to_parquet\(FILE\)\.$"):
        read_rows(tmp_path)


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5000])
def test_json_that_python_does_not_read_is_told(tmp_path: Path, value: str):
    path = tmp_path / "rows.jsonl"
    for content in (f'{{"a": 1}}\n{{"a": {value}}}\n', f'[{{"a": 1}},\n{{"a": {value}}}]'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"1 of 2 rows(.|\n)*:2: can't be read: "):
            read_rows(path)


def test_many_problems_are_counted_and_the_first_few_shown(tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text("".join(f"x{line}\n" for line in range(20)))
    with pytest.raises(ValueError, match=r"20 of 20 rows") as error:
        read_rows(tmp_path / "bad.jsonl")
    assert str(error.value).count("not JSON") == 8 and str(error.value).endswith("... and 12 more")


def test_what_is_wrong_with_many_rows_is_told_once(tmp_path: Path):
    path = tmp_path / "bad.jsonl"
    path.write_text("x\n" * 3 + "[]\n" + "x\n" * 7)
    with pytest.raises(ValueError, match=r"11 of 11 rows") as error:
        read_rows(path)
    _, of_ten, of_one = str(error.value).splitlines()
    assert of_ten.startswith(f"  {path}:1, 2, 3, 5, 6, 7, 8, 9 and 2 more rows: not JSON")
    assert of_one.startswith(f"  {path}:4: expected an object")


def test_broken_gzip_files_are_told(tmp_path: Path):
    whole = gzip.compress(LINES.encode())
    flipped = whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:]
    for content in (whole[:-12], whole[:15], flipped):
        (tmp_path / "rows.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"rows\.jsonl\.gz: truncated or corrupt gzip file"):
            read_rows(tmp_path / "rows.jsonl.gz")


def test_missing_files_are_told_with_the_nearest(tmp_path: Path):
    (tmp_path / "train.jsonl.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train\.jsonl: no such file\. Did you mean .*train\.jsonl\.gz\?"):
        read_rows(tmp_path / "train.jsonl")
    (tmp_path / "pc.jsonl").write_bytes(b"")
    for name in ("nowhere/train.jsonl", "nope.jsonl"):
        with pytest.raises(ValueError, match=r"no such file$"):
            read_rows(tmp_path / name)
    with pytest.raises(ValueError, match=r"Did you mean .*train\.jsonl\.gz\?"):
        read_rows(tmp_path / "trian.jsonl.gz")
    with pytest.raises(ValueError, match="can't be read: Not a directory"):
        read_rows(tmp_path / "pc.jsonl" / "train.jsonl")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("tatsu-lab/alpaca", ". Give a data set on the Hub as hf://datasets/org/name."),
        ("hf://tatsu-lab/alpaca", ". Give a data set on the Hub as hf://datasets/org/name."),
        ("https://example.org/rows.jsonl", ". Addresses are not fetched. Give a file"),
        ("[a.jsonl, b.jsonl]", ". Give several files with weights: {a.jsonl: 1, b.jsonl: 1}."),
    ],
)
def test_names_that_are_not_files_are_reported_with_the_right_notation(name: str, meant: str):
    with pytest.raises(ValueError, match="no such file" + re.escape(meant)):
        read_rows(Path(name))
