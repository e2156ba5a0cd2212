"""load_dataset: from settings to batches and report, held-out rows, lengths, and the example data."""

import dataclasses
import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qlora_jax.config.schema import DataArgs
from qlora_jax.data.dataset import Dataset, load_dataset
from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.holdout import Split, content_hash
from qlora_jax.data.loss_mask.spans import Segment
from qlora_jax.data.readers.files import Place, Row, read_rows
from qlora_jax.data.report.text import format_example, print_report, report_lines
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer, with_new_tokens

ROOT = Path(__file__).parents[2]


def load(tokenizer: Tokenizer, **settings: Any) -> Dataset:
    return load_dataset(DataArgs(**settings), tokenizer, seed=0, micro_batch_size=2, accumulation=2)


def question(number: int, answer: str = "yes") -> dict[str, Any]:
    return {"prompt": f"Is {number} odd?", "completion": answer, "id": number}


def test_settings_become_batches(tokenizer: Tokenizer, write_rows: Callable):
    path = write_rows([question(number) for number in range(10)])
    dataset = load(tokenizer, train=path)
    assert dataset.steps_per_epoch == 3 and dataset.eval is None and list(dataset.eval_batches(4)) == []
    batch = next(dataset.train_batches())
    assert batch.inputs.shape == (2, 2, 64)
    supervised = batch.targets[0, 0][batch.weights[0, 0] == 1]
    assert tokenizer.decode(supervised.tolist()) == "yes<|im_end|>"
    assert dataset.train.where(int(batch.rows[0, 0, 0])) == f"{path}:{batch.rows[0, 0, 0] + 1}"


def test_equal_fingerprints_mean_equal_batches(tokenizer: Tokenizer, write_rows: Callable):
    path = write_rows([question(number) for number in range(10)])
    dataset = load(tokenizer, train=path)
    assert dataset.fingerprint == load(tokenizer, train=path).fingerprint
    changed = write_rows([question(number, "no" if number == 9 else "yes") for number in range(10)], "changed.jsonl")
    others = [
        load(tokenizer, train=changed),
        dataclasses.replace(dataset, seed=1),
        dataclasses.replace(dataset, accumulation=4),
        dataclasses.replace(dataset, packed=True),
    ]
    assert len({dataset.fingerprint, *(other.fingerprint for other in others)}) == 5


def hold_out(rows: list[Row]) -> list[list[Row]]:
    hashes = [content_hash(FORMATS["text"], row.data) for row in rows]
    sides = (Split(0.5, held_out=False), Split(0.5, held_out=True))
    return [[row for row, one in zip(rows, hashes, strict=True) if side.contains(one)] for side in sides]


@given(st.lists(st.tuples(st.text(st.characters(codec="utf-8"), max_size=3), st.integers()), max_size=30))
def test_rows_of_equal_content_are_on_one_side(pairs: list[tuple[str, int]]):
    # The last two rows have hashes on either side of 0.5.
    rows = [
        Row(Place(n + 1, n), {"text": text, "id": number})
        for n, (text, number) in enumerate([*pairs, ("a", 0), ("e", 0)])
    ]
    train, held = hold_out(rows)
    assert sorted([*train, *held], key=lambda row: row.place) == rows
    assert not {row.data["text"] for row in train} & {row.data["text"] for row in held}
    # The side of a row does not depend on the others.
    again = hold_out(rows[len(pairs) // 2 :])
    assert again[0] == [row for row in train if row in rows[len(pairs) // 2 :]]


def test_the_hash_of_a_row_never_changes():
    """All versions hold out the same rows. Expects the first 8 bytes of SHA-256 of {"text": "a"}."""
    assert content_hash(FORMATS["text"], {"text": "a", "id": 5}) == 0xFCF7579B2DB13F7E
    alpaca = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "input": None}]
    assert len({content_hash(FORMATS["alpaca"], data) for data in alpaca}) == 1


def test_a_fraction_is_held_out_and_never_trained_on(tokenizer: Tokenizer, write_rows: Callable):
    path = write_rows([question(number % 300) for number in range(400)])
    dataset = load(tokenizer, train=path, eval_fraction=0.25)
    assert dataset.eval is not None and len(dataset.train) + len(dataset.eval) == 400
    assert 60 < len(dataset.eval) < 140 and dataset.report.shared == 0
    batches = list(dataset.eval_batches(8))
    held = {int(number) for batch in batches for number in batch.rows.ravel()} - {-1}
    assert held == set(dataset.eval.numbers.tolist()) and not held & set(dataset.train.numbers.tolist())
    assert {number for number in range(300, 400) if number - 300 in held} == {n for n in held if n >= 300}


def test_a_named_file_is_held_out_and_rows_in_both_are_told(tokenizer: Tokenizer, write_rows: Callable):
    train = write_rows([question(number) for number in range(6)])
    long = {"prompt": "word " * 100, "completion": "yes"}
    held = write_rows([question(5), {**question(99), "id": 5}, long], "held.jsonl")
    dataset = load(tokenizer, train=train, eval=held)
    assert dataset.report.shared == 1
    assert (
        "note",
        "held-out rows that are also trained on, so their loss is not that of new data: 1",
    ) in report_lines(dataset.report)
    assert dataset.buckets == (64,) and dataset.eval_buckets == (64, 192)
    assert [batch.inputs.shape for batch in dataset.eval_batches(2)] == [(1, 2, 64), (1, 2, 192)]


def test_impossible_hold_outs_are_told(tokenizer: Tokenizer, write_rows: Callable):
    path = write_rows([question(1), question(2)])
    with pytest.raises(ValueError, match="expected one"):
        load(tokenizer, train=path, eval=path, eval_fraction=0.1)
    with pytest.raises(ValueError, match=r"eval_fraction 1e-06 of 2 rows leaves 2 to train on and 0 held out"):
        load(tokenizer, train=path, eval_fraction=1e-6)


def rows_of_lengths(tokenizer: Tokenizer, write_rows: Callable) -> str:
    """Four rows of 10, 20, 30 and 40 tokens. The answer is one token and eos."""
    words = [" word" * (n - 2) for n in (10, 20, 30, 40)]
    return write_rows([{"prompt": text, "completion": " yes"} for text in words])


def test_long_rows_are_cut_and_counted(plain_tokenizer: Tokenizer, write_rows: Callable):
    path = rows_of_lengths(plain_tokenizer, write_rows)
    report = load(plain_tokenizer, train=path, max_length=29).report.train
    # The row of 30 tokens loses its eos but not its answer. The row of 40 has no supervised token left.
    assert (report.rows, report.kept, report.truncated, report.overlong, report.unsupervised) == (4, 3, 1, 0, 1)
    assert report.percentiles == (10, 10, 20, 30, 40, 40) and report.cut == 0
    assert (report.tokens, report.supervised) == (9 + 19 + 28, 2 + 2 + 1)
    dropped = load(plain_tokenizer, train=path, max_length=29, overlong="drop").report.train
    assert (dropped.kept, dropped.truncated, dropped.overlong, dropped.unsupervised) == (2, 0, 2, 0)


def test_long_rows_can_lose_their_beginning_and_keep_bos(smollm2_source: dict, write_rows: Callable):
    asked = {**smollm2_source, "chat_template": None, "bos_token": "<|endoftext|>"}
    for adds_bos in (False, True):
        tokenizer = load_tokenizer({**asked, "add_bos_token": adds_bos})
        path = rows_of_lengths(tokenizer, write_rows)
        dataset = load(tokenizer, train=path, max_length=15, overlong="truncate-left")
        report = dataset.report.train
        assert (report.kept, report.truncated, report.unsupervised) == (4, 3, 0)
        whole = load(tokenizer, train=path).train
        for index in range(4):
            ids, supervised = dataset.train.row(index)
            all_ids, all_supervised = whole.row(index)
            tail = min(len(all_ids), 15) - adds_bos
            assert ids.tolist() == [0] * adds_bos + all_ids[-tail:].tolist()
            assert supervised.tolist() == [False] * adds_bos + all_supervised[-tail:].tolist()


def test_prompt_and_answer_can_have_lengths_of_their_own(plain_tokenizer: Tokenizer, write_rows: Callable):
    path = rows_of_lengths(plain_tokenizer, write_rows)
    dataset = load(plain_tokenizer, train=path, source_max_length=12, target_max_length=1)
    report = dataset.report.train
    assert (report.kept, report.truncated, report.tokens, report.supervised) == (4, 4, 8 + 3 * 12, 4)
    assert plain_tokenizer.decode(dataset.train.row(3)[0].tolist()) == " word" * 12 + " yes"


def test_settings_that_rows_do_not_fit_are_told(tokenizer: Tokenizer, plain_tokenizer: Tokenizer, write_rows: Callable):
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    path = write_rows([question(1), question(2)])
    twice = write_rows([{"messages": turns * 2}, {"messages": turns}], "twice.jsonl")
    with pytest.raises(
        ValueError, match=r"1 of 2 rows(.|\n)*:1: found 2 answers, expected one: data\.source_max_length"
    ):
        load(tokenizer, train=twice, source_max_length=64, target_max_length=64)
    for row_format, rows in (("text", [{"text": "a"}]), ("guanaco", [{"text": "### Human: Q### Assistant: A"}])):
        with pytest.raises(ValueError, match=r"1 of 1 rows(.|\n)*without turns, so data\.learn last"):
            load(plain_tokenizer, train=write_rows(rows, "text.jsonl"), format=row_format, learn="last")
    assert load(plain_tokenizer, train=path, learn="last").report.train.supervised == 4
    learned = load(plain_tokenizer, train=path, learn="all").report.train
    assert learned.supervised == learned.tokens


def test_bos_is_counted(smollm2_source: dict, templates: dict, write_rows: Callable):
    path = write_rows([question(1), {"prompt": "<|endoftext|><|endoftext|>Q", "completion": "A"}])
    named = {**smollm2_source, "bos_token": "<|endoftext|>", "add_bos_token": True}
    report = load(load_tokenizer({**named, "chat_template": None}), train=path).report.train
    assert (report.doubled_bos, report.without_bos) == (1, 0)
    # The model's own template writes none, so none is added, and the report counts such rows.
    report = load(load_tokenizer(named), train=path).report.train
    assert (report.doubled_bos, report.without_bos) == (0, 2)
    report = load(load_tokenizer({**named, "chat_template": templates["llama3"]}), train=path).report.train
    assert (report.doubled_bos, report.without_bos) == (0, 0)


def test_a_row_may_hold_several_examples(tokenizer: Tokenizer, write_rows: Callable):
    instances = [{"instruction_with_input": f"Is {n} odd?", "output": "yes"} for n in (1, 3)]
    path = write_rows([{"instruction": "Odd?", "instances": instances}, {"instances": instances[:1]}])
    dataset = load(tokenizer, train=path)
    assert [dataset.train.where(n) for n in range(3)] == [f"{path}:1", f"{path}:1 (row 2)", f"{path}:2 (row 3)"]
    assert (dataset.report.train.form, dataset.report.train.ignored_columns) == (
        "unnatural-instructions",
        ("instruction",),
    )
    broken = write_rows(
        [{"instances": [{"output": "x"}, {"instruction_with_input": " ", "output": 3}]}], "broken.jsonl"
    )
    with pytest.raises(
        ValueError, match=r"instance 0: needs .* found 'output'; instance 1: .* is empty; instance 1: out"
    ):
        load(tokenizer, train=broken)


def test_long_rows_can_be_errors(plain_tokenizer: Tokenizer, write_rows: Callable):
    path = rows_of_lengths(plain_tokenizer, write_rows)
    with pytest.raises(
        ValueError,
        match=r"2 of 4 rows(.|\n)*:3: found 30 tokens, expected at most 29 \(data\.max_length\)(.|\n)*:4: found 40",
    ):
        load(plain_tokenizer, train=path, max_length=29, overlong="error")
    assert load(plain_tokenizer, train=path, max_length=40, overlong="error").report.train.kept == 4


def test_a_data_set_with_nothing_left_is_an_error(plain_tokenizer: Tokenizer, write_rows: Callable):
    path = rows_of_lengths(plain_tokenizer, write_rows)
    with pytest.raises(
        ValueError,
        match=r"Of 4 rows, 4 were dropped because they are longer than data\.max_length 8(.|\n)*Raise data\.max",
    ):
        load(plain_tokenizer, train=path, max_length=8, overlong="drop")
    with pytest.raises(ValueError, match=r"Of 4 rows, 0 were dropped .* and 4 because their answers start behind it"):
        load(plain_tokenizer, train=path, max_length=8)


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
        "data: positions used: 37.5% of those in an epoch's batches; the rest is padding\n"
        "data: held out: none\n"
        f"data: example: {path}:1, the loss sees the text in ⟦ ⟧\n"
        "  |  word word word word word word word word⟦ yes<|im_end|>⟧\n"
    )


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
    text = format_example([Segment("a\x1b[2Jb\r\x9bc", False), Segment("\x07ok\n\tx", True)], ("[[", "]]")).plain
    assert text == "a␛[2Jb␍\ufffdc[[␇ok\n\tx]]"
    long = format_example([Segment("a" * 5000, False), Segment("b" * 5000, True)]).plain
    assert len(long) < 1700 and "...(4,400 characters)..." in long


def test_marks_are_ascii_where_the_console_is(tokenizer: Tokenizer, write_rows: Callable):
    dataset = load(tokenizer, train=write_rows([question(1)]))
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=100)
    print_report(dataset.report, console)
    console.file.flush()
    assert b"[[yes<|im_end|>]]" in console.file.buffer.getvalue()


def test_a_template_of_ones_own(tokenizer: Tokenizer, write_rows: Callable, tmp_path: Path):
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}")
    dataset = load(tokenizer, train=write_rows([question(1)]), chat_template=str(tmp_path / "own.jinja"))
    assert dataset.tokenizer.decode(dataset.train.row(0)[0].tolist()) == (
        "user:Is 1 odd?<|im_end|>assistant:yes<|im_end|>"
    )


PAIRS = [{"prompt": f"Is {n} odd?", "completion": "yes", "more": None} for n in range(5)]


def test_files_are_mixed_and_reported_each(tokenizer: Tokenizer, write_rows: Callable):
    guanaco = write_rows([{"text": f"### Human: {n}### Assistant: yes, yes"} for n in range(4)], "guanaco.jsonl")
    pairs = write_rows(PAIRS, "pairs.jsonl")
    dataset = load(tokenizer, train={pairs: 2.0, guanaco: 0.5}, format={guanaco: "guanaco"})
    assert len(dataset.train) == 12 and dataset.steps_per_epoch == 3
    assert dataset.report.train.kept == 9 and dataset.report.train.path == f"{pairs}, {guanaco}"
    told = [value for name, value in report_lines(dataset.report) if name == "source"]
    assert told == [
        f"{pairs}, format completion: 5 rows, weight 2, 71.4% of the supervised targets; columns not used: more",
        f"{guanaco}, format guanaco: 4 rows, weight 0.5, 28.6% of the supervised targets",
    ]
    assert dataset.train.where(5) == f"{guanaco}:1"
    other = load(tokenizer, train={pairs: 2.0, guanaco: 1.0}, format={guanaco: "guanaco"})
    assert dataset.fingerprint != other.fingerprint


def test_packs_hold_the_rows_that_an_epoch_draws(tokenizer: Tokenizer, write_rows: Callable):
    files = [write_rows([{"text": f"{name} {n}"} for n in range(10)], f"{name}.jsonl") for name in ("a", "b")]
    for weight, rows in ((1.0, "20 rows"), (0.5, "15 rows per epoch, by weight")):
        dataset = load(tokenizer, train={files[0]: 1.0, files[1]: weight}, packing=True, max_length=64)
        told = dict(report_lines(dataset.report))["steps per epoch"]
        assert told.endswith(f"; {rows} in {dataset.report.packs} packs of 64 positions")


def test_each_file_of_a_mixture_holds_out_its_own_rows(tokenizer: Tokenizer, write_rows: Callable):
    files = [write_rows([{"text": f"{name} {n}"} for n in range(60)], f"{name}.jsonl") for name in ("a", "b")]
    dataset = load(tokenizer, train=dict.fromkeys(files, 1.0), eval_fraction=0.3)
    assert dataset.eval is not None and len(dataset.eval) + len(dataset.train) == 120
    sources = {dataset.eval.where(int(number)).rpartition(":")[0] for number in dataset.eval.numbers}
    assert sources == set(files)


def test_titles_ship_with_a_clean_split(tokenizer: Tokenizer):
    folder = ROOT / "examples/titles"
    train, held = read_rows(folder / "train.jsonl.gz"), read_rows(folder / "heldout.jsonl")
    assert (len(train), len(held)) == (4978, 400)
    for turn in (0, 1):
        sides = [{row.data["messages"][turn]["content"] for row in side} for side in (train, held)]
        assert not sides[0] & sides[1]
    titles = [row.data["messages"][1]["content"] for row in (*train, *held)]
    assert all(title.startswith("Title: ") for title in titles) and len(set(titles)) == 5378


def test_titles_load(tokenizer: Tokenizer, tmp_path: Path):
    some = gzip.decompress((ROOT / "examples/titles/train.jsonl.gz").read_bytes()).splitlines(keepends=True)[:300]
    (tmp_path / "some.jsonl").write_bytes(b"".join(some))
    dataset = load(tokenizer, train=str(tmp_path / "some.jsonl"), eval=str(ROOT / "examples/titles/heldout.jsonl"))
    assert (dataset.report.train.cut, dataset.report.train.lossy, dataset.report.train.special_text) == (0, 0, 0)
    for index, line in enumerate(some[:50]):
        ids, supervised = dataset.train.row(index)
        answer = json.loads(line)["messages"][1]["content"]
        assert tokenizer.decode(ids[supervised].tolist()) == answer + "<|im_end|>"
    assert np.unique(dataset.train.numbers).size == 300


def test_the_shipped_multiple_choice_questions_are_whole():
    rows = read_rows(ROOT / "examples/multiple_choice/openbookqa_500.jsonl.gz")
    assert len(rows) == 500
    assert all(row.data["answer"] in row.data["options"].split("\n") for row in rows)


def test_data_needs_no_jax():
    code = "import sys, qlora_jax.data.dataset, qlora_jax.data.report.text; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
