"""The fingerprint of a base: a digest of its features, its quantization and every tensor as quantized.

It does not depend on layout, device, compute dtype, or on how many processes read the tensors. There are two forms:

- `HEX-strips`, of runs since there are meshes. A matrix is hashed in strips of 64 rows by the process that reads them,
  and the fingerprint is the SHA-256 of all these digests in order.
- `HEX`, of earlier runs: the SHA-256 over all bytes in order, which takes one process that reads all of them.
"""

import abc
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np

from qlora_jax.io.loading.mesh_weights import STRIP, ProcessRows, all_rows

SUFFIX = "-strips"
EARLIER_OFFSETS = (
    "If its files are unchanged and model.double_quant is on, an earlier version of qlora_jax trained the run, with "
    "other last bits in the base's constants: use that version."
)


class BaseDigest(abc.ABC):
    """Collects a base, tensor by tensor.

    Args:
      settings: describe the base's features and quantization.
    """

    def __init__(self, settings: bytes):
        self._sha = hashlib.sha256(settings)

    def name(self, name: str) -> None:
        """Adds the name of the tensor whose arrays follow."""
        self._sha.update(name.encode())

    def add(self, own: np.ndarray, rows: ProcessRows) -> None:
        """Adds an array, `rows` of which are in this process; all processes call this together."""
        own = np.atleast_1d(own)
        shape = own.shape if rows.read_by_all else (rows.total, *own.shape[1:])  # codes in layout `flat` have no rows
        self._add(own.dtype, shape, iter([own]), rows)

    def add_pieces(self, pieces: Iterator[np.ndarray], rows: ProcessRows) -> None:
        """Adds an array as `add` does, piece by piece along its rows.

        Args:
          pieces: each but the last has a multiple of STRIP rows; a vector is one piece.
        """
        first = next(pieces)
        self._add(first.dtype, (rows.total, *first.shape[1:]), itertools.chain([first], pieces), rows)

    def add_whole(self, array: np.ndarray) -> None:
        """Adds an array that every process has."""
        self.add(array, all_rows(math.prod(array.shape[:1])))

    def _add(self, dtype: np.dtype, shape: tuple[int, ...], pieces: Iterable[np.ndarray], rows: ProcessRows) -> None:
        self._sha.update(f"{dtype.name}{shape}".encode())
        self._add_values(pieces, rows, strips=len(shape) > 1)

    @abc.abstractmethod
    def _add_values(self, pieces: Iterable[np.ndarray], rows: ProcessRows, strips: bool) -> None: ...

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Returns the fingerprint."""


class StripDigest(BaseDigest):
    """The digest of digests of strips."""

    def _add_values(self, pieces: Iterable[np.ndarray], rows: ProcessRows, strips: bool) -> None:
        if not strips:
            self._sha.update(b"".join(map(_strip, pieces)))
            return
        # Ranges begin where strips begin, and only the last strip of all is shorter.
        digests = [_strip(own[start : start + STRIP]) for own in pieces for start in range(0, len(own), STRIP)]
        table = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
        self._sha.update(np.ascontiguousarray(rows.strips().of_all(table)))

    def fingerprint(self) -> str:
        return self._sha.hexdigest() + SUFFIX


class WholeDigest(BaseDigest):
    """The digest over all bytes in order."""

    def _add_values(self, pieces: Iterable[np.ndarray], rows: ProcessRows, strips: bool) -> None:
        if not rows.read_by_all:
            raise ValueError(
                "the run's checkpoint identifies its base in the form of an earlier version of qlora_jax, which one "
                "process computes (found several). Resume with one process, which may have several devices; or start "
                "a new run from its adapter (lora.start)"
            )
        for own in pieces:
            self._sha.update(_bytes(own))

    def fingerprint(self) -> str:
        return self._sha.hexdigest()


def same_form(one: str, other: str) -> bool:
    """Returns True if two fingerprints have the same form, so that equal bases have equal ones."""
    return one.endswith(SUFFIX) == other.endswith(SUFFIX)


def new_digest(settings: bytes, like: str | None) -> BaseDigest:
    """Returns a digest of a base with these settings.

    Args:
      like: a fingerprint whose form is wanted; None for the form of new runs.
    """
    return StripDigest(settings) if like is None or like.endswith(SUFFIX) else WholeDigest(settings)


def _strip(values: np.ndarray) -> bytes:
    return hashlib.sha256(_bytes(values)).digest()


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
