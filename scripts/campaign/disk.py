"""A small file system in memory, which fills up or turns read-only like a disk; mounting it requires root."""

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


def can_mount() -> bool:
    """Returns True if this process may mount file systems."""
    try:
        with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder), 1 << 20):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Yields `folder` as a file system of `size` bytes; unmounts it afterwards.

    Raises:
      OSError: mounting is not permitted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _checked("-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


def resize(folder: Path, size: int) -> None:
    """Changes the size of a mounted file system."""
    _checked("-o", f"remount,rw,size={size}", str(folder))


def make_read_only(folder: Path) -> bool:
    """Turns a mounted file system read-only; returns False while a file in it is open for writing."""
    return _mount("-o", "remount,ro", str(folder)).returncode == 0


def _checked(*words: str) -> None:
    done = _mount(*words)
    if done.returncode != 0:
        raise OSError(f"mount {' '.join(words)}: {done.stderr.strip()}. Run as root")


def _mount(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
