"""The cache of token rows: a folder per file, named by a hash of its content, written once and read in parts.

A folder is complete or does not exist: it is written under another name and then renamed.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

from qlora_jax.data.row_counts import RowCounts
from qlora_jax.data.rows import File, RowDigest, TokenRows, format_place

_FACTS = "facts.json"
_CHUNK = 1 << 20
# One flat file each. `ends` has the position in `ids` where each row ends.
_TYPES = {
    "ids": np.dtype("<i4"),
    "supervised": np.dtype("?"),
    "ends": np.dtype("<i8"),
    "numbers": np.dtype("<i8"),
    "lines": np.dtype("<i8"),
    "hashes": np.dtype("<u8"),
}


class RowChunk(NamedTuple):
    """Some of a file's rows, in order.

    Fields:
      hashes: content hash of each row read, also of dropped ones. Empty if nothing needs them.
      row_format: name of the rows' format.
    """

    rows: TokenRows
    counts: RowCounts
    hashes: UInt64[np.ndarray, " read"]
    row_format: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredRows:
    """Rows in a folder. Only rows that are read use memory.

    Fields:
      path: file that the rows were made of.
      count: number of rows.
    """

    folder: Path
    path: str
    count: int
    digest: str
    row_format: str
    counts: RowCounts

    def __len__(self) -> int:
        return self.count

    def ends(self, start: int, stop: int) -> Int64[np.ndarray, " rows_and_one"]:
        """Returns the positions in the file of ids where rows start - 1 to stop - 1 end."""
        first = max(start - 1, 0)
        ends = self._array("ends", first, stop - first)
        return ends if start else np.concatenate([np.zeros(1, np.int64), ends])

    def read(self, start: int, stop: int) -> TokenRows:
        """Reads rows start to stop - 1."""
        ends, count = self.ends(start, stop), stop - start
        first, total = int(ends[0]), int(ends[-1] - ends[0])
        return TokenRows(
            ids=self._array("ids", first, total),
            supervised=self._array("supervised", first, total),
            starts=ends - first,
            numbers=self._array("numbers", start, count),
            lines=self._array("lines", start, count),
            files=(File(self.path),),
        )

    @property
    def hashes(self) -> list[UInt64[np.ndarray, " _"]]:
        """Content hashes of all rows read, in chunks of a memory-mapped file."""
        path = self.folder / "hashes"
        if not path.stat().st_size:
            return []
        return np.split(mapped := np.memmap(path, _TYPES["hashes"], "r"), range(_CHUNK, len(mapped), _CHUNK))

    def line(self, number: int) -> int:
        """Returns the line of the row with that number; raises ValueError if it was dropped."""
        numbers = np.memmap(self.folder / "numbers", _TYPES["numbers"], "r")
        index = int(np.searchsorted(numbers, number))
        if index == self.count or numbers[index] != number:
            raise ValueError(f"{self.path}: row {number} is not one of the {self.count} rows kept")
        return int(self._array("lines", index, 1)[0])

    def where(self, number: int) -> str:
        """Returns `file:line` of the row with that number."""
        return format_place((File(self.path),), number, self.line(number))

    def _array(self, name: str, start: int, count: int) -> np.ndarray:
        return np.fromfile(self.folder / name, _TYPES[name], count, offset=start * _TYPES[name].itemsize)


def open_stored_rows(folder: Path, path: str) -> StoredRows | None:
    """Opens the rows in `folder`; returns None if it does not exist.

    Raises:
      ValueError: the folder can't be read, or its files do not have the sizes that were written.
    """
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        expected = facts["bytes"]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(
            f"data.cache: {folder} can't be read: {error.strerror}. Set data.cache to a folder."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: damaged entry of data.cache: {_FACTS} can't be read. Delete the folder."
        ) from error
    if expected != (found := _sizes(folder)):
        raise ValueError(
            f"{folder}: damaged entry of data.cache (found sizes {found}, expected {expected}). Delete the folder."
        )
    return StoredRows(
        folder=folder,
        path=path,
        count=facts["tally"]["kept"],
        digest=facts["digest"],
        row_format=facts["form"],
        counts=RowCounts.from_dict(facts["tally"]),
    )


def _sizes(folder: Path) -> dict[str, int]:
    return {name: path.stat().st_size if (path := folder / name).exists() else 0 for name in _TYPES}


def store_rows(chunks: Iterable[RowChunk], folder: Path) -> None:
    """Writes the rows to `folder`. Leaves nothing behind if `chunks` raises.

    Raises:
      ValueError: the folder can't be written, or the errors of `chunks`.
    """
    part = folder.with_name(f"{folder.name}.part-{uuid.uuid4().hex}")
    try:
        part.mkdir(parents=True)
        facts = _write(chunks, part)
        (part / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
        os.replace(part, folder)
    except OSError as error:
        if not folder.exists():  # otherwise another run was faster and wrote the same
            raise ValueError(
                f"data.cache: {folder.parent} can't be written: {error.strerror}. Free space, or set another folder."
            ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(chunks: Iterable[RowChunk], folder: Path) -> dict[str, object]:
    counts, digest, total, row_format = RowCounts(), RowDigest(), 0, ""
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in _TYPES}
        for chunk in chunks:
            rows = chunk.rows
            arrays = {
                "ids": rows.ids,
                "supervised": rows.supervised,
                "ends": rows.starts[1:] + total,
                "numbers": rows.numbers,
                "lines": rows.lines,
                "hashes": chunk.hashes,
            }
            for name, array in arrays.items():
                files[name].write(np.ascontiguousarray(array, _TYPES[name]).data)
            digest.update(rows)
            total, counts, row_format = total + len(rows.ids), counts + chunk.counts, chunk.row_format
    return {"digest": digest.hexdigest(), "form": row_format, "tally": counts.to_dict(), "bytes": _sizes(folder)}
