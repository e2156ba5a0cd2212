"""Texts that look like conversations: the report says so, and the format that it names learns answers only."""

from collections.abc import Callable
from typing import Any

import pytest

from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.report.text import report_lines
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from tests.data.formats.test_conversations import CHIP2, GUANACO
from tests.data.loading import load


def notes(tokenizer: Tokenizer, path: str, **settings: Any) -> list[str]:
    report = load(tokenizer, train=path, **settings).report
    return [value for name, value in report_lines(report) if name == "note" and "look like" in value]


def learned(tokenizer: Tokenizer, path: str, **settings: Any) -> str:
    ids, supervised = load(tokenizer, train=path, **settings).train.row(0)
    return tokenizer.decode(ids[supervised].tolist())


def test_guanaco_rows_read_as_text_are_noted_with_the_format_that_learns_answers(
    tokenizer: Tokenizer, plain_tokenizer: Tokenizer, write_rows: Callable
):
    path = write_rows([{"text": GUANACO}, {"text": "Once upon a time"}, {"text": GUANACO}])
    for one in (tokenizer, plain_tokenizer):
        (note,) = notes(one, path)
        assert "look like guanaco (### Human: / ### Assistant:), all of whose tokens are learned" in note
        assert note.endswith(": 2. To learn answers only, set --data.format guanaco-answers")
        only = write_rows([{"text": GUANACO}], "only.jsonl")
        assert learned(one, only) == f"{GUANACO}<|im_end|>"
        assert notes(one, only, format="guanaco-answers") == []
    assert learned(tokenizer, only, format="guanaco-answers") == "Yes.\n\nIt is.<|im_end|>No.<|im_end|>"
    assert learned(plain_tokenizer, only, format="guanaco-answers") == " Yes.\n\nIt is. No.<|im_end|>"


def test_the_reference_format_without_a_template_is_noted_too(
    tokenizer: Tokenizer, plain_tokenizer: Tokenizer, write_rows: Callable
):
    path = write_rows([{"text": GUANACO}])
    assert len(notes(plain_tokenizer, path, format="guanaco")) == 1
    assert notes(tokenizer, path, format="guanaco") == []  # the template's turns, of which answers are learned


def test_chip2_rows_read_as_text_are_noted(plain_tokenizer: Tokenizer, write_rows: Callable):
    path = write_rows([{"text": CHIP2}])
    (note,) = notes(plain_tokenizer, path)
    assert "look like chip2" in note and note.endswith("set --data.format chip2")
    assert learned(plain_tokenizer, path, format="chip2") == "Yes.\nIt is.<|im_end|>"


@pytest.mark.parametrize("text", ["### Human: Q", "Talk: ### Assistant: A", "Human: Q\nAssistant: A"])
def test_other_texts_are_not_noted(plain_tokenizer: Tokenizer, write_rows: Callable, text: str):
    assert notes(plain_tokenizer, write_rows([{"text": text}])) == []


def test_answers_are_masked_as_trl_masks_them():
    """trl's collator with both templates learns what follows the response template, up to the instruction template."""
    segments = FORMATS["guanaco-answers"].plain({"text": GUANACO})
    assert "".join(segment.text for segment in segments) == GUANACO
    assert [tuple(segment) for segment in segments] == [
        ("### Human: Is 7 prime?### Assistant:", False),
        (" Yes.\n\nIt is.", True),
        ("### Human: And 8?### Assistant:", False),
        (" No.", True),
    ]


def test_a_last_turn_of_the_human_is_reported():
    (problem,) = FORMATS["guanaco-answers"].check({"text": GUANACO + "### Human: And 9?"})
    assert problem.startswith("the last turn is the human's")
    assert FORMATS["guanaco"].check({"text": GUANACO + "### Human: And 9?"}) == []
