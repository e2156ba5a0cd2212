"""Sizes in Parquet footers: those that pyarrow finds, and an error where asking pyarrow ends the process."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data.readers.files import read_rows
from qlora_jax.data.readers.parquet_rows import BYTE_ARRAY, DELTA_BYTE_ARRAY, read_row_groups

ASK = """
import sys
from pyarrow import parquet
print(parquet.ParquetFile(sys.argv[1]).metadata.row_group(0).column(0))
"""
VALUES = {"texts": ["a", "bc", None], "flags": [True, None, False], "bytes": [b"", b"\xff", None]}
VALUES |= {
    "lists": [["a", None], [], None],
    "days": [0, 1, 2],
    "numbers": [1.5, None, -2.0],
    "maps": [[("k", 1)], [], []],
}


def table(rows: int) -> Any:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, the extra `parquet`, is not installed")
    kinds = {"maps": pyarrow.map_(pyarrow.string(), pyarrow.int64()), "days": pyarrow.date32()}
    made = {name: pyarrow.array((values * rows)[:rows], kinds.get(name)) for name, values in VALUES.items()}
    return pyarrow.table(made)


@settings(max_examples=12)
@given(data=st.data())
def test_sizes_are_those_of_pyarrow(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    columns, booleans = table(data.draw(st.integers(0, 20))), st.booleans()
    from pyarrow import parquet

    path = tmp_path_factory.mktemp("footer") / "rows.parquet"
    parquet.write_table(
        columns,
        path,
        row_group_size=data.draw(st.sampled_from([4, 7, 100])),
        use_dictionary=data.draw(booleans),
        compression=data.draw(st.sampled_from(["none", "zstd"])),
        write_statistics=data.draw(booleans),
        write_page_index=data.draw(booleans),
        store_schema=data.draw(booleans),
        store_decimal_as_integer=data.draw(booleans),
        data_page_version=data.draw(st.sampled_from(["1.0", "2.0"])),
        sorting_columns=data.draw(st.sampled_from([None, [parquet.SortingColumn(4)]])),
    )
    metadata = parquet.read_metadata(path)
    found = read_row_groups(path)
    assert [group.rows for group in found] == [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    for number, group in enumerate(found):
        theirs = [metadata.row_group(number).column(index) for index in range(metadata.num_columns)]
        assert [
            (c.name, c.values, c.unpacked, c.packed, c.data_page, c.dictionary_page, c.physical_type == BYTE_ARRAY)
            for c in group.columns
        ] == [
            (
                *(c.path_in_schema, c.num_values, c.total_uncompressed_size, c.total_compressed_size),
                *(c.data_page_offset, c.dictionary_page_offset, c.physical_type == "BYTE_ARRAY"),
            )
            for c in theirs
        ]


def test_an_encoding_that_repeats_the_beginning_of_values_is_found(tmp_path: Path):
    columns = table(3).select(["texts"])
    from pyarrow import parquet

    for encoding in ("DELTA_BYTE_ARRAY", "PLAIN"):
        parquet.write_table(
            columns, tmp_path / "rows.parquet", use_dictionary=False, column_encoding={"texts": encoding}
        )
        ((chunk,), _) = read_row_groups(tmp_path / "rows.parquet")[0]
        assert (DELTA_BYTE_ARRAY in chunk.encodings) == (encoding == "DELTA_BYTE_ARRAY")


def test_a_footer_for_which_pyarrow_ends_the_process_is_an_error(tmp_path: Path):
    """The schema says that a text is required; its size statistics count missing ones."""
    columns = table(3).select(["texts"])
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(columns, path, store_schema=False)
    content = path.read_bytes()
    optional, required = (bytes([0x25, n]) + b"\x18\x05texts" for n in (2, 0))
    assert content.count(optional) == 1
    path.write_bytes(content.replace(optional, required))
    done = subprocess.run([sys.executable, "-c", ASK, str(path)], capture_output=True, text=True)
    assert done.returncode < 0 and "level histogram size mismatch" in done.stderr
    with pytest.raises(ValueError, match=r"rows\.parquet: truncated or corrupt .*level histogram size mismatch"):
        read_rows(path)


BROKEN = {
    "ends within a value": b"\x15",
    "more than 32 structures inside of one another": b"\x1c" * 40,
    "an integer of more than 64 bits": b"\x16" + b"\xff" * 11,
    "a value of the unknown type 14": b"\x1e\x00",
    "a list of values of an unexpected type": b"\x49\x15\x00\x00",  # row groups that are integers
    "lacks the sizes of a column": b"\x49\x1c\x19\x1c\x00\x36\x02\x00\x00",  # a chunk without metadata
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_broken_footer_is_an_error(tmp_path: Path, problem: str):
    path, footer = tmp_path / "rows.parquet", BROKEN[problem]
    path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(ValueError, match=problem):
        read_row_groups(path)


def test_a_list_that_declares_more_values_than_bytes_ends_at_once(tmp_path: Path):
    path, footer = tmp_path / "rows.parquet", b"\x19\xfc" + b"\xff" * 8 + b"\x01"  # 2^63 structures
    path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(ValueError, match="ends within a value"):
        read_row_groups(path)


def test_a_list_that_claims_more_bytes_than_the_file_has_is_refused_at_once(tmp_path):
    count = b"\x80" * 8 + b"\x10"  # 2^60
    footer = b"\x19\xf3" + count + b"\x00"  # field 1: a list of bytes
    path = tmp_path / "rows.parquet"
    path.write_bytes(footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(ValueError, match="ends within a value"):
        read_row_groups(path)
