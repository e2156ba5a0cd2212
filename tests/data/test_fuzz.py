"""Thousands of generated malformed rows: each is reported by its line, and nothing but ValueError is raised."""

import gzip
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_jax.config.objectives import ValueKind
from qlora_jax.config.schema import DataArgs
from qlora_jax.data.class_labels import value_reader
from qlora_jax.data.dataset import load_dataset
from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.readers.files import Row, read_rows
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from tests.data.sound_rows import SOUND_ROWS

# Objectives that read a label in another form than SOUND_ROWS has it.
LABELS = {"multi_label": ["1"], "regression": 0.5}
NAMES = ("rows.jsonl", "rows.json", "rows.jsonl.gz")  # the content decides, not the name
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
no_text = anything.filter(lambda value: not isinstance(value, str))
not_json = st.sampled_from(['{"text": ', "{'text': 'a'}", '{"text": "a"} trailing', "text", '{"a": 1,}', "NaNa"])


@st.composite
def malformed(draw: st.DrawFn, row_format: str) -> str:
    """A line that is certainly not a row of that format, for any of its objectives."""
    good, required = SOUND_ROWS[row_format], FORMATS[row_format].required
    kind = draw(st.sampled_from(["not json", "no object", "no column", "no text", "blank", "half"]))
    name = draw(st.sampled_from([column for column in required if column != "label"]))
    if kind == "not json":
        return draw(not_json)
    if kind == "no object":
        return json.dumps(draw(anything.filter(lambda value: not isinstance(value, dict))))
    if kind == "no column":
        return json.dumps({other: value for other, value in good.items() if other != name})
    if kind == "no text":
        lists = isinstance(good[name], list)
        wrong = draw(anything.filter(lambda value: not isinstance(value, list) or value) if lists else no_text)
        return json.dumps({**good, name: wrong})
    answer = required[-1]  # blank prompts are allowed
    text = " \n" if kind == "blank" else "\ud83d"
    return json.dumps(_with_text(good, answer, text))


def _with_text(row: dict[str, Any], column: str, text: str) -> dict[str, Any]:
    """The row with that text as its answer."""
    if not isinstance(row[column], list):
        return {**row, column: text}
    *before, last = row[column]
    return {**row, column: [*before, {**last, list(last)[-1]: text}]}


# Formats of other kinds have fewer files, and most of them run in CI only.
FEWER = [row_format.name for row_format in FORMATS.values() if row_format.kind != "text"]
CASES = [pytest.param(name, marks=pytest.mark.slow if name in FEWER[1:] else ()) for name in FORMATS]


@pytest.mark.parametrize("row_format", CASES)
def test_every_malformed_row_is_told_by_its_line(tokenizer: Tokenizer, row_format: str):
    """15 files of 7 malformed rows per format of texts, 4 per other one. Row 1 is good: a [ would begin an array."""
    places = st.lists(st.integers(1, 20), min_size=7, max_size=7, unique=True)

    @settings(max_examples=4 if row_format in FEWER else 15)
    @given(
        st.lists(malformed(row_format), min_size=7, max_size=7),
        places,
        st.sampled_from(NAMES),
        st.sampled_from(FORMATS[row_format].objectives),
    )
    def check(bad: list[str], at: list[int], name: str, objective: str):
        lines = [json.dumps(sound_row(row_format, objective))] * 21
        for line, text in zip(at, bad, strict=True):
            lines[line] = text.replace("\n", " ")
        told = error_of(tokenizer, row_format, objective, lines, name)
        assert "7 of 21 rows can't be used" in told
        found = re.findall(rf"/{re.escape(name)}:([\d, ]+): ", told)
        lines_told = [line for of_one in found for line in of_one.split(", ")]
        assert sorted(map(int, lines_told)) == [line + 1 for line in sorted(at)]

    check()


def sound_row(row_format: str, objective: str) -> dict[str, Any]:
    row = SOUND_ROWS[row_format]
    return {**row, "label": LABELS[objective]} if "label" in row and objective in LABELS else row


def error_of(tokenizer: Tokenizer, row_format: str, objective: str, lines: list[str], name: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path, content = Path(folder) / name, "\n".join(lines).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        with pytest.raises(ValueError) as error:
            load_fuzzed(tokenizer, row_format, objective, path)
    return str(error.value)


def load_fuzzed(tokenizer: Tokenizer, row_format: Any, objective: str, path: Path) -> None:
    load_dataset(
        DataArgs(train=str(path), format=row_format),
        tokenizer,
        seed=0,
        micro_batch_size=1,
        accumulation=1,
        objective=objective,
        labels=("0", "1") if objective in ("classification", "multi_label") else (),
    )


USES = [(name, objective) for name, row_format in FORMATS.items() for objective in row_format.objectives]


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(USES), st.lists(anything, min_size=1, max_size=5), st.sampled_from([None, 0, -1]))
def test_anything_else_is_read_or_told(
    tokenizer: Tokenizer, use: tuple[str, str], values: list[Any], changed: int | None
):
    """Values of any kind as rows, or as columns of a row: only ValueError is raised."""
    row_format, objective = use
    required, sound = FORMATS[row_format].required, sound_row(row_format, objective)
    rows = [value if changed is None else {**sound, required[changed]: value} for value in values]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in [sound, *rows]), encoding="utf-8")
        try:
            load_fuzzed(tokenizer, row_format, objective, path)
        except ValueError as error:
            assert f"{path}:" in str(error) and type(error) is ValueError


@settings(max_examples=300)
@given(st.sampled_from(get_args(ValueKind)), st.booleans(), anything | st.lists(leaves) | st.just(10**400))
def test_any_value_is_a_label_in_f32_or_told(kind: ValueKind, label_columns: bool, value: Any):
    row = {"label": value, "margin": value, "0": value, "1": value}
    try:
        found = value_reader(kind, ("0", "1"), label_columns=label_columns)(row)
    except ValueError as error:
        assert type(error) is ValueError
    else:
        assert all(np.isfinite(np.asarray(numbers, np.float32)).all() for numbers in found.values())


@settings(max_examples=100)
@given(st.binary(max_size=200), st.sampled_from(["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.jsonl.gz"]))
def test_files_of_any_bytes_are_read_or_told(tokenizer: Tokenizer, content: bytes, name: str):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            load_dataset(DataArgs(train=str(path)), tokenizer, seed=0, micro_batch_size=1, accumulation=1)
        except ValueError as error:
            assert str(path) in str(error) and type(error) is ValueError


DAMAGE: dict[str, Callable[[bytes, int, int], bytes]] = {
    "flip": lambda content, at, bit: content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :],
    "truncate": lambda content, at, bit: content[:at],
    "insert": lambda content, at, bit: content[:at] + bytes([1 << bit]) + content[at:],
    "duplicate": lambda content, at, bit: content[:at] + content[at - at // (bit + 1) :],
}


@pytest.fixture(scope="module")
def checked_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, bytes, list[Row], range]]:
    """Files with checksums: path, content, rows, and the part of the content that has a checksum."""
    folder = tmp_path_factory.mktemp("checked")
    rows = [{"prompt": f"Is {n} odd?", "completion": "yes" * n} for n in range(40)]
    lines, array = "".join(json.dumps(row) + "\n" for row in rows), json.dumps(rows, indent=1)
    columns = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows)
    for name, text in (("rows.jsonl.gz", lines), ("rows.json.gz", array), ("rows.csv.gz", columns)):
        (folder / name).write_bytes(gzip.compress(text.encode(), mtime=0))
    if pyarrow := _pyarrow():
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / "rows.parquet", write_page_checksum=True, use_dictionary=False)
    files = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        # The beginning of a gzip file has a time and a name, which do not matter; the end of a Parquet file has no sum.
        footer = 8 + int.from_bytes(content[-8:-4], "little") if path.suffix == ".parquet" else 0
        files[path.name] = path, content, read_rows(path), range(4, len(content) - footer)
    return files


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        return None
    return pyarrow


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([*DAMAGE]), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_damaged_files_with_checksums_are_errors_or_the_same(checked_files, damage: str, share: float, bit: int):
    """Never other rows, and nothing but ValueError is raised."""
    for path, content, rows, part in checked_files.values():
        path.write_bytes(DAMAGE[damage](content, part[int(share * len(part))], bit))
        try:
            found = read_rows(path)
        except ValueError as error:
            assert str(path) in str(error) and type(error) is ValueError
        else:
            assert found == rows


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([*DAMAGE]), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_any_damage_is_read_or_told(checked_files, damage: str, share: float, bit: int):
    """Also of text without a checksum, and of the end of a Parquet file."""
    for path, content, _, _ in checked_files.values():
        raw = gzip.decompress(content) if path.suffix == ".gz" else content
        damaged = path.with_name(f"damaged_{path.name.removesuffix('.gz')}")
        damaged.write_bytes(DAMAGE[damage](raw, int(share * len(raw)), bit))
        try:
            read_rows(damaged)
        except ValueError as error:
            assert str(damaged) in str(error) and type(error) is ValueError


@settings(max_examples=100)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=20), st.floats(0, 1))
def test_damaged_parquet_is_read_or_told(tokenizer: Tokenizer, changes: list[tuple[float, int]], kept: float):
    """Changes bytes of a file and truncates it."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow, of the extra `parquet`, is not installed")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        parquet.write_table(_table(), path)
        content = bytearray(path.read_bytes())
        for at, byte in changes:
            content[int(at * len(content))] = byte
        path.write_bytes(content if kept > 0.8 else content[: int(kept * len(content))])
        try:
            load_dataset(DataArgs(train=str(path)), tokenizer, seed=0, micro_batch_size=1, accumulation=1)
        except ValueError as error:
            assert str(path) in str(error) and type(error) is ValueError


def _table():
    import pyarrow

    return pyarrow.table({"instruction": ["Q"] * 9, "input": [""] * 9, "output": ["A", "B", "C"] * 3})
