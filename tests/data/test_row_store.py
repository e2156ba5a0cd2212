"""The cache returns the same rows as no cache, is written again after any change, and reads large files in parts."""

import csv
import errno
import gzip
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qlora_jax.data import dataset as dataset_module
from qlora_jax.data import row_store as stored_module
from qlora_jax.data.dataset import Dataset
from qlora_jax.data.readers.files import Place
from qlora_jax.data.row_counts import RowCounts
from qlora_jax.data.row_store import RowChunk, open_stored_rows, store_rows
from qlora_jax.data.rows import concatenate_rows, token_rows
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.data.conftest import ASSETS
from tests.data.loading import load
from tests.data.trees import Shape, encode_tree, shapes
from tests.marks import first_always, some_in_ci

ROOT = Path(__file__).parents[2]


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Is {n} odd?" + " Think." * (n % 7), "completion": f"{n} is"} for n in range(count)]


def batches_of(dataset: Dataset, count: int) -> list[np.ndarray]:
    return [batch.inputs for batch in itertools.islice(dataset.train_batches(), count)]


@pytest.mark.parametrize("settings", [{}, {"packing": True}, {"eval_fraction": 0.3}])
def test_cached_rows_are_the_same(tokenizer: Tokenizer, write_rows: Callable, tmp_path: Path, settings: dict):
    path = write_rows(rows_of(40))
    plain = load(tokenizer, train=path, **settings)
    for _ in range(2):
        cached = load(tokenizer, train=path, cache=str(tmp_path / "cache"), **settings)
        assert cached.fingerprint == plain.fingerprint and cached.report == plain.report
        assert cached.train.where(3) == f"{path}:4"
        for ours, theirs in zip(batches_of(cached, 6), batches_of(plain, 6), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        held = [[b.inputs.tolist() for b in one.eval_batches(4)] for one in (cached, plain)]
        assert held[0] == held[1]


def check_stored(chunks: list[list[Shape]], start: int, stop: int) -> None:
    """Stores rows of those shapes in chunks, and compares rows start to stop - 1 with those that were stored."""
    rows, at = [], 0
    for chunk in chunks:
        encoded = [encode_tree(shape, at + n, labels=[[at + n, 1.0]]) for n, shape in enumerate(chunk)]
        rows.append(token_rows("rows.jsonl", encoded, [Place(at + n + 1, at + n) for n in range(len(chunk))]))
        at += len(chunk)
    whole = concatenate_rows(rows, rows[0].files)
    with tempfile.TemporaryDirectory() as folder:
        entry = Path(folder) / "entry"
        store_rows((RowChunk(part, RowCounts(kept=len(part)), np.zeros(0, np.uint64), "text") for part in rows), entry)
        stored = open_stored_rows(entry, "rows.jsonl")
        assert stored is not None and stored.digest == whole.digest
        assert stored.branching == whole.branching == (entry / "branch_ends").exists()
        part, lengths = stored.read(start, stop), stored.lengths(start, stop)
        counts = stored.branch_counts(start, stop)
    assert lengths.tolist() == part.lengths.tolist() == whole.lengths[start:stop].tolist()
    assert counts.tolist() == whole.branch_counts[start:stop].tolist()
    for index in range(start, stop):
        assert part.branches_of(index - start) == whole.branches_of(index)
        for ours, theirs in zip(part.row(index - start), whole.row(index), strict=True):
            assert ours.tolist() == theirs.tolist()
    assert part.values["labels"].tolist() == whole.values["labels"][start:stop].tolist()


tree_chunks = st.lists(st.lists(shapes(st.integers(0, 3)), max_size=4), min_size=1, max_size=4)


@pytest.mark.slow
@hypothesis_settings(max_examples=6)  # each flushes its files to the disk
@given(tree_chunks.filter(any), st.data())
def test_trees_and_values_are_read_back_in_any_range(chunks: list[list[Shape]], data: st.DataObject):
    count = sum(map(len, chunks))
    start = data.draw(st.integers(0, count - 1))
    check_stored(chunks, start, data.draw(st.integers(start + 1, count)))


@pytest.mark.parametrize("first", [[], [Shape(5, ())] * 2])
def test_trees_may_follow_rows_that_are_texts(first: list[Shape]):
    check_stored([first, [Shape(3, ((3, 3), (4, 2)))], [Shape(4, ())]], 0, len(first) + 2)


def test_rows_without_branches_and_values_have_the_files_of_earlier_versions(tokenizer: Tokenizer, small_entry):
    _, cache, _ = small_entry
    for entry in cache.iterdir():
        names = {"ids", "supervised", "ends", "numbers", "lines", "hashes"}
        assert {path.name for path in entry.iterdir()} == {*names, "facts.json"}
        facts = json.loads((entry / "facts.json").read_text())["facts"]
        assert {*facts} == {"digest", "form", "tally", "files"} and {*facts["files"]} == names


@pytest.mark.parametrize("name", ["branch_ends", "branch_begins", "branch_depths", "values_labels"])
def test_a_damaged_tree_is_reported_and_deleted(tmp_path: Path, name: str):
    encoded = [encode_tree(Shape(4, ((3, 4), (3, 4))), seed, labels=[1.0, 0.0]) for seed in range(3)]
    rows = token_rows("rows.jsonl", encoded, [Place(n + 1, n) for n in range(3)])
    entry = tmp_path / "entry"
    store_rows([RowChunk(rows, RowCounts(kept=3), np.zeros(0, np.uint64), "text")], entry)
    content = (entry / name).read_bytes()
    (entry / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.warns(UserWarning, match=rf"damaged \({name}: found"):
        assert open_stored_rows(entry, "rows.jsonl") is None
    assert not entry.exists()


def test_rows_are_made_once_and_again_when_anything_changes(
    smollm2_source: dict, write_rows: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made: list[str] = []
    row_chunks = dataset_module.row_chunks
    monkeypatch.setattr(dataset_module, "row_chunks", lambda *args, **kw: made.append("") or row_chunks(*args, **kw))
    tokenizer, path, cache = load_tokenizer(smollm2_source), write_rows(rows_of(9)), str(tmp_path / "cache")

    def makes(**changes: Any) -> int:
        made.clear()
        settings = {"train": path, "cache": cache, **changes}
        load(settings.pop("tokenizer", tokenizer), **settings)
        return len(made)

    assert (makes(), makes(), makes(packing=True, buckets=2)) == (1, 0, 0)
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}")
    changes: list[dict[str, Any]] = [
        {"learn": "all"},
        {"max_length": 512},
        {"overlong": "drop"},
        {"format": "completion"},
        {"chat_template": str(template)},
        {"tokenizer": load_tokenizer({**smollm2_source, "eos_token": "<|endoftext|>"})},
        {"train": write_rows(rows_of(10), "more.jsonl")},
        {"source_max_length": 100, "target_max_length": 100},
    ]
    for change in changes:
        assert (makes(**change), makes(**change)) == (1, 0), change
    moved = tmp_path / "moved.jsonl"
    Path(path).rename(moved)
    assert makes(train=str(moved)) == 0
    assert makes(train=str(moved), eval_fraction=0.5) == 2


DAMAGE: dict[str, Callable[[bytes, int], bytes]] = {
    "flipped bit": lambda content, at: content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :],
    "cut off": lambda content, at: content[:at],
    "inserted byte": lambda content, at: content[:at] + b"\0" + content[at:],
    "repeated bytes": lambda content, at: content[:at] + content[at // 2 :],
    "zeroed bytes": lambda content, at: content[:at] + bytes(len(content) - at),
}


@pytest.fixture(scope="module")
def small_entry(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    """A file of rows, the folder of a cache with its entry, and the data set."""
    folder = tmp_path_factory.mktemp("cached")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(9)))
    settings = {"train": str(folder / "rows.jsonl"), "cache": str(folder / "cache"), "eval_fraction": 0.3}
    return settings, folder / "cache", load(tokenizer, **settings)


@pytest.mark.parametrize("name", ["ids", "supervised", "ends", "numbers", "lines", "facts.json"])
@pytest.mark.parametrize("damage", first_always([*DAMAGE]))
def test_a_damaged_entry_is_reported_and_made_again(tokenizer: Tokenizer, small_entry, name: str, damage: str):
    settings, cache, whole = small_entry
    for file in cache.glob(f"*/{name}"):
        content = file.read_bytes()
        for share in (0.01, 0.3, 0.62, 0.99):
            damaged = DAMAGE[damage](content, 1 + round(share * (len(content) - 2)))
            if damaged == content:  # zeros that were zeros
                continue
            file.write_bytes(damaged)
            with pytest.warns(UserWarning) as shown:
                again = load(tokenizer, **settings)
            assert again.fingerprint == whole.fingerprint and again.report == whole.report
            (message,) = (str(one.message) for one in shown)
            assert message.startswith(f"data.cache: {file.parent}: damaged (")
            assert message.endswith(". The rows are prepared again.")
            assert file.read_bytes() == content
    assert not [*cache.glob("*damaged*")]


def test_an_entry_without_a_file_is_made_again(tokenizer: Tokenizer, small_entry):
    settings, cache, whole = small_entry
    next(cache.glob("*/ids")).unlink()
    with pytest.warns(UserWarning, match="ids: found no file, expected"):
        assert load(tokenizer, **settings).fingerprint == whole.fingerprint


def test_a_damaged_entry_that_cannot_be_deleted_is_an_error(
    tokenizer: Tokenizer, small_entry, monkeypatch: pytest.MonkeyPatch
):
    settings, cache, _ = small_entry

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    ids = next(cache.glob("*/ids"))
    content = ids.read_bytes()
    ids.write_bytes(content[::-1])
    with (
        monkeypatch.context() as patch,
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(ValueError, match=r"is damaged and can't be deleted: Permission"),
    ):
        patch.setattr(Path, "rename", refuse)
        load(tokenizer, **settings)
    ids.write_bytes(content)


def test_a_cache_that_can_not_be_written_is_told(
    tokenizer: Tokenizer, write_rows: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write_rows(rows_of(9))
    with pytest.raises(ValueError, match=r"data\.cache: .* can't be read: Not a directory"):
        load(tokenizer, train=path, cache=path)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "ids")

    monkeypatch.setattr(stored_module, "_write", full)
    with pytest.raises(ValueError, match=r"data\.cache: ids: No space left on device"):
        load(tokenizer, train=path, cache=str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_killed_run_leaves_no_entry(tokenizer: Tokenizer, write_rows: Callable, tmp_path: Path):
    """After a kill during writing, the next run finds no entry, writes it, and ignores the partial folder."""
    path, cache = write_rows(rows_of(9)), tmp_path / "cache"
    half = (
        "import os, sys; from pathlib import Path; from qlora_jax.data import row_store\n"
        "def pieces():\n    os.kill(os.getpid(), 9)\n    yield\n"
        "row_store.store_rows(pieces(), Path(sys.argv[1]))"
    )
    load(tokenizer, train=path, cache=str(cache))
    (entry,) = cache.iterdir()
    before = (entry / "ids").read_bytes()
    shutil.rmtree(entry)
    done = subprocess.run([sys.executable, "-c", half, str(entry)], cwd=ROOT)
    assert done.returncode == -9 and not entry.exists() and len(list(cache.iterdir())) == 1
    load(tokenizer, train=path, cache=str(cache))
    assert (entry / "ids").read_bytes() == before


def test_of_two_runs_that_store_the_same_one_is_as_good(tokenizer: Tokenizer, write_rows: Callable, tmp_path: Path):
    path, cache = write_rows(rows_of(9)), tmp_path / "cache"
    load(tokenizer, train=path, cache=str(cache))
    (entry,) = cache.iterdir()
    before = (entry / "ids").read_bytes()
    store_rows(iter(()), entry)
    assert (entry / "ids").read_bytes() == before and list(cache.iterdir()) == [entry]


def test_nothing_stays_of_rows_that_are_wrong(tokenizer: Tokenizer, write_rows: Callable, tmp_path: Path):
    path = write_rows([*rows_of(3), {"prompt": "Q", "completion": ""}])
    for _ in range(2):
        with pytest.raises(ValueError, match=r":4: completion is empty"):
            load(tokenizer, train=path, cache=str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_rows_that_are_also_trained_on_are_told_from_a_cache_too(
    tokenizer: Tokenizer, write_rows: Callable, tmp_path: Path
):
    train, held = write_rows(rows_of(2000)), write_rows(rows_of(2100)[1990:], "held.jsonl")
    for settings in ({}, {"cache": str(tmp_path / "c")}, {"cache": str(tmp_path / "c"), "window": 1000}):
        assert load(tokenizer, train=train, eval=held, **settings).report.shared == 10


@pytest.mark.parametrize("packing", [False, True])
def test_a_file_in_windows_is_seen_whole(tokenizer: Tokenizer, write_rows: Callable, tmp_path: Path, packing: bool):
    path = write_rows(rows_of(2500))
    dataset = load(tokenizer, train=path, cache=str(tmp_path / "cache"), window=1000, packing=packing, max_length=128)
    report = dataset.report
    assert (report.windows, report.train.kept) == (3, 2500)
    epoch = list(itertools.islice(dataset.train_batches(), dataset.steps_per_epoch))
    numbers = np.concatenate([batch.rows.ravel() for batch in epoch])
    assert sorted(numbers[numbers >= 0].tolist()) == list(range(2500))
    assert epoch[-1].position == {"epoch": 1, "window": 0, "index": 0}
    assert sum(batch.inputs.size for batch in epoch) * (1 - report.padding_share) == pytest.approx(report.train.tokens)
    assert dataset.train.where(2400) == f"{path}:2401"
    again = next(dataset.train_batches(epoch[400].position if len(epoch) > 401 else epoch[20].position))
    following = epoch[401] if len(epoch) > 401 else epoch[21]
    np.testing.assert_array_equal(again.inputs, following.inputs)


def test_an_array_is_read_in_windows(tokenizer: Tokenizer, tmp_path: Path):
    (tmp_path / "rows.json").write_text(json.dumps(rows_of(5)))
    dataset = load(tokenizer, train=str(tmp_path / "rows.json"), cache=str(tmp_path / "c"), window=2)
    assert (dataset.report.windows, dataset.report.train.kept) == (3, 5)


WORDS = ["every", "number", "of", "a", "run", "is", "right", "where", "memory", "stays", "flat", "in", "summer"]
MEASURE = """
import gzip, itertools, json, re, sys
from qlora_jax.config.schema import DataArgs
from qlora_jax.data.dataset import load_dataset
from qlora_jax.data.tokenizer.tokenizer import load_tokenizer

path, tokenizer_json, cache = sys.argv[1:]
tokenizer = load_tokenizer({"tokenizer_json": gzip.open(tokenizer_json, "rt").read(), "eos_token": "<|im_end|>"})
data = DataArgs(train=path, cache=cache, window=2000, max_length=256, packing=True)
dataset = load_dataset(data, tokenizer, seed=0, micro_batch_size=4, accumulation=4)
for batch in itertools.islice(dataset.train_batches(), dataset.steps_per_epoch):
    pass
# ru_maxrss is the parent's if that used more memory before it started this process.
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
print(json.dumps([int(peak), dataset.report.train.kept]))
"""


def made_up_rows(count: int) -> Iterator[dict[str, str]]:
    for n in range(count):
        words = " ".join(WORDS[(n * 7919 + k * k) % len(WORDS)] for k in range(60 + n % 40))
        yield {"prompt": words, "completion": f"yes {n}"}


def write_lines(path: Path, rows: Iterator[dict[str, str]]) -> None:
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_columns(path: Path, rows: Iterator[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)


def write_array(path: Path, rows: Iterator[dict[str, str]]) -> None:
    with path.open("w") as file:
        file.write("[" + json.dumps(next(rows)))
        file.writelines(",\n" + json.dumps(row) for row in rows)
        file.write("]")


def write_parquet(path: Path, rows: Iterator[dict[str, str]]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, the extra `parquet`, is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([*rows]), path)


FORMATS = {
    ".jsonl": write_lines,
    ".jsonl.gz": write_lines,
    ".csv": write_columns,
    ".parquet": write_parquet,
    ".json": write_array,
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory of a process is in Linux's /proc")
@pytest.mark.parametrize("suffix", some_in_ci([(name,) for name in FORMATS], lambda index: index == 0))
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str):
    """Reads an epoch of 3 MB and of 30 MB of JSON Lines with made-up texts."""
    peaks = []
    for count in (6_000, 60_000):
        path = tmp_path / f"{count}{suffix}"
        FORMATS[suffix](path, made_up_rows(count))
        assets = (str(ASSETS / "smollm2_tokenizer.json.gz"), str(tmp_path / "c"))
        command = [sys.executable, "-c", MEASURE, str(path), *assets]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peak, kept = json.loads(done.stdout)
        assert kept > 0.99 * count
        peaks.append(peak)
    assert peaks[1] < 1.1 * peaks[0], peaks
