"""Where rows come from besides text files: Parquet, and data sets on a Hub; each an extra that may not be there."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.config.schema import DataArgs
from qlora_jax.data.dataset import Dataset, load_dataset
from qlora_jax.data.readers.files import content_digest, read_rows
from qlora_jax.data.readers.hub_rows import HubRows
from qlora_jax.data.report.text import facts
from qlora_jax.data.tokenizer.tokenizer import Tokenizer

ROWS = [{"prompt": f"Is {n} odd?", "completion": "yes", "more": None} for n in range(5)]
CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def load(tokenizer: Tokenizer, **settings: Any) -> Dataset:
    return load_dataset(DataArgs(**settings), tokenizer, seed=0, micro_batch_size=2, accumulation=2)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, the extra `parquet`, is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return str(path)


def test_parquet_rows_are_those_of_json(tmp_path: Path, tokenizer: Tokenizer, write_rows: Callable):
    path = write_parquet(tmp_path / "rows.parquet", ROWS)
    assert read_rows(path) == read_rows(write_rows(ROWS))
    assert [row.data for row in read_rows(path)] == ROWS
    ours, theirs = load(tokenizer, train=path), load(tokenizer, train=write_rows(ROWS))
    assert ours.train.ids.tolist() == theirs.train.ids.tolist()
    chat = write_parquet(tmp_path / "chat.parquet", [{"messages": CHAT, "tools": None}] * 2)
    assert load(tokenizer, train=chat).report.train.form == "messages"


def test_broken_parquet_rows_and_files_are_told(tmp_path: Path, tokenizer: Tokenizer):
    path = write_parquet(tmp_path / "rows.parquet", [*ROWS, {"prompt": "Q", "completion": None, "more": None}])
    with pytest.raises(ValueError, match=r"1 of 6 rows(.|\n)*rows\.parquet:6: completion is null, expected text"):
        load(tokenizer, train=path)
    raw = Path(path).read_bytes()
    for content in (raw[:-20], b"PAR1" + b"\0" * 40, raw[:200] + b"\xff" * 50 + raw[250:]):
        (tmp_path / "broken.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.parquet: the Parquet file is truncated or corrupt"):
            read_rows(tmp_path / "broken.parquet")


def test_parquet_texts_and_names_that_are_none_are_told(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, the extra `parquet`, is not installed")
    from pyarrow import parquet

    buffers = [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
    text = pyarrow.Array.from_buffers(pyarrow.string(), 1, buffers)
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "bytes.parquet")
    with pytest.raises(ValueError, match=r"bytes\.parquet: a text in the Parquet file is not UTF-8: .* 0xff"):
        read_rows(tmp_path / "bytes.parquet")
    parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match=r"twice\.parquet: has several columns named 'text'"):
        read_rows(tmp_path / "twice.parquet")


def test_without_pyarrow_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1\x15\x04\xff\xfe")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'qlora-jax\[parquet\]'; or write it as JSON Lines"):
        read_rows(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://datasets/org/name", ("org/name", None, None, "train")),
        ("hf://datasets/org/name@v1%2F2", ("org/name", "v1/2", None, "train")),
        ("hf://datasets/org/name@main?name=core&split=test", ("org/name", "main", "core", "test")),
        ("org/name", None),
    ],
)
def test_addresses(text: str, expected: tuple | None):
    hub = HubRows.parse(text)
    assert (hub and (hub.repo, hub.revision, hub.name, hub.split)) == expected


@pytest.mark.parametrize("text", ["hf://datasets/org/name?config=x", "hf://datasets/"])
def test_wrong_addresses_are_told(text: str):
    with pytest.raises(ValueError, match=r"expected hf://datasets/org/name\[@revision\]"):
        HubRows.parse(text)


def test_data_sets_of_a_hub(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, write_rows: Callable):
    """With the library's one function that is called put in its place."""
    asked = []

    def load_dataset(*args: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((args, options))
        if args[0] == "org/none":
            raise FileNotFoundError("Couldn't find any data file")
        return ROWS

    library: Any = types.ModuleType("datasets")
    library.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", library)
    name = "hf://datasets/org/name@v1?name=core&split=test"
    dataset = load(tokenizer, train=name)
    assert asked[0] == (("org/name", "core"), {"split": "test", "revision": "v1"})
    assert dataset.train.ids.tolist() == load(tokenizer, train=write_rows(ROWS)).train.ids.tolist()
    assert dataset.train.where(2) == f"{name}:3"
    assert content_digest(name) == content_digest(name.replace("core", "other"))
    with pytest.raises(ValueError, match="hf://datasets/org/none: Couldn't find any data file"):
        load(tokenizer, train="hf://datasets/org/none")


def test_a_local_folder_through_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("datasets", reason="datasets, the extra of that name, is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert [row.data for row in read_rows(f"hf://datasets/{tmp_path / 'data'}")] == ROWS
    with pytest.raises(ValueError, match="hf://datasets/"):
        read_rows(f"hf://datasets/{tmp_path / 'data'}?split=test")


def test_without_datasets_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'qlora-jax\[datasets\]'"):
        read_rows("hf://datasets/org/name")


def test_files_are_mixed_and_reported_each(tokenizer: Tokenizer, write_rows: Callable):
    guanaco = write_rows([{"text": f"### Human: {n}### Assistant: yes, yes"} for n in range(4)], "guanaco.jsonl")
    pairs = write_rows(ROWS, "pairs.jsonl")
    dataset = load(tokenizer, train={pairs: 2.0, guanaco: 0.5}, format={guanaco: "guanaco"})
    assert len(dataset.train) == 12 and dataset.steps_per_epoch == 3
    assert dataset.report.train.kept == 9 and dataset.report.train.path == f"{pairs}, {guanaco}"
    told = [value for name, value in facts(dataset.report) if name == "source"]
    assert told == [
        f"{pairs}, form completion: 5 rows, weight 2, 71.4% of the targets that are learned; columns not used: more",
        f"{guanaco}, form guanaco: 4 rows, weight 0.5, 28.6% of the targets that are learned",
    ]
    assert dataset.train.where(5) == f"{guanaco}:1"
    other = load(tokenizer, train={pairs: 2.0, guanaco: 1.0}, format={guanaco: "guanaco"})
    assert dataset.fingerprint != other.fingerprint


def test_packs_hold_the_rows_that_an_epoch_draws(tokenizer: Tokenizer, write_rows: Callable):
    files = [write_rows([{"text": f"{name} {n}"} for n in range(10)], f"{name}.jsonl") for name in ("a", "b")]
    for weight, rows in ((1.0, "20 rows"), (0.5, "15 rows that an epoch draws by weight")):
        dataset = load(tokenizer, train={files[0]: 1.0, files[1]: weight}, packing=True, max_length=64)
        told = dict(facts(dataset.report))["steps an epoch"]
        assert told.endswith(f"; {rows} in {dataset.report.packs} packs of 64 places")


def test_each_file_of_a_mixture_holds_out_its_own_rows(tokenizer: Tokenizer, write_rows: Callable):
    files = [write_rows([{"text": f"{name} {n}"} for n in range(60)], f"{name}.jsonl") for name in ("a", "b")]
    dataset = load(tokenizer, train=dict.fromkeys(files, 1.0), eval_fraction=0.3)
    assert dataset.eval is not None and len(dataset.eval) + len(dataset.train) == 120
    sources = {dataset.eval.where(int(number)).rpartition(":")[0] for number in dataset.eval.numbers}
    assert sources == set(files)
