"""Notes which processes of a run have started, so that those that never connect can be named.

JAX waits until all have connected, and does not say for whom. Its coordination service takes nothing from a process
before that. So each process counts in a file next to the run folder, which all share. Files whose count stands still
are from an earlier start.
"""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from qlora_jax.hosts.messages import numbered

POLL_SECONDS = 0.5


class RollCall:
    """The processes that have started, as far as this one sees.

    Args:
      run: the run folder, which need not exist.
      process: the number of this process.
      processes: the number of processes.
    """

    def __init__(self, run: Path, process: int, processes: int):
        self.folder = run.parent / f".{run.name}.starting"
        self._process, self._processes = process, processes
        self._first: dict[int, bytes] = {}  # the count of each process when it was first seen
        self._here = {process}

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Counts, and reads the counts of others, in a thread, within the context."""
        stopped = threading.Event()
        thread = threading.Thread(target=self._take, args=(stopped,), name="hosts roll call", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()
            with contextlib.suppress(OSError):
                (self.folder / str(self._process)).unlink(missing_ok=True)
                self.folder.rmdir()  # by the last process

    def _take(self, stopped: threading.Event) -> None:
        count = 0
        while not stopped.wait(POLL_SECONDS):
            count += 1
            with contextlib.suppress(OSError):  # the filesystem is not ready
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / str(self._process)).write_text(str(count), encoding="utf-8")
                self._read()

    def _read(self) -> None:
        for file in self.folder.iterdir():
            if file.name.isdecimal():  # NFS renames files that are removed while they are open
                with contextlib.suppress(OSError):  # another process removes it just now
                    self._compare(int(file.name), file.read_bytes())

    def _compare(self, process: int, count: bytes) -> None:
        if self._first.setdefault(process, count) != count:
            self._here.add(process)

    def missing(self) -> str | None:
        """Returns the processes that have not been seen, as text such as `process 1`; None if all have."""
        absent = [process for process in range(self._processes) if process not in self._here]
        return numbered(absent) if absent else None
