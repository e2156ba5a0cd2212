"""A row format of another package is used where data.format names it, and never otherwise."""

import dataclasses
import json
from pathlib import Path

import pytest
from riddles import RIDDLES

import qlora_jax as q
from qlora_jax.config import Config, ConfigError, DataArgs, ModelArgs, validate
from qlora_jax.config.parse import from_dict
from qlora_jax.config.row_formats import ROW_FORMATS, RowFormatDeclaration
from qlora_jax.data.dataset import load_dataset
from qlora_jax.data.formats.detect import detect_format
from qlora_jax.data.formats.registry import format_of
from qlora_jax.data.readers.files import Place, Row
from tests.inference.tiny import byte_tokenizer

ROW = {"riddle": "what shines?", "solution": "sun"}


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ROW_FORMATS, "_values", dict(ROW_FORMATS.items()))


def data(folder: Path, rows: list[dict], **settings) -> DataArgs:
    path = folder / "riddles.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataArgs(train=str(path), max_length=64, **settings)


def loaded(args: DataArgs):
    return load_dataset(args, byte_tokenizer(), micro_batch_size=1, accumulation=1, seed=0)


def test_rows_are_read_by_their_format_and_kept_by_its_version(tmp_path: Path):
    q.register_row_format(RIDDLES)
    args = data(tmp_path, [ROW] * 3, format="riddles", cache=str(tmp_path / "cache"))
    report = loaded(args).report.train
    assert report.rows == 3 and report.ignored_columns == ()
    kept = {path.name for path in (tmp_path / "cache").iterdir()}
    loaded(args)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == kept
    ROW_FORMATS._values["riddles"] = RowFormatDeclaration(implementation=dataclasses.replace(RIDDLES, version="2"))
    loaded(args)
    assert {path.name for path in (tmp_path / "cache").iterdir()} > kept


def test_its_columns_may_have_other_names(tmp_path: Path):
    q.register_row_format(RIDDLES)
    names = {"riddle": "q", "hint": "h", "solution": "a"}
    rows = [{"q": "what shines?", "a": "sun"}, {"q": "what waxes?", "h": "night", "a": "moon"}]
    args = data(tmp_path, rows, format="riddles", columns=names)
    validate(Config(model=ModelArgs(path="m"), data=args, output="o"))
    assert loaded(args).report.train.rows == 2
    with pytest.raises(ConfigError, match=r"data\.columns"):
        validate(Config(model=ModelArgs(path="m"), data=dataclasses.replace(args, format="auto"), output="o"))


def test_it_is_not_detected(tmp_path: Path):
    q.register_row_format(RIDDLES)
    with pytest.raises(ValueError, match="the rows have no known format"):
        detect_format("riddles.jsonl", [Row(Place(1, 0), ROW)])
    bad = [{"riddle": 3, "solution": "sun"}, ROW]
    with pytest.raises(ValueError, match="riddle is not text"):
        loaded(data(tmp_path, bad, format="riddles"))


def test_wrong_declarations_are_one_error():
    with pytest.raises(ConfigError, match="format: found 'riddles', expected one of auto, messages"):
        from_dict(DataArgs, {"train": "t", "format": "riddles"})
    ROW_FORMATS.register("other", RowFormatDeclaration(implementation=RIDDLES))
    with pytest.raises(ValueError, match=r"data\.format: 'other' is declared as RowFormat.*, expected a RowFormat"):
        format_of("other")
    ROW_FORMATS.register("none", RowFormatDeclaration(implementation="nowhere:FORMAT"))
    with pytest.raises(ValueError, match=r"data\.format: 'none' is declared as nowhere:FORMAT, which cannot be loaded"):
        format_of("none")
    with pytest.raises(ValueError, match=r"qlora_jax\.row_formats: 'text' is taken"):
        q.register_row_format(dataclasses.replace(RIDDLES, name="text"))
