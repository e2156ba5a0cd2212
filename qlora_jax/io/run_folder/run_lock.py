"""Locks a run's folder, so that one process at a time writes in it, and notices if the folder goes away.

RUN/run.lock is locked with flock. The kernel releases the lock when the process ends, however it ends. Reading a run
takes no lock: `generate`, `evaluate` and `export` open a run while it trains.
"""

import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from qlora_jax.atomic_files import make_folder

CONFIG_FILE, LOCK_FILE = "config.yaml", "run.lock"  # in a run's folder
_HOLDER = re.compile(r"process (\d{1,9}) on (.*), since ")
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_HOLDER_BYTES = 300  # at most this much of a lock file appears in a message
_ATTEMPTS = 100

Warn = Callable[[str], object]


class FolderLostError(OSError):
    """Raised if a folder was deleted, moved or replaced while a command wrote in it."""


@dataclasses.dataclass(eq=False)
class RunLock:
    """The lock of a run's folder, held by this process.

    Attributes:
      folder: the run's folder.
      file: absolute path of the lock file.
      descriptor: of the open lock file; None in a forked child, which does not hold the lock.
    """

    folder: Path
    file: Path
    descriptor: int | None

    def check(self) -> None:
        """Raises FolderLostError if the folder at the run's path is not the one that was locked."""
        if self.descriptor is None:
            raise FolderLostError(
                f"{self.folder}: a forked process does not hold its lock. Write from the parent process"
            )
        if not _is_open_file(self.file, self.descriptor):
            moved = _moved_folder(self.descriptor)
            found = f"it was moved to {moved}" if moved else f"it or its {LOCK_FILE} was deleted, moved or replaced"
            raise FolderLostError(
                f"{self.folder}: the folder changed while a command wrote in it ({found}), so the command ends. Move "
                "it back and start again; train with --resume if there is a checkpoint"
            )

    def release(self) -> None:
        """Deletes the lock file and releases the lock; does nothing in a forked child."""
        if self.descriptor is None:
            return
        with contextlib.suppress(OSError):  # without the lock, a file that stays is harmless
            if _is_open_file(self.file, self.descriptor):
                self.file.unlink()
        self.close()

    def close(self) -> None:
        """Closes this process's copy of the lock file."""
        assert self.descriptor is not None
        os.close(self.descriptor)
        self.descriptor = None
        _held.discard(self)


_held: set[RunLock] = set()


def _close_in_child() -> None:
    """Closes a forked child's copies of lock files, because flock lasts until the last copy is closed."""
    for lock in list(_held):
        lock.close()


os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def lock_run(folder: Path, warn: Warn) -> Iterator[RunLock]:
    """Locks a run's folder, which it creates if it is missing, and removes again if it is empty at the end.

    Args:
      warn: called with a message if the filesystem does not support locks; the run then has none.

    Raises:
      ValueError: another process holds the lock (the message names it), or the folder cannot be created.
      OSError: the lock file cannot be written.
    """
    _check_writable(folder)
    created = make_folder(folder)
    try:
        lock = _acquire(folder, warn)
        try:
            yield lock
        finally:
            lock.release()
    finally:
        for path in created:
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()


@contextlib.contextmanager
def follow_lock(folder: Path) -> Iterator[RunLock]:
    """Yields the lock of a folder that another process of the same run holds; it can be checked like the holder's.

    Raises:
      OSError: the lock file cannot be opened.
    """
    file = (folder / LOCK_FILE).absolute()
    lock = RunLock(folder, file, os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
    _held.add(lock)
    try:
        yield lock
    finally:
        if lock.descriptor is not None:
            lock.close()


def read_holder(folder: Path) -> tuple[str, bool] | None:
    """Returns the text of a folder's lock file, and True unless its process ran on this machine and has ended.

    None without a lock file. It takes no lock, which could stop a run that starts in this moment.
    """
    if not (folder / LOCK_FILE).is_file():
        return None
    text = (folder / LOCK_FILE).read_bytes()[:_HOLDER_BYTES].decode(errors="replace").strip()
    found = _HOLDER.match(text)
    return text, found is None or found[2] != socket.gethostname() or _is_running(int(found[1]))


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends no signal
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _check_writable(folder: Path) -> None:
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"output {folder}: {nearest} is a file. Give another output")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"output {folder}: no permission to write in {nearest}. Give another output")


def _acquire(folder: Path, warn: Warn) -> RunLock:
    file = (folder / LOCK_FILE).absolute()
    for _ in range(_ATTEMPTS):
        lock = RunLock(folder, file, _open(file))
        _held.add(lock)
        try:
            _flock(lock, warn)
            if _is_open_file(file, lock.descriptor):
                _write_holder(lock)
                return lock
        except BaseException:
            lock.close()
            raise
        lock.close()  # the process that held the lock deleted the file after it was opened here
    raise ValueError(f"{file}: other processes create and delete it all the time. Give another output")


def _open(file: Path) -> int:
    # Never through a link, and without waiting if the file is a pipe.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(file, flags, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ValueError(f"{file}: is a symbolic link (expected a file). Delete it") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{file}: is not a regular file. Delete it")
    return descriptor


def _flock(lock: RunLock, warn: Warn) -> None:
    assert lock.descriptor is not None
    try:
        fcntl.flock(lock.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{lock.folder}: another process writes in this folder ({_holder(lock.descriptor)}). Wait until it ends, "
            "or give another output"
        ) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        warn(
            f"{lock.folder}: {_filesystem(lock.folder)} does not support locks ({error.strerror}). Start only one run "
            "in this folder, because a second one would go unnoticed"
        )


def _holder(descriptor: int) -> str:
    return os.pread(descriptor, _HOLDER_BYTES, 0).decode(errors="replace").strip() or "unknown"


def _write_holder(lock: RunLock) -> None:
    assert lock.descriptor is not None
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    text = f"process {os.getpid()} on {socket.gethostname()}, since {since}\n"
    try:
        os.ftruncate(lock.descriptor, 0)
        os.pwrite(lock.descriptor, text.encode(), 0)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(lock.file)) from error


def _is_open_file(path: Path, descriptor: int | None) -> bool:
    """Returns True if the file at `path` is the open one."""
    assert descriptor is not None
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _moved_folder(descriptor: int) -> Path | None:
    """Returns the folder in which the open file is now, if the system says so (Linux); None if it was deleted."""
    try:
        file = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    except OSError:
        return None
    return file.parent if _is_open_file(file, descriptor) else None


def _filesystem(folder: Path) -> str:
    """Returns the type and place of the folder's filesystem, such as `lustre at /scratch`, if the system says so."""
    device = folder.stat().st_dev
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "its filesystem"
    for mount in mounts:
        place, _, kind = mount.partition(" - ")
        if place.split()[2] == f"{os.major(device)}:{os.minor(device)}":
            return f"its filesystem, {kind.split()[0]} at {place.split()[4]},"
    return "its filesystem"
