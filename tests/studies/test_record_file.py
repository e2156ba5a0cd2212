"""Ledgers lose nothing that was appended, and notice what was changed."""

import shutil
import threading
from typing import TypedDict

import pytest

from qlora_jax.studies.record_file import RecordFile

INPUTS = {"model": "m", "temperature": 0.2}


class Line(TypedDict):
    name: str
    value: int | None


def records(path) -> list[Line]:
    with RecordFile(path, INPUTS, Line) as stored:
        return stored.records


def write(path, count: int) -> None:
    with RecordFile(path, INPUTS, Line) as stored:
        for value in range(count):
            stored.append(Line(name=f"\u2028 {value}\n", value=value))


def test_records_come_back(tmp_path):
    path = tmp_path / "new" / "records.jsonl"
    write(path, 3)
    write(path, 2)
    assert [record["value"] for record in records(path)] == [0, 1, 2, 0, 1]
    assert records(path)[0]["name"] == "\u2028 0\n"


def test_a_half_line_of_a_killed_process_is_dropped(tmp_path):
    path = tmp_path / "records.jsonl"
    write(path, 3)
    whole = path.read_bytes()
    for cut in (1, 10, 30):
        path.write_bytes(whole[:-cut])
        assert len(records(path)) == 2
        write(path, 1)  # starts on a new line
        assert [record["value"] for record in records(path)] == [0, 1, 0]
    path.write_bytes(whole[:20])  # killed while it wrote the first line
    assert records(path) == []


def test_every_line_is_on_the_disk_before_append_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("qlora_jax.atomic_files.os.fsync", lambda descriptor: synced.append(descriptor))
    with RecordFile(tmp_path / "records.jsonl", INPUTS, Line) as stored:
        before = len(synced)
        for value in range(3):
            stored.append(Line(name="x", value=value))
            assert len(synced) == before + value + 1


@pytest.mark.parametrize("moved", [True, False])
def test_a_folder_that_went_away_is_noticed(tmp_path, moved):
    folder = tmp_path / "output" / "replies"
    folder.parent.mkdir()
    with RecordFile(folder / "records.jsonl", INPUTS, Line) as stored:
        stored.append(Line(name="x", value=1))
        if moved:
            folder.parent.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(folder.parent)
        with pytest.raises(OSError, match=r"records.jsonl: it or its folder was deleted, moved or replaced"):
            stored.append(Line(name="x", value=2))
    with pytest.raises(FileNotFoundError, match="replies"):
        RecordFile(folder / "others.jsonl", INPUTS, Line)
    if moved:
        assert len(records(tmp_path / "elsewhere/replies/records.jsonl")) == 1


def test_threads_do_not_mix_lines(tmp_path):
    path = tmp_path / "records.jsonl"
    with RecordFile(path, INPUTS, Line) as stored:

        def add(name: str) -> None:
            for value in range(20):
                stored.append(Line(name=name * 500, value=value))

        threads = [threading.Thread(target=add, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(record["value"] for record in records(path)) == sorted([*range(20)] * 4)


def test_changed_inputs_and_lines_are_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    write(path, 2)
    for changed in ({"model": "m", "temperature": 0.3}, {"model": "m"}, INPUTS | {"top_p": 1.0}):
        with pytest.raises(ValueError, match=r"made with other inputs: t.*delete this file"):
            RecordFile(path, changed, Line)
    text = path.read_text()
    path.write_text(text.replace('"value": 1', '"value": 7'))
    with pytest.raises(ValueError, match=r"records.jsonl:3: damaged .* Delete this line$"):
        records(path)
    path.write_text(text.replace('"model": "m"', '"model": "n"'))
    with pytest.raises(ValueError, match=r"records.jsonl:1: damaged .* Delete this file to make it again$"):
        records(path)
    path.write_text(text + '{"name": "by hand", "value": 3}\n')
    with pytest.raises(ValueError, match=r"records.jsonl:4: not a record"):
        records(path)
