"""Files and folders appear completely or not at all, and errors of writing name the file and the number of bytes."""

import errno
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qlora_jax import atomic_files
from qlora_jax.atomic_files import (
    append_lines,
    make_folder,
    staged_file,
    staged_folder,
    write_bytes,
    write_named_text,
    write_text,
)
from tests.conftest import ROOT, SMALL_DISK_BYTES

FULL = f"cannot be written: {os.strerror(errno.ENOSPC)}"


@pytest.fixture
def size_limit() -> Iterator[int]:
    """Bytes that a file may have: the limit of the operating system, lowered for a test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_at_the_end_in_place_of_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "file"
    for data in (b"old", b"new"):
        with staged_file(target) as file:
            file.write(data)
            assert not target.exists() or target.read_bytes() == b"old"
        assert target.read_bytes() == data
    assert names(tmp_path) == ["file"]


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.raises(KeyboardInterrupt), staged_file(tmp_path / "file") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_a_full_disk_is_an_error_with_file_and_bytes(small_disk: Path) -> None:
    target, size = small_disk / "file", 2 * SMALL_DISK_BYTES
    write_text(target, "old")
    with pytest.raises(OSError, match=rf"{FULL} \(after [0-9,]+ of {size:,} bytes\). Free space") as caught:
        write_bytes(target, bytes(size))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(target))
    assert names(small_disk) == ["file"] and target.read_text() == "old"


def test_a_full_disk_at_the_last_bytes_is_an_error(small_disk: Path) -> None:
    (small_disk / "rest").write_bytes(bytes(SMALL_DISK_BYTES))
    with pytest.raises(OSError, match=FULL), staged_file(small_disk / "file") as file:
        file.write(b"x")  # stays in the buffer until the file is closed


def test_bytes_that_numpy_lost_are_noticed(small_disk: Path) -> None:
    """NumPy's tofile reports no error if the disk is full when its buffer is flushed."""
    (small_disk / "rest").write_bytes(bytes(SMALL_DISK_BYTES - 4096))
    incomplete = pytest.raises(OSError, match=r"incomplete on the disk \(found [0-9,]+ bytes, expected")
    with incomplete, staged_file(small_disk / "file") as file:
        np.zeros(8000, np.uint8).tofile(file)
    assert names(small_disk) == ["rest"]


def test_a_limit_of_the_system_is_an_error_with_the_file(tmp_path: Path, size_limit: int) -> None:
    with pytest.raises(OSError, match=r"File too large \(after 100,000 of 100,001 bytes\). Raise the limit") as caught:
        write_bytes(tmp_path / "file", bytes(size_limit + 1))
    assert caught.value.filename == str(tmp_path / "file") and names(tmp_path) == []


@pytest.mark.parametrize("size", [3, 5])
def test_another_size_than_announced_is_an_error(tmp_path: Path, size: int) -> None:
    with pytest.raises(OSError, match=rf"found {size} bytes, expected 4"), staged_file(tmp_path / "file", 4) as file:
        file.write(bytes(size))
    assert names(tmp_path) == []


def test_a_disk_that_stores_other_bytes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, sync = tmp_path / "file", os.fsync
    write_text(target, "old")

    def damage(descriptor: int) -> None:
        sync(descriptor)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.pwrite(descriptor, b"N", 0)

    monkeypatch.setattr(os, "fsync", damage)
    with pytest.raises(OSError, match=r"differs on the disk from what was written.*Check the disk") as caught:
        write_text(target, "new")
    assert caught.value.filename == str(target)
    assert names(tmp_path) == ["file"] and target.read_text() == "old"


def test_a_disk_that_fails_to_store_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"Input/output error.*Check the disk") as caught:
        write_text(tmp_path / "file", "x")
    assert caught.value.filename == str(tmp_path / "file") and names(tmp_path) == []


def test_parts_are_flushed_while_others_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_files, "FLUSH_BYTES", 1000)
    threads = []
    monkeypatch.setattr(atomic_files, "_flush_data", lambda descriptor: threads.append(threading.current_thread()))
    with staged_file(tmp_path / "file") as file:
        for _ in range(20):
            file.write(b"a" * 9000)
    assert threads and threading.main_thread() not in threads
    assert (tmp_path / "file").read_bytes() == b"a" * 180_000


def test_a_part_that_cannot_be_flushed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system reports it to the thread alone; the last fsync succeeds."""

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(atomic_files, "FLUSH_BYTES", 1000)
    monkeypatch.setattr(atomic_files, "_flush_data", fail)
    expected = pytest.raises(OSError, match=r"cannot be written: Input/output error \(after 90,000")
    with expected as caught, staged_file(tmp_path / "file") as file:
        file.write(b"a" * 90_000)
    assert caught.value.filename == str(tmp_path / "file") and names(tmp_path) == []


@pytest.mark.parametrize("small_disk", ["ro"], indirect=True)
def test_a_disk_for_reading_only_is_an_error_with_the_file(small_disk: Path) -> None:
    for write in (write_text, lambda path, text: append_lines(path).write(text)):
        with pytest.raises(OSError, match=r"Read-only file system.*Mount the disk for writing") as caught:
            write(small_disk / "file", "x")
        assert caught.value.filename == str(small_disk / "file")
    with pytest.raises(OSError, match="Read-only file system"), staged_folder(small_disk / "folder"):
        raise AssertionError("entered")


def test_links_are_replaced_and_never_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link").symlink_to("precious")
    write_text(tmp_path / "link", "x")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "link").read_text() == "x" and not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_not_a_file_is_not_replaced(tmp_path: Path, make) -> None:
    make(tmp_path / "other")
    for write in (write_text, lambda path, text: append_lines(path)):
        with pytest.raises(OSError, match=r"not a regular file|Is a directory") as caught:
            write(tmp_path / "other", "x")
        assert caught.value.filename == str(tmp_path / "other")
    assert names(tmp_path) == ["other"]


def test_lines_are_appended(tmp_path: Path) -> None:
    for line in ("one\n", "zw\u00f6lf\n"):
        with append_lines(tmp_path / "lines") as lines:
            lines.write(line)
            assert (tmp_path / "lines").read_text(encoding="utf-8").endswith(line)
    assert (tmp_path / "lines").read_text(encoding="utf-8") == "one\nzw\u00f6lf\n"


def test_names_of_new_files_and_folders_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr("qlora_jax.atomic_files.os.fsync", lambda number: synced.append(os.fstat(number).st_ino))
    inodes = [path.stat().st_ino for path in (tmp_path, *make_folder(tmp_path / "runs" / "mine")[::-1])]
    assert [*reversed(synced)] == inodes[:2] and make_folder(tmp_path / "runs" / "mine") == []
    synced.clear()
    append_lines(tmp_path / "runs" / "mine" / "lines").close()
    assert inodes[2] in synced
    synced.clear()
    append_lines(tmp_path / "runs" / "mine" / "lines").close()
    assert inodes[2] not in synced


def test_lines_are_not_appended_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "lines").symlink_to("precious")
    with pytest.raises(OSError, match="found a symbolic link to precious") as caught:
        append_lines(tmp_path / "lines")
    assert caught.value.filename == str(tmp_path / "lines") and (tmp_path / "precious").read_text() == "precious"


def test_a_line_that_a_full_disk_cut_is_removed(small_disk: Path) -> None:
    with append_lines(small_disk / "lines") as lines:
        lines.write("first\n")
        with pytest.raises(OSError, match=FULL) as caught:
            lines.write("x" * SMALL_DISK_BYTES)
        assert caught.value.filename == str(small_disk / "lines")
        assert (small_disk / "lines").read_text() == "first\n"
        lines.write("second\n")
    assert (small_disk / "lines").read_text() == "first\nsecond\n"


def test_lines_that_are_missing_at_the_end_are_noticed(tmp_path: Path) -> None:
    lines = append_lines(tmp_path / "lines")
    lines.write("first\n")
    os.truncate(tmp_path / "lines", 2)
    with pytest.raises(OSError, match="found 2 bytes, expected 6"):
        lines.close()


def test_a_named_file_may_be_a_link_or_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("new")
    write_named_text(tmp_path / "link", "x")
    assert (tmp_path / "new").read_text() == "x" and (tmp_path / "link").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_named_text(tmp_path / "pipe", "x")
    reader.join()
    assert read == ["x"]


@pytest.mark.parametrize("there", [False, True])
def test_appears_at_the_end(tmp_path: Path, there: bool) -> None:
    target = tmp_path / "deep" / "out"
    if there:
        target.mkdir(parents=True)
    with staged_folder(target) as folder:
        (folder / "file").write_text("x")
        assert not (target / "file").exists()
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert (target / "file").read_text() == "x"


def test_an_error_in_a_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out", "out/inside"])
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match="out: exists and is not empty"), staged_folder(tmp_path / "out"):
        raise AssertionError("entered")
    assert (tmp_path / name).read_text() == "precious"


def test_errors_within_a_folder_name_the_target(small_disk: Path) -> None:
    with pytest.raises(OSError, match=FULL) as caught, staged_folder(small_disk / "out") as folder:
        write_bytes(folder / "file", bytes(2 * SMALL_DISK_BYTES))
    assert caught.value.filename == str(small_disk / "out" / "file") and names(small_disk) == []


def test_a_folder_that_another_process_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="out: exists and is not empty"), staged_folder(tmp_path / "out") as folder:
        write_text(folder / "file", "ours")
        with staged_folder(tmp_path / "out") as other:
            write_text(other / "file", "theirs")
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "file").read_text() == "theirs"


def test_a_folder_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")
    with pytest.raises(ValueError, match="out: a symbolic link to elsewhere"), staged_folder(tmp_path / "out"):
        raise AssertionError("entered")


@pytest.mark.slow
def test_a_command_that_is_interrupted_leaves_nothing(tmp_path: Path, smollm2_gguf: Path) -> None:
    target = tmp_path / "made" / "out"
    command = [sys.executable, "-m", "qlora_jax.quantize", "--model", str(smollm2_gguf), "--output", str(target)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    for _ in range(6000):
        if any(target.parent.glob(".out.partial-*/*.safetensors*")):
            break
        time.sleep(0.005)  # writing takes less than a second
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and "Traceback" not in process.communicate()[1]
    assert not list(target.parent.iterdir())


# The file system of the kernel, and counts that say that a process is alive: no results, and lost ones do no harm.
WITHOUT_RESULTS = {"training/metrics/memory_watch.py", "hosts/join.py"}


def test_results_are_written_by_these_functions_alone() -> None:
    package = ROOT / "qlora_jax"
    write = re.compile(r"\.(write_text|write_bytes|tofile|savetxt)\(|json\.dump\(|np\.save\(")
    writers = {str(path.relative_to(package)) for path in package.rglob("*.py") if write.search(path.read_text())}
    assert writers - {"atomic_files.py"} == WITHOUT_RESULTS
