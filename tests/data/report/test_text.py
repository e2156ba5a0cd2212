"""The printed data report: its lines, its example, and characters that would move the cursor."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_jax.data.dataset import Dataset
from qlora_jax.data.report.stats import RowParts, ShownText
from qlora_jax.data.report.text import format_example, print_report, report_lines
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, with_new_tokens
from tests.data.loading import load, question, rows_of_lengths


def printed(dataset: Dataset, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=100, **options)
    print_report(dataset.report, console)
    return console.file.getvalue()


def test_report_of_a_known_data_set(plain_tokenizer: Tokenizer, write_rows: Callable):
    path = rows_of_lengths(plain_tokenizer, write_rows)
    assert printed(load(plain_tokenizer, train=path)) == (
        f"data: train: 4 of 4 rows of {path}, format completion\n"
        "data: tokens per row: 1% 10, 25% 10, median 20, 75% 30, 95% 40, longest 40\n"
        "data: supervised: 8.3% of 96 targets (8)\n"
        "data: too long: none (data.max_length 1,024)\n"
        "data: steps per epoch: 1 of 4 rows; by padded length 64: 1\n"
        "data: positions used: 37.5% of those in an epoch's batches; the rest is padding. With data.packing=true rows "
        "share the positions of a pack, so a step has more rows\n"
        "data: held out: none\n"
        f"data: example: {path}:1, the loss sees the text in ⟦ ⟧\n"
        "  |  word word word word word word word word⟦ yes<|im_end|>⟧\n"
    )


@pytest.mark.parametrize(
    "changes", [{"padding_share": 0.29}, {"packs": 1}, {"parts": RowParts(("chosen", "rejected"), head=False)}]
)
def test_packing_is_advised_only_where_it_helps(plain_tokenizer: Tokenizer, write_rows: Callable, changes: dict):
    report = load(plain_tokenizer, train=rows_of_lengths(plain_tokenizer, write_rows)).report
    assert "data.packing" in dict(report_lines(report))["positions used"]
    assert "data.packing" not in dict(report_lines(dataclasses.replace(report, **changes)))["positions used"]


def test_report_on_a_terminal_has_colour_and_marks(tokenizer: Tokenizer, write_rows: Callable):
    text = printed(load(tokenizer, train=write_rows([question(1)])), force_terminal=True, color_system="standard")
    assert "\x1b[1;32m⟦yes<|im_end|>⟧\x1b[0m" in text and "╭─ data" in text


def test_report_tells_what_a_person_would_not_see(tokenizer: Tokenizer, write_rows: Callable):
    rows = [
        {**question(1), "completion": "  indented", "note": "x"},
        {**question(2), "completion": "\x04 dropped by this tokenizer"},
        {**question(3), "completion": "a <|im_end|> b"},
    ]
    dataset = load(tokenizer, train=write_rows(rows))
    told = report_lines(dataset.report)
    assert "columns not used: id, note" in told[0][1]
    assert [value[-3:] for name, value in told if name == "note"] == [": 1", ": 1", ": 1"]
    assert (dataset.report.train.cut, dataset.report.train.lossy, dataset.report.train.special_text) == (1, 1, 1)


@pytest.mark.parametrize("cached", [False, True])
def test_reasoning_that_the_template_drops_is_told(
    tokenizer: Tokenizer, write_rows: Callable, tmp_path: Path, cached: bool
):
    """SmolLM2's template does not read the field. The report says so, names a row, and gives advice."""
    asked = {"role": "user", "content": "q"}
    chats = [[asked, {"role": "assistant", "content": "a", **({"reasoning": "why"} if n else {})}] for n in range(3)]
    path = write_rows([{"messages": chat} for chat in chats])
    cache = {"cache": str(tmp_path / "cache")} if cached else {}
    told = [value for name, value in report_lines(load(tokenizer, train=path, **cache).report) if name == "note"]
    assert len(told) == 1 and told[0].startswith("rows with reasoning that the chat template does not write")
    assert "<think>...</think>" in told[0] and told[0].endswith(f": 2, the first is {path}:2")


@pytest.mark.parametrize("cached", [False, True])
def test_new_tokens_that_no_training_row_has_are_told(
    tokenizer: Tokenizer, write_rows: Callable, tmp_path: Path, cached: bool
):
    grown = with_new_tokens(tokenizer, ["<query>", "<cut>", "<held>"], ["<tool>"])
    rows = [question(number, "<query>" if number else "yes <query>") for number in range(10)]
    rows.append({"prompt": "long " * 60, "completion": "yes " * 60 + "<cut>"})
    other = write_rows([question(number, "no <tool> <tool>") for number in range(3)], "other.jsonl")
    held = write_rows([question(99, "<held>")], "held.jsonl")
    settings = dict(train={write_rows(rows): 1.0, other: 0.5}, eval=held, max_length=80, overlong="truncate-right")
    for _ in range(2):  # the second time from the cache
        report = load(grown, **settings, cache=str(tmp_path / "cache") if cached else None).report
        assert dict(report.train.new_tokens) == {grown.new_ids[0]: 10, grown.new_ids[3]: 6}
        assert report.unseen == ("<cut>", "<held>")
        note = "new tokens in no training row, whose meaning the model cannot learn: '<cut>', '<held>'"
        assert ("note", note) in report_lines(report)
    plain = load(tokenizer, **settings).report
    assert plain.unseen == () and not [value for _, value in report_lines(plain) if "new tokens" in value]


def test_the_example_can_not_drive_the_terminal():
    text = format_example([ShownText("a\x1b[2Jb\r\x9bc", False), ShownText("\x07ok\n\tx", True)], ("[[", "]]")).plain
    assert text == "a␛[2Jb␍\ufffdc[[␇ok\n\tx]]"
    long = format_example([ShownText("a" * 5000, False), ShownText("b" * 5000, True)]).plain
    assert len(long) < 1700 and "...(4,400 characters)..." in long


def test_marks_are_ascii_where_the_console_is(tokenizer: Tokenizer, write_rows: Callable):
    dataset = load(tokenizer, train=write_rows([question(1)]))
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=100)
    print_report(dataset.report, console)
    console.file.flush()
    assert b"[[yes<|im_end|>]]" in console.file.buffer.getvalue()


def test_packs_hold_the_rows_that_an_epoch_draws(tokenizer: Tokenizer, write_rows: Callable):
    files = [write_rows([{"text": f"{name} {n}"} for n in range(10)], f"{name}.jsonl") for name in ("a", "b")]
    for weight, rows in ((1.0, "20 rows"), (0.5, "15 rows per epoch, by weight")):
        dataset = load(tokenizer, train={files[0]: 1.0, files[1]: weight}, packing=True, max_length=64)
        told = dict(report_lines(dataset.report))["steps per epoch"]
        assert told.endswith(f"; {rows} in {dataset.report.packs} packs of 64 positions")
