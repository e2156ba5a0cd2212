"""The fingerprint of a base: a digest of its features, its quantization and every tensor as quantized.

It does not depend on layout, device, compute dtype, or on how many processes read the tensors. There are two forms:

- `HEX-strips`, of runs since there are meshes. A matrix is hashed in strips of 64 rows by the process that reads them,
  and the fingerprint is the SHA-256 of all these digests in order.
- `HEX`, of earlier runs: the SHA-256 over all bytes in order, which takes one process that reads all of them.
"""

import abc
import hashlib
import math

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
        self._sha.update(f"{own.dtype.name}{shape}".encode())
        self._add_values(own, rows)

    def add_whole(self, array: np.ndarray) -> None:
        """Adds an array that every process has."""
        self.add(array, all_rows(math.prod(array.shape[:1])))

    @abc.abstractmethod
    def _add_values(self, own: np.ndarray, rows: ProcessRows) -> None: ...

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Returns the fingerprint."""


class StripDigest(BaseDigest):
    """The digest of digests of strips."""

    def _add_values(self, own: np.ndarray, rows: ProcessRows) -> None:
        if own.ndim < 2:
            self._sha.update(_strip(own))
            return
        starts = range(0, len(own), STRIP)  # ranges begin where strips begin, and only the last strip of all is shorter
        digests = b"".join(_strip(own[start : start + STRIP]) for start in starts)
        table = np.frombuffer(digests, np.uint8).reshape(len(starts), -1)
        self._sha.update(np.ascontiguousarray(rows.strips().of_all(table)))

    def fingerprint(self) -> str:
        return self._sha.hexdigest() + SUFFIX


class WholeDigest(BaseDigest):
    """The digest over all bytes in order."""

    def _add_values(self, own: np.ndarray, rows: ProcessRows) -> None:
        if not rows.read_by_all:
            raise ValueError(
                "the run's checkpoint identifies its base in the form of an earlier version of qlora_jax, which one "
                "process computes (found several). Resume with one process, which may have several devices; or start "
                "a new run from its adapter (lora.start)"
            )
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
