"""Tensors that a thread reads before their turn."""

import io
import threading
from pathlib import Path

import numpy as np

from qlora_jax.io.model_source import AHEAD, TensorEntry, _warm, reading_ahead


def entry(name: str, *places: tuple[Path, int, int]) -> TensorEntry:
    return TensorEntry(name=name, shape=(), file_type="F32", nbytes=4, read=lambda: np.zeros(()), places=places)


def test_the_next_tensors_are_read_ahead_and_none_beyond(monkeypatch):
    warmed, may_go_on = [], threading.Event()

    def warm(entry):
        warmed.append(entry.name)
        may_go_on.wait(10)

    monkeypatch.setattr("qlora_jax.io.model_source._warm", warm)
    made = [entry(str(i)) for i in range(9)]
    entries = reading_ahead(made)
    assert next(entries) is made[0]
    may_go_on.set()
    entries.close()  # waits for what is being read, and reads nothing more than was asked
    assert warmed[: AHEAD + 1] == [str(i) for i in range(len(warmed))] and len(warmed) <= AHEAD + 1
    assert [each.name for each in reading_ahead(made)] == [str(i) for i in range(9)]


def test_reading_ahead_reads_the_bytes_of_each_place(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(range(256)) * 20)
    monkeypatch.setattr("qlora_jax.io.model_source.CHUNK", 1000)
    read = []
    original = io.FileIO.readinto

    class Counting(io.FileIO):
        def readinto(self, buffer):
            at = self.tell()
            count = original(self, buffer)
            read.append((at, count))
            return count

    monkeypatch.setattr("pathlib.Path.open", lambda path, *args, **kwargs: Counting(path))
    _warm(entry("x", (tmp_path / "file", 10, 2500), (tmp_path / "file", 4000, 1000)))
    assert read == [(10, 1000), (1010, 1000), (2010, 500), (4000, 1000)]
