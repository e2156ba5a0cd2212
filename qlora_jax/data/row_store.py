"""The cache of token rows: a folder per file, named by a hash of its content, written once and read in parts.

A folder is complete or does not exist: it is written under another name and then renamed. It has a digest of each of
its files, which is compared whenever the folder is opened. XXH3 reads as fast as the memory.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import uuid
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import xxhash
from jaxtyping import Int64, UInt64

from qlora_jax.atomic_files import staged_file, staged_folder, write_text
from qlora_jax.data.row_counts import RowCounts
from qlora_jax.data.rows import File, RowDigest, TokenRows, check_ids, format_place
from qlora_jax.metadata import MetadataError, read_json

_FACTS = "facts.json"
_MAX_FACTS = 64 << 20  # bytes; it has the number of rows of each length
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
      id_limit: rows of the model's embedding. Reading an id beyond them raises an error.
    """

    folder: Path
    path: str
    count: int
    digest: str
    row_format: str
    counts: RowCounts
    id_limit: int | None

    def __len__(self) -> int:
        return self.count

    def ends(self, start: int, stop: int) -> Int64[np.ndarray, " rows_and_one"]:
        """Returns the positions in the file of ids where rows start - 1 to stop - 1 end."""
        first = max(start - 1, 0)
        ends = self._array("ends", first, stop - first)
        return ends if start else np.concatenate([np.zeros(1, np.int64), ends])

    def read(self, start: int, stop: int) -> TokenRows:
        """Reads rows start to stop - 1; raises ValueError if an id is beyond the model's embedding."""
        ends, count = self.ends(start, stop), stop - start
        first, total = int(ends[0]), int(ends[-1] - ends[0])
        rows = TokenRows(
            ids=self._array("ids", first, total),
            supervised=self._array("supervised", first, total),
            starts=ends - first,
            numbers=self._array("numbers", start, count),
            lines=self._array("lines", start, count),
            files=(File(self.path),),
        )
        return check_ids(rows, self.id_limit)

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


def open_stored_rows(folder: Path, path: str, id_limit: int | None = None) -> StoredRows | None:
    """Opens the rows in `folder`; returns None if it does not exist, or is damaged and was deleted.

    Args:
      id_limit: rows of the model's embedding, if there is a model.

    Raises:
      ValueError: the folder can't be read, or is damaged and can't be deleted.
    """
    try:
        return _open(folder, path, id_limit)
    except FileNotFoundError:
        return None
    except DamagedEntryError as error:
        warnings.warn(f"data.cache: {folder}: damaged ({error}). The rows are prepared again.", stacklevel=2)
        _delete(folder)
        return None
    except OSError as error:
        raise ValueError(
            f"data.cache: {folder} can't be read: {error.strerror}. Set data.cache to a folder."
        ) from error


class DamagedEntryError(Exception):
    """The difference between a folder and what was written to it."""


class _Facts(TypedDict):
    """Content of facts.json.

    Keys:
      digest: see TokenRows.digest.
      form: name of the rows' format.
      tally: see RowCounts.to_dict.
      files: digest of each file.
    """

    digest: str
    form: str
    tally: dict[str, object]
    files: dict[str, str]


class _SignedFacts(TypedDict):
    """Facts and their digest."""

    facts: _Facts
    xxh3_128: str


def _open(folder: Path, path: str, id_limit: int | None) -> StoredRows:
    facts = _read_facts(folder / _FACTS)
    for name in _TYPES:
        if (found := _file_digest(folder / name)) != facts["files"].get(name):
            raise DamagedEntryError(f"{name}: found {found or 'no file'}, expected {facts['files'].get(name)}")
    try:
        counts = RowCounts.from_dict(facts["tally"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedEntryError(f"{_FACTS}: wrong counts") from error
    return StoredRows(
        folder=folder,
        path=path,
        count=counts.kept,
        digest=facts["digest"],
        row_format=facts["form"],
        counts=counts,
        id_limit=id_limit,
    )


def _read_facts(path: Path) -> _Facts:
    try:
        signed = read_json(path, _SignedFacts, _MAX_FACTS)
    except MetadataError as error:
        raise DamagedEntryError(f"{_FACTS}: can't be decoded") from error
    if _facts_digest(signed["facts"]) != signed["xxh3_128"]:
        raise DamagedEntryError(f"{_FACTS}: other content than was written")
    return signed["facts"]


def _facts_digest(facts: _Facts) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def _file_digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    except FileNotFoundError:
        return None


def _delete(folder: Path) -> None:
    doomed = folder.with_name(f"{folder.name}.damaged-{uuid.uuid4().hex}")
    try:
        folder.rename(doomed)  # another run may write a new one meanwhile
        shutil.rmtree(doomed)
    except FileNotFoundError:
        pass  # another run deleted it
    except OSError as error:
        raise ValueError(
            f"data.cache: {folder} is damaged and can't be deleted: {error.strerror}. Delete it."
        ) from error


def store_rows(chunks: Iterable[RowChunk], folder: Path) -> None:
    """Writes the rows to `folder`. Leaves nothing behind if `chunks` raises.

    Raises:
      ValueError: the folder can't be written, or the errors of `chunks`.
    """
    try:
        with staged_folder(folder) as part:
            facts = _write(chunks, part)
            signed = _SignedFacts(facts=facts, xxh3_128=_facts_digest(facts))
            write_text(part / _FACTS, json.dumps(signed))
    except OSError as error:
        if not folder.exists():  # otherwise another run was faster and wrote the same
            raise ValueError(f"data.cache: {error.filename}: {error.strerror}.") from error
    except ValueError:
        if not folder.exists():
            raise


def _write(chunks: Iterable[RowChunk], folder: Path) -> _Facts:
    counts, digest, total, row_format = RowCounts(), RowDigest(), 0, ""
    digests = {name: xxhash.xxh3_128() for name in _TYPES}
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(staged_file(folder / name)) for name in _TYPES}
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
                content = np.ascontiguousarray(array, _TYPES[name]).data
                files[name].write(content)
                digests[name].update(content)
            digest.update(rows)
            total, counts, row_format = total + len(rows.ids), counts + chunk.counts, chunk.row_format
    tally = json.loads(json.dumps(counts.to_dict()))  # keys become text and tuples lists, as they will be read
    files_digests = {name: one.hexdigest() for name, one in digests.items()}
    return _Facts(digest=digest.hexdigest(), form=row_format, tally=tally, files=files_digests)
