"""Parquet files: the same rows as JSON, and the words of each error. pyarrow is an optional dependency."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.data.readers.files import read_rows
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from tests.data.loading import load

ROWS = [{"prompt": f"Is {n} odd?", "completion": "yes", "more": None} for n in range(5)]
CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, the extra `parquet`, is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return str(path)


def test_parquet_rows_are_those_of_json(tmp_path: Path, tokenizer: Tokenizer, write_rows: Callable):
    path = write_parquet(tmp_path / "rows.parquet", ROWS)
    assert read_rows(path) == read_rows(write_rows(ROWS))
    assert [row.data for row in read_rows(path)] == ROWS
    ours, theirs = load(tokenizer, train=path), load(tokenizer, train=write_rows(ROWS))
    assert ours.train.ids.tolist() == theirs.train.ids.tolist()
    chat = write_parquet(tmp_path / "chat.parquet", [{"messages": CHAT, "tools": None}] * 2)
    assert load(tokenizer, train=chat).report.train.form == "messages"


def test_broken_parquet_rows_and_files_are_told(tmp_path: Path, tokenizer: Tokenizer):
    path = write_parquet(tmp_path / "rows.parquet", [*ROWS, {"prompt": "Q", "completion": None, "more": None}])
    with pytest.raises(ValueError, match=r"1 of 6 rows(.|\n)*rows\.parquet:6: completion is null, expected text"):
        load(tokenizer, train=path)
    raw = Path(path).read_bytes()
    for content in (raw[:-20], b"PAR1" + b"\0" * 40, raw[:200] + b"\xff" * 50 + raw[250:]):
        (tmp_path / "broken.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.parquet: truncated or corrupt Parquet file"):
            read_rows(tmp_path / "broken.parquet")


def test_parquet_texts_and_names_that_are_none_are_told(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, the extra `parquet`, is not installed")
    from pyarrow import parquet

    buffers = [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
    text = pyarrow.Array.from_buffers(pyarrow.string(), 1, buffers)
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "bytes.parquet")
    with pytest.raises(ValueError, match=r"bytes\.parquet: a text in the Parquet file is not UTF-8 .*0xff"):
        read_rows(tmp_path / "bytes.parquet")
    parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match=r"twice\.parquet: several columns are named 'text'"):
        read_rows(tmp_path / "twice.parquet")


def test_without_pyarrow_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1\x15\x04\xff\xfe")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'qlora-jax\[parquet\]', or write the file as JSON Lines"):
        read_rows(tmp_path / "rows.parquet")
