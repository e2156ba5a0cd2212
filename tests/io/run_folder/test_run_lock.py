"""A run's folder has one writer, which notices when the folder goes away; the lock ends with its process."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from qlora_jax.io.run_folder.checkpoint import LockedCheckpoints
from qlora_jax.io.run_folder.run_lock import LOCK_FILE, FolderLostError, lock_run
from tests.conftest import ROOT

HELD = r"run: another process writes in this folder \(process {} on .+, since 20\d\d-.+\)\. Wait until it ends"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_one_is_refused_with_the_process_that_holds_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with lock_run(folder, pytest.fail):
        for _ in range(2):  # the refusal changes nothing
            with pytest.raises(ValueError, match=HELD.format(os.getpid())), lock_run(folder, pytest.fail):
                raise AssertionError("two processes hold the lock")
    with lock_run(folder, pytest.fail) as lock:
        lock.check()


HOLDS = """
import os, sys, time
from pathlib import Path
from qlora_jax.io.run_folder.run_lock import lock_run

with lock_run(Path(sys.argv[1]), print):
    if os.fork() == 0:
        os.write(1, b"forked\\n")
        sys.stdin.read()  # until the test ends
        os._exit(0)
    time.sleep(600)
"""


def test_the_kernel_releases_it_even_if_a_forked_child_lives_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command, environment = [sys.executable, "-c", HOLDS, str(folder)], os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stdout.readline() == b"forked\n"
        with pytest.raises(ValueError, match=HELD.format(process.pid)), lock_run(folder, pytest.fail):
            raise AssertionError("two processes hold the lock")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with lock_run(folder, pytest.fail) as lock:
            lock.check()
        process.stdin.close()  # ends the child


def test_a_forked_child_neither_holds_nor_releases_it(tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from qlora_jax.io.run_folder.run_lock import FolderLostError, lock_run
folder = Path({str(tmp_path)!r}) / "run"
with lock_run(folder, print) as lock:
    if os.fork() == 0:
        try:
            lock.check()
        except FolderLostError as error:
            print(error, flush=True)
        lock.release()
        os._exit(0)
    os.wait()
    lock.check()
print(*Path({str(tmp_path)!r}).iterdir())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path}/run: a forked process does not hold its lock. Write from the parent process\n\n"


@pytest.mark.parametrize("kept", [(), ("deep",), ("deep", "run")])
def test_folders_that_stay_empty_are_removed_if_it_made_them(tmp_path: Path, kept: tuple[str, ...]) -> None:
    there = tmp_path.joinpath(*kept)
    there.mkdir(exist_ok=True, parents=True)
    with lock_run(tmp_path / "deep" / "run", pytest.fail):
        assert names(tmp_path / "deep" / "run") == [LOCK_FILE]
    assert sorted(tmp_path.rglob("*")) == sorted(tmp_path.joinpath(*kept[:n]) for n in range(1, len(kept) + 1))


def test_other_files_stay_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), lock_run(tmp_path / "run", pytest.fail):
        (tmp_path / "run" / "metrics.jsonl").write_text("{}")
        raise KeyboardInterrupt
    assert names(tmp_path / "run") == ["metrics.jsonl"]


CHANGES = {
    "moved": lambda run: run.rename(run.with_name("elsewhere")),
    "deleted": lambda run: [(run / LOCK_FILE).unlink(), run.rmdir()],
    "lock deleted": lambda run: (run / LOCK_FILE).unlink(),
    "replaced": lambda run: [run.rename(run.with_name("old")), run.mkdir(), (run / LOCK_FILE).touch()],
    "a file": lambda run: [run.rename(run.with_name("old")), run.touch()],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_went_away_is_noticed(tmp_path: Path, change: str) -> None:
    folder = tmp_path / "run"
    with lock_run(folder, pytest.fail) as lock:
        lock.check()
        CHANGES[change](folder)
        with pytest.raises(FolderLostError, match="run: the folder changed while a command wrote in it") as caught:
            lock.check()
    if change == "moved" and sys.platform == "linux":
        assert f"(it was moved to {tmp_path}/elsewhere)" in str(caught.value)
    if change == "replaced":
        assert names(folder) == [LOCK_FILE], "the lock of another run is not its own to delete"


def test_no_checkpoint_goes_into_a_folder_that_orbax_would_make_anew(tmp_path: Path) -> None:
    folder, arrays = tmp_path / "run", {"a": jnp.zeros(3)}
    with lock_run(folder, pytest.fail) as lock, LockedCheckpoints(lock, 2) as checkpoints:
        checkpoints.save(1, arrays, arrays, {"step": 1})
        folder.rename(tmp_path / "moved")
        with pytest.raises(FolderLostError, match=f"moved to {tmp_path}/moved"):
            checkpoints.save(2, arrays, arrays, {"step": 2})
    assert not folder.exists() and names(tmp_path / "moved" / "checkpoints") == ["1"]


def test_a_folder_that_goes_away_during_a_save_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, arrays = tmp_path / "run", {"a": jnp.zeros(3)}
    with lock_run(folder, pytest.fail) as lock, LockedCheckpoints(lock, 2) as checkpoints:
        save = checkpoints._manager.save

        def moving(*args: object, **settings: object) -> object:
            folder.rename(tmp_path / "moved")
            return save(*args, **settings)

        monkeypatch.setattr(checkpoints._manager, "save", moving)
        with pytest.raises(FolderLostError, match=f"moved to {tmp_path}/moved"):
            checkpoints.save(1, arrays, arrays, {"step": 1})


def test_a_file_that_its_holder_deletes_at_that_moment_is_not_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder may delete the file after we open it and before we lock it; ours is then not the folder's file."""
    folder, flock, calls = tmp_path / "run", fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        calls.append(None)
        if len(calls) == 1:
            (folder / LOCK_FILE).unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with lock_run(folder, pytest.fail) as lock:
        lock.check()
        assert len(calls) == 2


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_filesystem_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    warnings: list[str] = []
    with lock_run(tmp_path / "run", warnings.append) as lock:
        lock.check()
    (warning,) = warnings
    assert "run: its filesystem" in warning and f"does not support locks ({os.strerror(number)})" in warning
    if sys.platform == "linux":
        assert " at /" in warning


def test_other_errors_of_the_system_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", fails)
    with pytest.raises(OSError, match="broken"), lock_run(tmp_path / "run", pytest.fail):
        raise AssertionError("entered")


def test_a_lock_file_is_neither_a_link_nor_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match=r"run\.lock: is a symbolic link"), lock_run(tmp_path, pytest.fail):
        raise AssertionError("entered")
    (tmp_path / LOCK_FILE).unlink()
    os.mkfifo(tmp_path / LOCK_FILE)
    with pytest.raises(ValueError, match=r"run\.lock: is not a regular file"), lock_run(tmp_path, pytest.fail):
        raise AssertionError("entered")
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is a file"), lock_run(tmp_path / "file" / "run", pytest.fail):
        raise AssertionError("entered")
