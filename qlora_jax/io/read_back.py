"""Reads back the tensors of a file that was just written, and compares them with what was to be written."""

import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from qlora_jax.model_source import map_bytes

EXAMPLES = 5  # tensors that an error names


class StoredTensor(NamedTuple):
    """A tensor as a file stores it: its type and shape there, and a digest of its bytes."""

    file_type: str
    shape: tuple[int, ...]
    digest: bytes

    @classmethod
    def of(cls, file_type: str, shape: tuple[int, ...], stored: np.ndarray) -> "StoredTensor":
        """Digests an array that has the bytes of the file."""
        return cls(file_type, shape, xxhash.xxh3_128_digest(stored.reshape(-1).view(np.uint8).data))


class TensorDigest:
    """Digests a tensor that is written in pieces.

    Attributes:
      nbytes: bytes so far.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._digest = xxhash.xxh3_128()

    def add(self, piece: np.ndarray) -> memoryview:
        """Adds an array that has the next bytes of the file, and returns these bytes."""
        data = piece.reshape(-1).view(np.uint8).data
        self._digest.update(data)
        self.nbytes += len(data)
        return data

    def stored(self, file_type: str, shape: tuple[int, ...]) -> StoredTensor:
        """Returns the tensor whose pieces were added, in the type and shape of the file."""
        return StoredTensor(file_type, shape, self._digest.digest())


def check_read_back(
    path: Path,
    header: bytes,
    written: Mapping[str, StoredTensor],
    read: Callable[[Path], Mapping[str, StoredTensor]],
) -> None:
    """Checks the tensors of a file, read from the disk, against those that were written.

    Args:
      header: the bytes before the first tensor.
      written: the tensors that were to be written, by name.
      read: reads the tensors of a file whose header is sound.

    Raises:
      OSError: the file differs; names the tensors.
    """
    if map_bytes(path, 0, len(header)).tobytes() == header:
        found = read(path)
        wrong = [name for name in {**written, **found} if written.get(name) != found.get(name)]
    else:
        wrong = ["the header"]
    if wrong:
        names = ", ".join(wrong[:EXAMPLES]) + (", ..." if len(wrong) > EXAMPLES else "")
        problem = f"differs on the disk from what was written ({len(wrong)} parts: {names})"
        raise OSError(errno.EIO, f"{problem}. Check the disk, and write the file again", str(path))
