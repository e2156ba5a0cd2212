"""A thread prefetches tensors before they are needed."""

import io
import threading

import numpy as np

from qlora_jax.model_source import PREFETCH_DEPTH, ByteRange, TensorEntry, _read_into_page_cache, prefetch


def entry(name: str, *ranges: ByteRange) -> TensorEntry:
    return TensorEntry(
        name=name,
        shape=(),
        file_type="F32",
        nbytes=4,
        read_rows=lambda first, end: np.zeros(end - first),
        ranges_of=lambda first, end: ranges,
    )


def test_the_next_tensors_are_read_ahead_and_none_beyond(monkeypatch):
    warmed, may_go_on = [], threading.Event()

    def warm(entry, rows):
        warmed.append(entry.name)
        may_go_on.wait(10)

    monkeypatch.setattr("qlora_jax.model_source._read_into_page_cache", warm)
    made = [entry(str(i)) for i in range(9)]
    entries = prefetch(made)
    assert next(entries) is made[0]
    may_go_on.set()
    entries.close()  # waits for what is being read, and reads nothing more than was asked
    assert warmed[: PREFETCH_DEPTH + 1] == [str(i) for i in range(len(warmed))] and len(warmed) <= PREFETCH_DEPTH + 1
    assert [each.name for each in prefetch(made)] == [str(i) for i in range(9)]


def test_prefetch_reads_the_bytes_of_each_place(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(range(256)) * 20)
    monkeypatch.setattr("qlora_jax.model_source.CHUNK", 1000)
    read = []
    original = io.FileIO.readinto

    class Counting(io.FileIO):
        def readinto(self, buffer):
            at = self.tell()
            count = original(self, buffer)
            read.append((at, count))
            return count

    monkeypatch.setattr("pathlib.Path.open", lambda path, *args, **kwargs: Counting(path))
    file = tmp_path / "file"
    _read_into_page_cache(entry("x", ByteRange(file, 10, 2500), ByteRange(file, 4000, 1000)), ((0, 1),))
    assert read == [(10, 1000), (1010, 1000), (2010, 500), (4000, 1000)]
