"""Held-out rows: chosen by content, the same in every run, and never trained on."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.holdout import Split, content_hash
from qlora_jax.data.readers.files import Place, Row
from qlora_jax.data.report.text import report_lines
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from tests.data.loading import load, question
from tests.data.sound_rows import SOUND_ROWS


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


def test_each_file_of_a_mixture_holds_out_its_own_rows(tokenizer: Tokenizer, write_rows: Callable):
    files = [write_rows([{"text": f"{name} {n}"} for n in range(60)], f"{name}.jsonl") for name in ("a", "b")]
    dataset = load(tokenizer, train=dict.fromkeys(files, 1.0), eval_fraction=0.3)
    assert dataset.eval is not None and len(dataset.eval) + len(dataset.train) == 120
    sources = {dataset.eval.where(int(number)).rpartition(":")[0] for number in dataset.eval.numbers}
    assert sources == set(files)


def test_labels_and_margins_are_not_a_part_of_the_content():
    for name in ("text-label", "messages-label", "unpaired-preference", "preference"):
        row = SOUND_ROWS[name]
        hashes = {content_hash(FORMATS[name], {**row, "label": value, "margin": value}) for value in (0, 1)}
        assert len(hashes) == 1 and hashes != {content_hash(FORMATS[name], {**row, FORMATS[name].required[0]: "R"})}
