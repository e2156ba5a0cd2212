"""Scores kept on disk as they are made, so that an evaluation that was stopped goes on where it was.

Each is found by a hash of all that it follows from, the model's arrays and the batch's and our own code, so one that is
stale is never found: it has another name.
"""

import functools
import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pallas_kernels
from qlora_jax.models.partition import ModelParts, combine

Arrays = tuple[np.ndarray, ...]
PACKAGES = (Path(pallas_kernels.__file__).parent, Path(__file__).parent.parent)


class Kept:
    """Results in a folder by what they follow from; without a folder, nothing is kept.

    Attributes:
      found: how many results were there already; made: how many were not.
    """

    def __init__(self, folder: Path | None = None, model: str = ""):
        self._folder, self._model = folder, model
        self.found = self.made = 0

    def result(self, inputs: Sequence[Any], compute: Callable[[], Sequence[Any]]) -> Arrays:
        """What `compute` returned for these inputs of this model, now or in an earlier evaluation, to the bit.

        Args:
          inputs: arrays, numbers, texts, None: all that the result follows from beside the model.

        Raises:
          ValueError: the file that should hold it can't be read.
        """
        if self._folder is None:
            return tuple(map(np.asarray, compute()))
        path = self._folder / f"{digest([self._model, *inputs])}.npz"
        if path.exists():
            self.found += 1
            return _read(path)
        results = tuple(map(np.asarray, compute()))
        self.made += 1
        _write(path, results)
        return results


NOTHING_KEPT = Kept()


def kept_for(folder: str | None, parts: ModelParts) -> Kept:
    """The kept scores of one model; the folder is made where it is not there."""
    if folder is None:
        return NOTHING_KEPT
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Kept(Path(folder), model_digest(parts))


def model_digest(parts: ModelParts) -> str:
    """SHA-256 of a model's structure and all its arrays, of jax's version, our own code, and the kind of device."""
    leaves, structure = jax.tree.flatten((parts.lora, parts.base))
    computed_by = [code_digest(), jax.__version__, jax.devices()[0].device_kind, len(jax.devices()), os.cpu_count()]
    return digest([*computed_by, parts.graphdef, structure, combine(parts).config, *leaves])


@functools.cache
def code_digest(packages: tuple[Path, ...] = PACKAGES) -> str:
    """SHA-256 of every file that may compute: Python's, and libraries that were built."""
    found = hashlib.sha256()
    for package in packages:
        for file in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".so")):
            found.update(file.read_bytes())
    return found.hexdigest()


def digest(values: Sequence[Any]) -> str:
    """SHA-256 of arrays, by dtype, shape and bytes, and of what other values print as."""
    found = hashlib.sha256()
    for value in values:
        array = np.ascontiguousarray(value) if isinstance(value, np.ndarray | jax.Array) else None
        found.update(f"{value!r}\n".encode() if array is None else f"{array.dtype} {array.shape}\n".encode())
        if array is not None:
            found.update(array.view(np.uint8).data if array.size and array.ndim else array.tobytes())
    return found.hexdigest()


def _read(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            return tuple(file[name] for name in file.files)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: holds no scores ({error}); delete it, and they are made again") from error


def _write(path: Path, results: Arrays) -> None:
    """As a whole or not at all, whenever the process is killed."""
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        np.savez(file, *results)
    part.replace(path)
