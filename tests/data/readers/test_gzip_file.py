"""Gzip files that unpack to far more than their size are errors, after a small part of them."""

import gzip
import json
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
