"""Token rows in a folder: written once, piece by piece, named by the content they were made of, read in pieces.

An entry is whole or not there: it is written beside its place and then moved there.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

from qlora_jax.data.row_counts import RowCounts
from qlora_jax.data.rows import File, RowDigest, TokenRows, format_place

_FACTS = "facts.json"
_CHUNK = 1 << 20
# One flat file each; a row's ids end where `ends` says.
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
      hashes: of the content of each row read, also of those that were left out; empty where nobody asks.
      form: the rows' form.
    """

    rows: TokenRows
    counts: RowCounts
    hashes: UInt64[np.ndarray, " read"]
    row_format: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredRows:
    """Rows in a folder; only those that are read are in memory.

    Fields:
      count: rows.
      path: the file that they were made of.
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
        """Where the ids of rows start - 1 to stop - 1 end, in the file of ids."""
        first = max(start - 1, 0)
        ends = self._array("ends", first, stop - first)
        return ends if start else np.concatenate([np.zeros(1, np.int64), ends])

    def read(self, start: int, stop: int) -> TokenRows:
        """Rows start to stop - 1."""
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
        """Hashes of the content of all rows read, as a file that is mapped: they are in memory while looked at."""
        path = self.folder / "hashes"
        if not path.stat().st_size:
            return []
        return np.split(mapped := np.memmap(path, _TYPES["hashes"], "r"), range(_CHUNK, len(mapped), _CHUNK))

    def line(self, number: int) -> int:
        """The line of the row of that number; ValueError where it was not kept."""
        numbers = np.memmap(self.folder / "numbers", _TYPES["numbers"], "r")
        index = int(np.searchsorted(numbers, number))
        if index == self.count or numbers[index] != number:
            raise ValueError(f"{self.path}: row {number} is not among the {self.count} rows kept")
        return int(self._array("lines", index, 1)[0])

    def where(self, number: int) -> str:
        """`file:line` of the row of that number."""
        return format_place((File(self.path),), number, self.line(number))

    def _array(self, name: str, start: int, count: int) -> np.ndarray:
        return np.fromfile(self.folder / name, _TYPES[name], count, offset=start * _TYPES[name].itemsize)


def open_stored_rows(folder: Path, path: str) -> StoredRows | None:
    """The entry in `folder`; None where there is none; ValueError where its files are not of the size they had."""
    try:
        facts: Mapping[str, Any] = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        expected = facts["bytes"]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"data.cache: {folder} can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: a damaged entry of data.cache: {_FACTS} can't be read; delete it") from error
    if expected != (found := _sizes(folder)):
        raise ValueError(f"{folder}: a damaged entry of data.cache: found {found}, expected {expected}; delete it")
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


def store_rows(pieces: Iterable[RowChunk], folder: Path) -> None:
    """Writes the entry; nothing stays of it where `pieces` raises.

    Raises:
      ValueError: the folder can't be written; and as `pieces` does.
    """
    part = folder.with_name(f"{folder.name}.part-{uuid.uuid4().hex}")
    try:
        part.mkdir(parents=True)
        facts = _write(pieces, part)
        (part / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
        os.replace(part, folder)
    except OSError as error:
        if not folder.exists():  # else another run was faster, and its entry is the same
            raise ValueError(f"data.cache: {folder.parent} can't be written: {error.strerror}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(pieces: Iterable[RowChunk], folder: Path) -> dict[str, Any]:
    counts, digest, total, row_format = RowCounts(), RowDigest(), 0, ""
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in _TYPES}
        for piece in pieces:
            rows = piece.rows
            arrays = {
                "ids": rows.ids,
                "supervised": rows.supervised,
                "ends": rows.starts[1:] + total,
                "numbers": rows.numbers,
                "lines": rows.lines,
                "hashes": piece.hashes,
            }
            for name, array in arrays.items():
                files[name].write(np.ascontiguousarray(array, _TYPES[name]).data)
            digest.update(rows)
            total, counts, row_format = total + len(rows.ids), counts + piece.counts, piece.row_format
    return {"digest": digest.hexdigest(), "form": row_format, "tally": counts.to_dict(), "bytes": _sizes(folder)}
