"""Parquet files: the same rows as JSON, and the words of each error. pyarrow is an optional dependency."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data.readers import parquet_rows
from qlora_jax.data.readers.files import read_rows
from qlora_jax.data.readers.parquet_rows import read_row_groups
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from tests.data.loading import load

ROOT = Path(__file__).parents[3]
ROWS = [{"prompt": f"Is {n} odd?", "completion": "yes", "more": None} for n in range(5)]
CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


READ = """
import resource, sys
from qlora_jax.data.readers.files import stream_rows
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
print(len(next(stream_rows(sys.argv[1])).data["text"]))
"""


READ_ALL = """
import resource, sys
from qlora_jax.data.readers.files import read_rows
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
read_rows(sys.argv[1])
"""


def write_parquet(path: Path, rows: list[dict[str, Any]], row_group_size: int = 2) -> str:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, the extra `parquet`, is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return str(path)


def test_parquet_rows_are_those_of_json(tmp_path: Path, tokenizer: Tokenizer, write_rows: Callable):
    path = write_parquet(tmp_path / "rows.parquet", ROWS)
    assert read_rows(path) == read_rows(write_rows(ROWS))
    assert [row.data for row in read_rows(path)] == ROWS
    ours, theirs = load(tokenizer, train=path), load(tokenizer, train=write_rows(ROWS))
    assert ours.digest == theirs.digest
    chat = write_parquet(tmp_path / "chat.parquet", [{"messages": CHAT, "tools": None}] * 2)
    assert load(tokenizer, train=chat).report.train.form == "messages"


PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.none() | st.text(max_size=4)}), max_size=3)
TURNS = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.none() | PARTS})
CHATS = st.fixed_dictionaries(
    {
        "messages": st.none() | st.lists(TURNS, max_size=3),
        "tags": st.lists(
            st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=2).map(lambda d: [*d.items()])
        ),
        "scores": st.lists(st.lists(st.integers(0, 9) | st.none(), max_size=2), max_size=2),
        "image": st.none() | st.binary(max_size=3),
    }
)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("by_dictionaries", [False, True])
@given(rows=st.lists(CHATS, min_size=1, max_size=6), data=st.data())
def test_lists_of_structures_of_lists_are_read(
    tmp_path_factory: pytest.TempPathFactory,
    large: bool,
    by_dictionaries: bool,
    rows: list[dict[str, Any]],
    data: st.DataObject,
):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, the extra `parquet`, is not installed")
    from pyarrow import parquet

    text = pyarrow.large_string() if large else pyarrow.string()
    many = pyarrow.large_list if large else pyarrow.list_
    part = pyarrow.struct([("type", text), ("text", text)])
    turn = pyarrow.struct([("role", text), ("content", many(part))])
    kinds = {"messages": many(turn), "tags": many(pyarrow.map_(text, text)), "scores": many(many(pyarrow.int8()))}
    table = pyarrow.Table.from_pylist(rows, pyarrow.schema([*kinds.items(), ("image", pyarrow.binary())]))
    path = tmp_path_factory.mktemp("lists") / "rows.parquet"
    size, booleans = data.draw(st.integers(1, 7)), [data.draw(st.booleans()) for _ in range(2)]
    parquet.write_table(
        table, path, row_group_size=size, use_dictionary=booleans[0], store_schema=booleans[1], data_page_size=16
    )
    with pytest.MonkeyPatch.context() as patch:
        if by_dictionaries:
            patch.setattr(parquet_rows, "_MAX_COLUMN", 0)
        assert [row.data for row in read_rows(path)] == rows


def test_chats_with_content_parts_are_those_of_json(tmp_path: Path, tokenizer: Tokenizer, write_rows: Callable):
    parts = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in CHAT]
    path = write_parquet(tmp_path / "parts.parquet", [{"messages": parts}] * 3)
    texts = write_rows([{"messages": CHAT}] * 3)
    assert load(tokenizer, train=path).digest == load(tokenizer, train=texts).digest


def test_rows_that_pages_lack_are_an_error(tmp_path: Path):
    """pyarrow writes a row with an empty list so that it reads none, if pages are to have one byte."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, the extra `parquet`, is not installed")
    from pyarrow import parquet

    lists = pyarrow.table({"messages": pyarrow.array([[]], pyarrow.list_(pyarrow.string()))})
    parquet.write_table(lists, tmp_path / "rows.parquet", data_page_size=1)
    with pytest.raises(ValueError, match=r"rows\.parquet: truncated or corrupt .*it declares 1 rows and has 0"):
        read_rows(tmp_path / "rows.parquet")


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


def test_a_value_that_all_rows_share_is_in_few_of_them_at_once(tmp_path: Path):
    """A file of 1 kB whose 200,000 rows have the same 8 MB of text."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, the extra `parquet`, is not installed")
    from pyarrow import parquet

    indices = pyarrow.array([0] * 200_000, pyarrow.int32())
    texts = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["a" * (8 << 20)]))
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": texts}), path, compression="zstd", dictionary_pagesize_limit=1 << 30)
    assert path.stat().st_size < 2000
    done = subprocess.run([sys.executable, "-c", READ, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{8 << 20}\n"), done.stderr


def test_a_list_that_repeats_a_value_beyond_the_memory_is_an_error_with_its_row_and_column(tmp_path: Path):
    """A file of 1 kB whose second row has 300 parts of the same 8 MB of text."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, the extra `parquet`, is not installed")
    from pyarrow import parquet

    indices = pyarrow.array([0] + [1] * 300, pyarrow.int32())
    texts = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["a", "b" * (8 << 20)]))
    parts = pyarrow.StructArray.from_arrays([texts], ["text"])
    lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, 301], pyarrow.int32()), parts)
    path, table = tmp_path / "rows.parquet", pyarrow.table({"messages": lists})
    parquet.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False)
    assert path.stat().st_size < 2000
    done = subprocess.run([sys.executable, "-c", READ_ALL, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and (
        f"ValueError: {path}:2: messages: too long (found 2,516,582,400 bytes, expected at most 67,108,864). Split"
        in done.stderr
    )


def test_ordinary_columns_are_read_in_large_batches(tmp_path: Path):
    texts = [{"prompt": f"{n} " + "word " * 50, "completion": ["yes", "no"][n % 2]} for n in range(5000)]
    path = Path(write_parquet(tmp_path / "rows.parquet", texts, row_group_size=500))
    assert parquet_rows._rows_per_batch(path, read_row_groups(path)) == 1024
    header = bytes([0x15, 4, 0x15, 0x80, 0x80, 0x80, 0x08, 0x15, 0])
    assert parquet_rows._unpacked_page_size(header, 7) == 8 << 20
    assert parquet_rows._unpacked_page_size(b"\x00" * 16, 7) == 7


def test_a_file_that_declares_wrong_sizes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    texts = [" ".join(str(n**7) for n in range(start, start + 2000)) for start in (0, 5000)]
    path = Path(write_parquet(tmp_path / "rows.parquet", [{"prompt": text} for text in texts]))
    content = path.read_bytes()
    path.write_bytes(content[:4] + content[20_000:])  # the end of the file, which has the columns' positions, is whole
    with pytest.raises(ValueError, match=r"corrupt Parquet file \(the column \w+ is not inside the file\)"):
        read_rows(path)
    monkeypatch.setattr(parquet_rows, "MAX_UNPACKED", 1)
    monkeypatch.setattr(parquet_rows, "MAX_RATIO", 0)
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"the column prompt unpacks to more than 0 times its size .found [\d,]+ and [\d,]+ bytes"
    ):
        read_rows(path)


def test_without_pyarrow_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1\x15\x04\xff\xfe")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'qlora-jax\[parquet\]', or write the file as JSON Lines"):
        read_rows(tmp_path / "rows.parquet")
