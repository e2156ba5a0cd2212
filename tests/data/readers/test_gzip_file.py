"""Gzip files that unpack to far more than their size are errors, after a small part of them."""

import gzip
import json
import random
from pathlib import Path

import pytest

from qlora_jax.data.readers import gzip_file
from qlora_jax.data.readers.files import read_rows, read_text


@pytest.mark.parametrize("read", [read_rows, read_text])
@pytest.mark.parametrize("content", [b"\n", b'{"text": "a"}\n', b"a"])
def test_a_file_made_to_fill_the_memory_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read, content):
    monkeypatch.setattr(gzip_file, "MAX_UNPACKED", 10_000)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(content * (1_500_000 // len(content))))
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz: unpacks to more than 200 times its size \(found more than"):
        read(path)


def test_rows_that_are_packed_well_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gzip_file, "MAX_UNPACKED", 1000)
    rows = [{"text": f"row {n} of many that look the same"} for n in range(2000)]
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert [row.data for row in read_rows(tmp_path / "rows.jsonl.gz")] == rows


@pytest.mark.parametrize("content", [b"", b"\n"])
def test_a_file_of_very_many_members_is_an_error(tmp_path: Path, content: bytes):
    path, row = tmp_path / "rows.jsonl.gz", gzip.compress(b'{"text": "a"}\n')
    path.write_bytes(gzip.compress(content) * 9_999 + row)
    assert [found.data for found in read_rows(path)] == [{"text": "a"}]
    path.write_bytes(gzip.compress(content) * 300_000 + row)
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz: too many gzip members \(found 300,001, expected at most"):
        read_rows(path)


def test_a_large_file_may_have_more_members(tmp_path: Path):
    row = json.dumps({"text": random.Random(0).randbytes(1000).hex()}).encode() + b"\n"
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(row) * 11_000)
    assert len(read_rows(tmp_path / "rows.jsonl.gz")) == 11_000
