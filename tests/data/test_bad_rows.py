"""data.bad_rows: rows that cannot be used end a run, or are dropped, counted by reason and listed."""

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.data.bad_rows import BadRow, merge_reasons, reason_of
from qlora_jax.data.report.text import report_lines
from qlora_jax.data.row_counts import RowCounts
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from tests.data.loading import load, question

BROKEN = {3: '{"prompt": "cut', 7: json.dumps(question(7, " ")), 11: json.dumps({"prompt": "Q"}), 12: "[1]"}


@pytest.fixture
def broken(tmp_path: Path) -> str:
    """A file of 40 rows, of which those of BROKEN can't be used. Its name shows that lines end in the report."""
    lines = [BROKEN.get(n, json.dumps(question(n))) for n in range(40)]
    (tmp_path / "broken.jsonl").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "broken.jsonl")


def test_bad_rows_end_a_run_by_default(tokenizer: Tokenizer, broken: str):
    with pytest.raises(ValueError, match="4 of 40 rows can't be used"):
        load(tokenizer, train=broken)


def test_a_text_is_not_a_conversation_to_reply_to(tokenizer: Tokenizer, write_rows: Callable):
    with pytest.raises(ValueError, match="messages is not a list of objects"):
        load(tokenizer, "grpo", train=write_rows([{"messages": "Hello"}]))


def test_a_conversation_of_too_many_messages_is_a_bad_row(tokenizer: Tokenizer, write_rows: Callable):
    chats = [{"messages": [{"role": role, "content": "a"} for role in ("user", "assistant")] * n} for n in (2, 10_000)]
    file = write_rows(chats)
    start = time.process_time()
    with pytest.raises(ValueError, match=r":2: found 20,000 messages, expected at most 2,000\. Split the conversation"):
        load(tokenizer, train=file)
    assert time.process_time() - start < 30


@pytest.mark.parametrize("settings", [{}, {"cache": "cache"}, {"cache": "cache", "window": 100}])
def test_dropped_rows_leave_those_that_a_file_without_them_has(
    tokenizer: Tokenizer, broken: str, write_rows: Callable, tmp_path: Path, settings: dict[str, Any]
):
    if "cache" in settings:
        settings = {**settings, "cache": str(tmp_path / "cache")}
    good = load(tokenizer, train=write_rows([question(n) for n in range(40) if n not in BROKEN]), **settings)
    for _ in range(2):  # the second time from the cache
        dropped = load(tokenizer, train=broken, bad_rows="drop", **settings)
        a, b = dropped.train.window(0, 0).rows, good.train.window(0, 0).rows
        assert a.ids.tolist() == b.ids.tolist() and a.supervised.tolist() == b.supervised.tolist()
        assert a.numbers.tolist() == [n for n in range(40) if n not in BROKEN]
        assert dropped.train.where(39) == f"{broken}:40"
        assert (dropped.report.train.kept, dropped.report.train.rows, dropped.report.train.bad) == (36, 36, 4)
        assert dropped.report.train.percentiles == good.report.train.percentiles


def test_the_report_counts_and_lists_dropped_rows(tokenizer: Tokenizer, broken: str):
    lines = report_lines(load(tokenizer, train=broken, bad_rows="drop").report)
    assert lines[0][1].startswith(f"36 of 40 rows of {broken}")
    assert lines[1] == (
        "bad rows",
        "4 dropped (data.bad_rows drop). 1: not JSON: the line ends too early; 1: completion is empty; 1: no column "
        "'completion'; 1: expected an object such as {\"prompt\": \"...\"}",
    )  # fmt: skip
    listed = [value for name, value in lines if name == "bad row"]
    assert [line.split(": ")[0] for line in listed] == [f"{broken}:{n + 1}" for n in BROKEN]
    assert listed[0].endswith(": not JSON: the line ends too early at column 16: {\"prompt\": \"cut")  # fmt: skip


def test_of_many_dropped_rows_the_first_are_listed(tokenizer: Tokenizer, write_rows: Callable):
    rows = [question(n, "" if n % 2 else "yes") for n in range(4200)]  # several chunks
    lines = report_lines(load(tokenizer, train=write_rows(rows), bad_rows="drop").report)
    assert ("bad rows", "2,100 dropped (data.bad_rows drop). 2,100: completion is empty") in lines
    listed = [value for name, value in lines if name == "bad row"]
    assert [line.split(":")[1] for line in listed[:-1]] == [str(2 * n + 2) for n in range(20)]
    assert listed[-1] == "... and 2,080 more"


def test_rows_that_a_template_refuses_are_dropped_too(
    smollm2_source: dict[str, Any], templates: dict[str, str], write_rows: Callable
):
    from qlora_jax.data.tokenizer.tokenizer import load_tokenizer

    mistral = load_tokenizer({**smollm2_source, "chat_template": templates["mistral"]})
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    rows = [{"messages": turns}, {"messages": [{"role": "system", "content": "s"}, *turns]}]
    report = load(mistral, train=write_rows(rows), bad_rows="drop").report.train
    assert (report.kept, report.rows, report.bad) == (1, 1, 1) and report.bad_rows[0].line == 2


def test_held_out_rows_are_those_of_a_file_without_bad_rows(tokenizer: Tokenizer, broken: str, write_rows: Callable):
    good = load(tokenizer, train=write_rows([question(n) for n in range(40) if n not in BROKEN]), eval_fraction=0.3)
    dropped = load(tokenizer, train=broken, bad_rows="drop", eval_fraction=0.3)
    assert dropped.eval is not None and good.eval is not None
    assert dropped.eval.ids.tolist() == good.eval.ids.tolist()
    # Each bad row is listed once, though both splits read it.
    assert dropped.report.eval is not None and (dropped.report.train.bad, dropped.report.eval.bad) == (4, 0)
    held = load(tokenizer, train=write_rows([question(1)]), eval=broken, bad_rows="drop")
    assert held.report.eval is not None and held.report.eval.bad == 4


def test_a_mixture_names_the_file_of_each_dropped_row(tokenizer: Tokenizer, broken: str, write_rows: Callable):
    other = write_rows([question(1), question(2, "")], "other.jsonl")
    report = load(tokenizer, train={other: 1.0, broken: 1.0}, bad_rows="drop").report
    assert [row.where for row in report.train.bad_rows] == [
        *(f"{broken}:{n + 1}" for n in BROKEN),
        f"{other}:2",
    ]
    assert report.train.bad == 5


@pytest.mark.parametrize(
    "rows", [['{"prompt"'] * 3, [json.dumps(question(1, ""))] * 3, [json.dumps({"prompt": "Q"}), "1"]]
)
def test_a_file_of_bad_rows_only_is_an_error(tokenizer: Tokenizer, tmp_path: Path, rows: list[str]):
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=rf"rows\.jsonl.*(none of {len(rows)} can be used:\n  |no known format)"):
        load(tokenizer, train=str(tmp_path / "rows.jsonl"), bad_rows="drop")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("rows.json", json.dumps([question(1), question(2)])[:-9], "reading stops there"),
        ("rows.json", json.dumps([question(1)]) + json.dumps([question(2)]), "more text after the end of the array"),
        ("rows.csv", 'prompt,completion\nQ,A\nR,"B\nS,C\n', "not ','-separated: unexpected end of data"),
    ],
)
def test_a_row_that_hides_those_after_it_is_never_dropped(
    tokenizer: Tokenizer, tmp_path: Path, name: str, content: str, problem: str
):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"1 of 2 rows can't be used(.|\n)*{problem}"):
        load(tokenizer, train=str(tmp_path / name), bad_rows="drop")


def test_long_rows_are_not_bad_rows(tokenizer: Tokenizer, write_rows: Callable):
    path = write_rows([question(1), question(2, "yes " * 99)])
    with pytest.raises(ValueError, match=r"1 of 2 rows can't be used:\n.*expected at most 64 \(data\.max_length\)"):
        load(tokenizer, train=path, bad_rows="drop", overlong="error", max_length=64)


def test_problems_that_differ_in_details_have_one_reason():
    assert len({reason_of(f"not JSON: Expecting value at column {n}: {{{n}") for n in range(9)}) == 1
    assert len({reason_of(f"message {n}: unknown role 'x'; known are a; did you mean 'y'?") for n in range(9)}) == 1
    assert reason_of("found 3 fields, expected the header's 2: a, b") == "found N fields, expected the header's N: a, b"


def test_rare_reasons_become_one_without_losing_a_row():
    counts = merge_reasons(Counter({f"reason {n}": 1 + n for n in range(300)}), {"reason 7": 1, "other reasons": 5})
    assert len(counts) == 21 and sum(counts.values()) == sum(range(1, 301)) + 6 and counts["reason 299"] == 300


def test_counts_survive_json():
    row = BadRow("", 3, 2, "completion is empty")
    counts = RowCounts(rows=2, bad_reasons={"completion is empty": 1}, bad_rows=(row,), lookalikes={"guanaco": 2})
    assert RowCounts.from_dict(json.loads(json.dumps(counts.to_dict()))) == counts
    assert (counts + counts).bad == 2


def test_control_characters_of_a_bad_row_are_shown_instead(tokenizer: Tokenizer, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(question(1)) + "\n{\x1b]52;c;AAAA\x07\n")
    lines = report_lines(load(tokenizer, train=str(tmp_path / "rows.jsonl"), bad_rows="drop").report)
    assert not any("\x1b" in value or "\n" in value for _, value in lines)
