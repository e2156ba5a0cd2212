"""Reads gzip files, and refuses those that are made to fill the memory."""

import gzip
import io
import os
from pathlib import Path

# A packed file may unpack to this many bytes, or to this many times its size. Text is seldom packed to a twentieth.
MAX_UNPACKED = 32 << 20
MAX_RATIO = 200
_BLOCK = 1 << 20


class LimitedGzip(gzip.GzipFile):
    """Unpacks a gzip file. Reading raises ValueError beyond MAX_UNPACKED bytes and MAX_RATIO times the file's size."""

    def __init__(self, path: Path, file: io.BufferedReader):
        super().__init__(fileobj=file, mode="rb")
        self._path = path
        self._max_unpacked = max(MAX_UNPACKED, MAX_RATIO * os.fstat(file.fileno()).st_size)

    def read(self, size: int | None = -1) -> bytes:
        """Reads `size` bytes, or all that are left."""
        if size is None or size < 0:
            return b"".join(iter(lambda: self.read1(_BLOCK), b""))
        return self._checked(super().read(size))

    def read1(self, size: int = -1) -> bytes:
        """Reads up to `size` bytes."""
        return self._checked(super().read1(size))

    def _checked(self, content: bytes) -> bytes:
        if self.tell() > self._max_unpacked:
            raise ValueError(
                f"{self._path}: unpacks to more than {MAX_RATIO} times its size (found more than "
                f"{self._max_unpacked:,} bytes). If you trust it, unpack it with gunzip."
            )
        return content
