"""Rows that are too long: truncated, dropped or reported, and counted."""

from collections.abc import Callable

import pytest

from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.data.loading import load, rows_of_lengths


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
