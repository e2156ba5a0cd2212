"""Small file systems that fill up, or turn read-only like a broken disk; mounting them requires root.

A file system in memory can be resized at once. One on a disk image turns read-only although files in it are open for
writing, as Linux does after an error of a disk.
"""

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

IMAGE = "disk.img"


def can_mount() -> bool:
    """Returns True if this process may mount file systems."""
    try:
        with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder), 1 << 20):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Yields `folder` as a file system of `size` bytes in memory; unmounts it afterwards.

    Raises:
      OSError: mounting is not permitted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _checked("mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


def resize(folder: Path, size: int) -> None:
    """Changes the size of a file system in memory."""
    _checked("mount", "-o", f"remount,rw,size={size}", str(folder))


@contextlib.contextmanager
def image_disk(folder: Path, size: int) -> Iterator[Path]:
    """Yields `folder` as an ext4 file system of `size` bytes on an image next to it; unmounts it afterwards.

    Raises:
      OSError: mounting is not permitted, or the system has no loop device left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    image = folder.with_name(IMAGE)
    with image.open("wb") as file:
        file.truncate(size)
    _checked("mkfs.ext4", "-q", "-F", str(image))
    device = _checked("losetup", "--find", "--show", str(image)).strip()
    try:
        _checked("mount", "-o", "errors=remount-ro", device, str(folder))
        try:
            yield folder
        finally:
            _checked("umount", "--lazy", str(folder))
    finally:
        _checked("losetup", "--detach", device)
        image.unlink()


def break_disk(folder: Path) -> None:
    """Turns the file system of an image read-only, as after an error of its disk."""
    device = Path(_checked("findmnt", "--noheadings", "--output", "SOURCE", str(folder)).strip())
    Path("/sys/fs/ext4", device.name, "trigger_fs_error").write_text("1")


def repair_disk(folder: Path) -> None:
    """Mounts a file system of an image again, without the data that was not flushed before its error."""
    device = _checked("findmnt", "--noheadings", "--output", "SOURCE", str(folder)).strip()
    _checked("umount", str(folder))
    _checked("e2fsck", "-p", "-f", device, accepted=(0, 1))  # 1: errors were corrected
    _checked("mount", "-o", "errors=remount-ro", device, str(folder))


def _checked(*words: str, accepted: tuple[int, ...] = (0,)) -> str:
    """Runs a command and returns its output; raises OSError if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode not in accepted:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}. Run as root")
    return done.stdout
