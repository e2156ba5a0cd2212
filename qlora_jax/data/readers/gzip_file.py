"""Reads gzip files, and refuses those that are made to fill the memory."""

import gzip
import io
import os
from pathlib import Path

# A packed file may unpack to this many bytes, or to this many times its size. Text is seldom packed to a twentieth.
MAX_UNPACKED = 32 << 20
MAX_RATIO = 200
# It may have this many members, or one per this many bytes of its size. Each takes ten microseconds, even without data.
MAX_MEMBERS = 10_000
MIN_MEMBER = 1000
_MEMBER = b"\x1f\x8b\x08"  # a member's first bytes; others are the same once in 16 MB
_BLOCK = 1 << 20


class LimitedGzip(gzip.GzipFile):
    """Unpacks a gzip file. Reading raises ValueError beyond MAX_UNPACKED bytes and MAX_RATIO times the file's size."""

    def __init__(self, path: Path, file: io.BufferedReader):
        """Opens a file at its start; raises ValueError if it has too many members."""
        super().__init__(fileobj=file, mode="rb")
        self._path, size = path, os.fstat(file.fileno()).st_size
        self._max_unpacked = max(MAX_UNPACKED, MAX_RATIO * size)
        members = sum(block.count(_MEMBER) for block in iter(lambda: file.read(_BLOCK), b""))
        file.seek(0)
        if members > max(MAX_MEMBERS, size // MIN_MEMBER):
            raise ValueError(
                f"{path}: too many gzip members (found {members:,}, expected at most {MAX_MEMBERS:,}, or one per "
                f"{MIN_MEMBER:,} bytes). If you trust it, pack it again: gunzip -c FILE | gzip > NEW.gz"
            )

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
