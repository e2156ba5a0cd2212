"""Data sets on a Hub: addresses, rows, and the words of each error. datasets is an optional dependency."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.data.readers.files import content_digest, read_rows
from qlora_jax.data.readers.hub_rows import HubRows
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from tests.data.loading import load

ROWS = [{"prompt": f"Is {n} odd?", "completion": "yes", "more": None} for n in range(5)]


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
    """Replaces the only function of the library that is called."""
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
