"""Caches results on disk as they are computed, so that an interrupted evaluation resumes.

The key of a result is a hash of everything that it depends on: the model's arrays, the inputs, and our code. A stale
result has another key, so it is never found. A file begins with a digest of its key and arrays, and a damaged one is
computed again.
"""

import functools
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import xxhash
from jaxtyping import ArrayLike

import pallas_kernels
from qlora_jax.atomic_files import write_bytes
from qlora_jax.models.partition import ModelParts, combine
from qlora_jax.sharding import mesh_of

Arrays = tuple[np.ndarray, ...]
SUFFIX = ".result"
_DIGEST_BYTES = 16
PACKAGES = (Path(pallas_kernels.__file__).parent, Path(__file__).parent.parent)


class ResultCache:
    """Results of one model, stored in a folder; without a folder nothing is stored.

    A damaged file is reported, and counts as a miss.

    Attributes:
      hits: number of results that were read from the folder.
      misses: number of results that were computed and stored.
    """

    def __init__(self, folder: Path | None = None, model: str = ""):
        """`model` is a digest of the model, which is part of every key."""
        self._folder, self._model = folder, model
        self.hits = self.misses = 0

    def get_or_compute(self, inputs: Sequence[object], compute: Callable[[], Sequence[ArrayLike]]) -> Arrays:
        """Returns the result of `compute`, from this or an earlier process, bit-identical.

        Args:
          inputs: arrays, numbers, texts or None: everything but the model that the result depends on.

        Raises:
          OSError: the result's file cannot be read or written.
        """
        if self._folder is None:
            return tuple(map(np.asarray, compute()))
        path = self._folder / f"{digest([self._model, *inputs])}{SUFFIX}"
        if (stored := read_result(path)) is not None:
            self.hits += 1
            return stored
        results = tuple(map(np.asarray, compute()))
        self.misses += 1
        write_result(path, results)
        return results

    def joined(self, other: "ResultCache") -> "ResultCache":
        """Returns the cache of results that depend on this model and on another."""
        return ResultCache(self._folder, digest([self._model, other._model]))


NO_CACHE = ResultCache()


def open_cache(folder: str | Path | None, parts: ModelParts) -> ResultCache:
    """Returns the cache of one model in `folder`, which is created if it does not exist; NO_CACHE for None."""
    if folder is None:
        return NO_CACHE
    Path(folder).mkdir(parents=True, exist_ok=True)
    return ResultCache(Path(folder), model_digest(parts))


def model_digest(parts: ModelParts) -> str:
    """SHA-256 of a model's structure and arrays, JAX's version, our code, the devices, and the model's mesh."""
    leaves, structure = jax.tree.flatten((parts.lora, parts.base))
    computed_by = [code_digest(), jax.__version__, jax.devices()[0].device_kind, len(jax.devices()), os.cpu_count()]
    if (mesh := mesh_of(parts)) is not None:
        computed_by.append(sorted(mesh.shape.items()))
    return digest([*computed_by, parts.graphdef, structure, combine(parts).config, *leaves])


@functools.cache
def code_digest(packages: tuple[Path, ...] = PACKAGES) -> str:
    """SHA-256 of every file that may affect results: Python sources and compiled libraries."""
    found = hashlib.sha256()
    for package in packages:
        for file in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".so")):
            found.update(file.read_bytes())
    return found.hexdigest()


def digest(values: Sequence[object]) -> str:
    """SHA-256 of values: arrays by dtype, shape and bytes, others by their repr."""
    found = hashlib.sha256()
    for value in values:
        array = np.ascontiguousarray(value) if isinstance(value, np.ndarray | jax.Array) else None
        found.update(f"{value!r}\n".encode() if array is None else f"{array.dtype} {array.shape}\n".encode())
        if array is not None:
            found.update(array.view(np.uint8).data if array.size and array.ndim else array.tobytes())
    return found.hexdigest()


def read_result(path: Path) -> Arrays | None:
    """Reads a result; returns None if it is not stored, or damaged, which a warning reports."""
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        return None
    arrays = stored[_DIGEST_BYTES:]
    if _file_digest(path, arrays) != stored[:_DIGEST_BYTES]:
        warnings.warn(f"{path}: damaged (other content than was written). The result is computed again.", stacklevel=3)
        return None
    with np.load(io.BytesIO(arrays), allow_pickle=False) as file:
        return tuple(file[name] for name in file.files)


def write_result(path: Path, results: Arrays) -> None:
    """Writes the file completely or not at all, even if the process is killed."""
    arrays = io.BytesIO()
    np.savez(arrays, *results)
    write_bytes(path, _file_digest(path, arrays.getvalue()) + arrays.getvalue())


def _file_digest(path: Path, arrays: bytes) -> bytes:
    return xxhash.xxh3_128_digest(path.name.encode() + arrays)
