"""The cache of token rows: a folder per file, named by a hash of its content, written once and read in parts.

A folder is complete or does not exist: it is written under another name and then renamed. It has a digest of each of
its files, which is compared whenever the folder is opened. XXH3 reads as fast as the memory.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import uuid
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple, NotRequired, TypedDict

import numpy as np
import xxhash
from jaxtyping import Bool, Int64, UInt64

from qlora_jax.atomic_files import staged_file, staged_folder, write_text
from qlora_jax.data.branch_tree import Branches, no_branches
from qlora_jax.data.row_counts import RowCounts
from qlora_jax.data.rows import File, RowDigest, TokenRows, Values, check_ids, format_place, positions_filled
from qlora_jax.untrusted_json import Count, MetadataError, read_json

_FACTS = "facts.json"
_MAX_FACTS = 64 << 20  # bytes; it has the number of rows of each length
_CHUNK = 1 << 20
# One flat file each. `ends` has the position in `ids` where each row ends, `branch_ends` that among all branches.
_TYPES = {
    "ids": np.dtype("<i4"),
    "supervised": np.dtype("?"),
    "ends": np.dtype("<i8"),
    "numbers": np.dtype("<i8"),
    "lines": np.dtype("<i8"),
    "hashes": np.dtype("<u8"),
}
_BRANCH_TYPES = {  # only if a row is a tree
    "branch_ends": np.dtype("<i8"),
    "branch_begins": np.dtype("<i8"),
    "branch_depths": np.dtype("<i4"),
}
_VALUE_TYPE = np.dtype("<f4")  # each name of values has a file of this type


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
      branching: True if a row is a tree.
      value_shapes: shape of a row's values by name.
    """

    folder: Path
    path: str
    count: int
    digest: str
    row_format: str
    counts: RowCounts
    id_limit: int | None
    branching: bool
    value_shapes: dict[str, tuple[int, ...]]

    def __len__(self) -> int:
        return self.count

    @property
    def number_limit(self) -> int:
        """One more than the highest number of a row."""
        return int(self._array("numbers", self.count - 1, 1)[0]) + 1

    def read(self, start: int, stop: int) -> TokenRows:
        """Reads rows start to stop - 1; raises ValueError if an id is beyond the model's embedding."""
        ends, count = self._ends("ends", start, stop), stop - start
        first, total = int(ends[0]), int(ends[-1] - ends[0])
        rows = TokenRows(
            ids=self._array("ids", first, total),
            supervised=self._array("supervised", first, total),
            starts=ends - first,
            numbers=self._array("numbers", start, count),
            lines=self._array("lines", start, count),
            files=(File(self.path),),
            branches=self._branches(start, stop),
            values={name: self._values(name, start, count) for name in self.value_shapes},
        )
        return check_ids(rows, self.id_limit)

    def read_mask(self, start: int, stop: int) -> tuple[Int64[np.ndarray, " rows_and_one"], Bool[np.ndarray, " total"]]:
        """Reads where rows start to stop - 1 start and which of their ids are supervised, but not the ids."""
        ends = self._ends("ends", start, stop)
        return ends - ends[0], self._array("supervised", int(ends[0]), int(ends[-1] - ends[0]))

    def lengths(self, start: int, stop: int) -> Int64[np.ndarray, " rows"]:
        """Reads the positions that rows start to stop - 1 fill in a batch, without reading ids."""
        return positions_filled(np.diff(self._ends("ends", start, stop)), self.branch_counts(start, stop))

    def branch_counts(self, start: int, stop: int) -> Int64[np.ndarray, " rows"]:
        """Reads the number of branches of rows start to stop - 1."""
        return np.diff(self._ends("branch_ends", start, stop)) if self.branching else np.zeros(stop - start, np.int64)

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

    def _branches(self, start: int, stop: int) -> Branches | None:
        if not self.branching:
            return None
        ends = self._ends("branch_ends", start, stop)
        first, total = int(ends[0]), int(ends[-1] - ends[0])
        begin, depth = (self._array(name, first, total) for name in ("branch_begins", "branch_depths"))
        return Branches(first=ends - first, begin=begin, depth=depth)

    def _values(self, name: str, start: int, count: int) -> Values:
        shape = self.value_shapes[name]
        size = math.prod(shape)
        file, offset = self.folder / _values_file(name), start * size * _VALUE_TYPE.itemsize
        return np.fromfile(file, _VALUE_TYPE, count * size, offset=offset).reshape(count, *shape)

    def _ends(self, name: str, start: int, stop: int) -> Int64[np.ndarray, " rows_and_one"]:
        """Returns where rows start - 1 to stop - 1 end in the flat file that `name` is about."""
        first = max(start - 1, 0)
        ends = self._array(name, first, stop - first)
        return ends if start else np.concatenate([np.zeros(1, np.int64), ends])

    def _array(self, name: str, start: int, count: int) -> np.ndarray:
        dtype = (_TYPES | _BRANCH_TYPES)[name]
        return np.fromfile(self.folder / name, dtype, count, offset=start * dtype.itemsize)


def _values_file(name: str) -> str:
    return f"values_{name}"


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
      values: shape of a row's values by name, if there are any.
    """

    digest: str
    form: str
    tally: dict[str, object]
    files: dict[str, str]
    values: NotRequired[dict[str, list[Count]]]


class _SignedFacts(TypedDict):
    """Facts and their digest."""

    facts: _Facts
    xxh3_128: str


def _open(folder: Path, path: str, id_limit: int | None) -> StoredRows:
    facts = _read_facts(folder / _FACTS)
    branching, values = "branch_ends" in facts["files"], facts.get("values", {})
    for name in (*_TYPES, *(_BRANCH_TYPES if branching else ()), *map(_values_file, values)):
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
        branching=branching,
        value_shapes={name: tuple(shape) for name, shape in values.items()},
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
        folder.rename(doomed)  # another run may write a new one in the meantime
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
    counts, digest, row_format = RowCounts(), RowDigest(), ""
    with contextlib.ExitStack() as stack:
        files = _Files(folder, stack)
        for chunk in chunks:
            files.append(chunk)
            digest.update(chunk.rows)
            counts, row_format = counts + chunk.counts, chunk.row_format
    tally = json.loads(json.dumps(counts.to_dict()))  # keys become text and tuples lists, as they will be read
    facts = _Facts(digest=digest.hexdigest(), form=row_format, tally=tally, files=files.digests)
    if files.values:
        facts["values"] = files.values
    return facts


class _Files:
    """The flat files of an entry while it is written. Those of branches and values are made when they are needed."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        self._folder, self._stack = folder, stack
        self._files: dict[str, BinaryIO] = {}
        self._hashes: dict[str, xxhash.xxh3_128] = {}
        self._rows = self._ids = self._branches = 0
        self.values: dict[str, list[int]] | None = None
        for name in _TYPES:
            self._open(name)

    @property
    def digests(self) -> dict[str, str]:
        """Digest of each file's content."""
        return {name: one.hexdigest() for name, one in self._hashes.items()}

    def append(self, chunk: RowChunk) -> None:
        """Appends a chunk of rows; raises ValueError if its rows have other values than those before."""
        rows = chunk.rows
        arrays = {
            "ids": rows.ids,
            "supervised": rows.supervised,
            "ends": rows.starts[1:] + self._ids,
            "numbers": rows.numbers,
            "lines": rows.lines,
            "hashes": chunk.hashes,
        }
        for name, array in arrays.items():
            self._put(name, array, _TYPES[name])
        self._append_branches(rows)
        self._append_values(rows)
        self._rows, self._ids = self._rows + len(rows), self._ids + len(rows.ids)

    def _append_branches(self, rows: TokenRows) -> None:
        if rows.branches is None and "branch_ends" not in self._files:
            return
        if "branch_ends" not in self._files:
            for name in _BRANCH_TYPES:
                self._open(name)
            self._put("branch_ends", np.zeros(self._rows, np.int64), _BRANCH_TYPES["branch_ends"])
        branches = rows.branches or no_branches(len(rows))
        arrays = (branches.first[1:] + self._branches, branches.begin, branches.depth)
        for (name, dtype), array in zip(_BRANCH_TYPES.items(), arrays, strict=True):
            self._put(name, array, dtype)
        self._branches += len(branches.begin)

    def _append_values(self, rows: TokenRows) -> None:
        if not len(rows):
            return
        shapes = {name: list(shape) for name, shape in rows.value_shapes.items()}
        if self.values is None:
            self.values = shapes
            for name in shapes:
                self._open(_values_file(name))
        if shapes != self.values:
            raise ValueError(f"{rows.files[0].path}: rows have different values (found {shapes} and {self.values}).")
        for name, array in rows.values.items():
            self._put(_values_file(name), array, _VALUE_TYPE)

    def _open(self, name: str) -> None:
        self._files[name] = self._stack.enter_context(staged_file(self._folder / name))
        self._hashes[name] = xxhash.xxh3_128()

    def _put(self, name: str, array: np.ndarray, dtype: np.dtype) -> None:
        content = np.ascontiguousarray(array, dtype).data
        self._files[name].write(content)
        self._hashes[name].update(content)
