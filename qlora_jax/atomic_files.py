"""Writes files and folders that appear under their names completely or not at all.

A new file has a random name in the target's folder, so it is never an existing file or a link. When it is complete, its
size is checked, its data is flushed to the disk (fsync), and it is renamed to the target.
"""

import contextlib
import errno
import io
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Buffer, Callable, Iterator
from pathlib import Path
from typing import BinaryIO

FIXES = {
    errno.ENOSPC: "Free space on this disk, or give an output on another one",
    errno.EDQUOT: "Free space within your quota, or give an output on another disk",
    errno.EFBIG: "Raise the limit of file sizes (ulimit -f), or give an output on another disk",
    errno.EROFS: "Mount the disk for writing, or give an output on another one",
    errno.EACCES: "Allow writing in this folder, or give another output",
    errno.EIO: "Check the disk, and write the file again",
}
CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)  # filesystems that cannot flush a folder return these
FLUSH_BYTES = 32 << 20  # written before a thread flushes them
NAME_LENGTH = 50  # characters of the target's name in a temporary name, which is limited to 255 bytes


class _NewFile(io.FileIO):
    """A new file that becomes `target`; an error while it is written names the target and the number of bytes.

    A thread flushes large parts to the disk while the program makes the next ones.
    """

    def __init__(self, path: Path, target: Path, nbytes: int | None):
        self.target, self.nbytes = target, nbytes
        self._unflushed, self._error = 0, None
        self._flush: threading.Thread | None = None
        super().__init__(path, "xb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))

    def write(self, data: Buffer, /) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            raise write_error(error, self.target, self.tell(), self.nbytes) from error
        self._unflushed += written
        if self._unflushed >= FLUSH_BYTES and not (self._flush is not None and self._flush.is_alive()):
            self._unflushed, self._flush = 0, threading.Thread(target=self._flush_part, daemon=True)
            self._flush.start()
        return written

    def _flush_part(self) -> None:
        try:
            _flush_data(self.fileno())
        except OSError as error:  # the system reports it once, so the last fsync would not
            self._error = error

    def check_flushed(self) -> None:
        """Waits for the thread; raises OSError if a part cannot be flushed."""
        if self._flush is not None:
            self._flush.join()
        if self._error is not None:
            raise write_error(self._error, self.target, self.tell(), self.nbytes) from self._error

    def close(self) -> None:
        """Closes the file when the thread no longer uses it."""
        if self._flush is not None:
            self._flush.join()
        super().close()


@contextlib.contextmanager
def staged_file(
    target: Path, nbytes: int | None = None, check: Callable[[Path], None] | None = None
) -> Iterator[BinaryIO]:
    """Yields a file that is renamed to `target` when the block succeeds, and removed when it raises.

    Args:
      target: the path of a file, which is replaced if it exists; so is a link, but not the file it points to.
      nbytes: the size that the file must have at the end; None if it is not known in advance.
      check: called with the complete file's temporary path before it is renamed; raises OSError if the file is wrong.

    Raises:
      OSError: the file cannot be written, or is not on the disk as it was written; names `target`.
    """
    if target.exists() and not target.is_file():
        raise _not_a_file(target)
    stage = _stage_of(target)
    try:
        with _errors_named(stage, target):
            new = _NewFile(stage, target, nbytes)
            with io.BufferedWriter(new) as file:
                yield file
                file.flush()
                new.check_flushed()
                _sync_file(file, target, nbytes)
            if check:
                check(stage)
            os.replace(stage, target)
            sync_folder(target.parent)
    finally:
        with contextlib.suppress(OSError):
            stage.unlink()  # after success it is renamed, so there is nothing to remove


def write_bytes(target: Path, data: Buffer) -> None:
    """Writes a whole file and reads it back, or leaves `target` as it was."""

    def check(stage: Path) -> None:
        if stage.read_bytes() != data:
            raise OSError(errno.EIO, f"differs on the disk from what was written. {FIXES[errno.EIO]}", str(stage))

    with staged_file(target, memoryview(data).nbytes, check) as file:
        file.write(data)


def write_text(target: Path, text: str) -> None:
    """Writes a whole file in UTF-8 and reads it back, or leaves `target` as it was."""
    write_bytes(target, text.encode("utf-8"))


def write_named_text(path: Path, text: str) -> None:
    """Writes a file that the user named: the file that a link points to, or directly into a pipe or device."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
    else:
        write_text(path.resolve(), text)


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder that is renamed to `target` when the block succeeds, and removed when it raises.

    Raises:
      ValueError: `target` exists and is not empty, or is a link.
      OSError: the folder cannot be written; names the file in `target`.
    """
    _check_vacant(target)
    stage = _stage_of(target)
    try:
        with _errors_named(stage, target):
            make_folder(target.parent)
            stage.mkdir()
            yield stage
            sync_folder(stage)
            _check_vacant(target)
            stage.rename(target)  # fails if another process has filled the target since the check
            sync_folder(target.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # after success it is renamed, so there is nothing to remove


class LineFile:
    """Writes lines to a file; each is in the file when `write` returns, or not at all."""

    def __init__(self, file: io.FileIO):
        """`file` is open for writing, at its end; it may be a pipe or a device."""
        self._file, self._path = file, Path(os.fsdecode(file.name))
        self._regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        self._size = file.seek(0, os.SEEK_END) if self._regular else 0

    def write(self, line: str) -> None:
        """Writes one line, including its line break.

        Raises:
          OSError: the file cannot be written; names it. The part of the line that was written is removed.
        """
        rest = memoryview(line.encode("utf-8"))
        end = self._size + rest.nbytes
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            if self._regular:
                self._file.truncate(self._size)
                self._file.seek(self._size)
            raise write_error(error, self._path, end - rest.nbytes, end) from error
        self._size = end

    def sync(self) -> None:
        """Flushes the lines to the disk, and checks that it holds all of them.

        Raises:
          OSError: lines are missing; names the file.
        """
        if self._regular:
            _sync_file(self._file, self._path, None)

    def is_in_place(self) -> bool:
        """Returns False if the file was deleted, moved or replaced since it was opened."""
        try:
            return os.path.samestat(os.stat(self._path, follow_symlinks=False), os.fstat(self._file.fileno()))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def close(self) -> None:
        """Flushes the lines to the disk, and checks that it holds all of them.

        Raises:
          OSError: lines are missing; names the file.
        """
        if self._file.closed:
            return
        with self._file:
            self.sync()

    def __enter__(self) -> "LineFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def append_lines(path: Path) -> LineFile:
    """Opens a file to append lines; creates it if it does not exist, and flushes its name to the disk.

    Raises:
      OSError: `path` is a link, or not a regular file.
    """
    is_new = not os.path.lexists(path)
    flags = os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK  # without O_NONBLOCK, opening a pipe may wait forever
    try:
        file = io.FileIO(path, "ab", opener=lambda name, mode: os.open(name, mode | flags, 0o666))
    except OSError as error:
        odd = path.is_symlink() or (path.exists() and not path.is_file())
        raise _not_a_file(path) if odd else write_error(error, path) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _not_a_file(path)
    if is_new:
        sync_folder(path.parent)
    return LineFile(file)


def write_error(error: OSError, target: Path, written: int | None = None, nbytes: int | None = None) -> OSError:
    """Returns the error of a write with the target's name, the number of bytes, and what to do."""
    number = error.errno or errno.EIO
    total = "" if nbytes is None else f" of {nbytes:,}"
    progress = "" if written is None else f" (after {written:,}{total} bytes)"
    fix = FIXES.get(number, "Give another output")
    return OSError(number, f"cannot be written: {os.strerror(number)}{progress}. {fix}", str(target))


def make_folder(folder: Path) -> list[Path]:
    """Creates a folder and its parents, and flushes their names to the disk; returns those that were missing."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)
    return missing


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk, where the filesystem can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # writing in a folder does not require permission to read it
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise write_error(error, folder) from error
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flushes all files of a folder, and the names in it and of it, to the disk.

    Raises:
      OSError: the disk cannot hold a file; names it.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            with path.open("rb") as file:
                _sync_file(file, path, path.stat().st_size)
    sync_folder(folder)
    sync_folder(folder.parent)


def _flush_data(descriptor: int) -> None:
    flush = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync
    flush(descriptor)


def _sync_file(file: BinaryIO | io.FileIO, target: Path, nbytes: int | None) -> None:
    """Flushes a file to the disk; raises OSError if it has another size than was written, or than `nbytes`."""
    file.flush()
    written = file.tell()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        raise write_error(error, target, written, nbytes) from error
    found, expected = os.fstat(file.fileno()).st_size, written if nbytes is None else nbytes
    if found != expected:
        problem = f"incomplete on the disk (found {found:,} bytes, expected {expected:,}). {FIXES[errno.EIO]}"
        raise OSError(errno.EIO, problem, str(target))


@contextlib.contextmanager
def _errors_named(stage: Path, target: Path) -> Iterator[None]:
    """Replaces the name of `stage`, or of a file in it, in errors by that of `target`."""
    try:
        yield
    except OSError as error:
        name = str(error.filename)
        if not name.startswith(str(stage)):
            raise
        named = str(target) + name.removeprefix(str(stage))
        if error.errno and error.strerror == os.strerror(error.errno):
            raise write_error(error, Path(named)) from error
        raise OSError(error.errno, error.strerror, named) from error


def _check_vacant(target: Path) -> None:
    if target.is_symlink():
        raise ValueError(f"{target}: a symbolic link to {target.readlink()}. Choose another output")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target}: exists and is not empty, and exports never overwrite. Choose another output")


def _not_a_file(path: Path) -> OSError:
    found = f"a symbolic link to {path.readlink()}" if path.is_symlink() else "a folder, pipe or device"
    return OSError(
        errno.ELOOP if path.is_symlink() else errno.EINVAL,
        f"not a regular file (found {found}). Remove it, or give another output",
        str(path),
    )


def _stage_of(target: Path) -> Path:
    """Returns a hidden name in the target's folder that nobody can guess."""
    return target.with_name(f".{target.name[:NAME_LENGTH]}.partial-{secrets.token_hex(8)}")
