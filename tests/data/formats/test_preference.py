"""Formats of preferences: how the prompt is found, and what is refused."""

from typing import Any

import pytest

from qlora_jax.data.formats.detect import detect_format
from qlora_jax.data.formats.preference import DIFFERENT_PROMPTS, EQUAL_ANSWERS, common_text
from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.formats.row_format import Texts
from qlora_jax.data.readers.files import Place, Row


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


USER, GOOD, BAD = turn("user", "Q"), turn("assistant", "good"), turn("assistant", "bad")
OTHER = turn("user", "another question")
SAME = {"chosen": "a", "rejected": "b"}
HH = "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant:"


def texts(row: dict[str, Any], chat: bool, objective: str = "dpo") -> tuple[str, Texts]:
    """The row's format and texts."""
    row_format = detect_format("x.jsonl", [Row(Place(1, 0), row)], objective=objective)
    assert row_format.check(row) == [] and row_format.texts is not None
    return row_format.name, row_format.texts(row, chat)


@pytest.mark.parametrize(
    ("row", "name", "prompt", "chosen"),
    [
        ({"prompt": "Q", **SAME}, "preference", [USER], [turn("assistant", "a")]),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "preference", [USER], [GOOD]),
        ({"prompt": [USER], **SAME}, "preference", [USER], [turn("assistant", "a")]),
        # UltraFeedback: the prompt once more in both.
        ({"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "preference", [USER], [GOOD]),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "preference", [USER], [GOOD]),
        (
            {"prompt": "Q", "chosen": [USER, BAD, OTHER, GOOD], "rejected": [USER, BAD, OTHER, BAD]},
            "preference",
            [USER, BAD, OTHER],
            [GOOD],
        ),
        ({"question": "Q", **SAME}, "orca-pairs", [USER], [turn("assistant", "a")]),
        ({"system": "S", "question": "Q", **SAME}, "orca-pairs", [turn("system", "S"), USER], [turn("assistant", "a")]),
        (
            {"chosen": f"{HH} yes", "rejected": f"{HH} no"},
            "hh-rlhf-pairs",
            [USER, turn("assistant", "A"), turn("user", "R")],
            [turn("assistant", "yes")],
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "implicit-prompt", [USER], [GOOD]),
        # Two conversations that part at an answer.
        ({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD]}, "implicit-prompt", [USER], [GOOD, USER, GOOD]),
    ],
)
def test_a_row_becomes_a_conversation_with_two_ends(row: dict[str, Any], name: str, prompt: Any, chosen: Any):
    found, (asked, answers) = texts(row, chat=True)
    assert (found, list(asked), list(answers[0]), len(answers)) == (name, prompt, chosen, 2)


def test_parts_of_text_are_compared_with_text():
    parts = {"role": "user", "content": [{"type": "text", "text": "Q"}]}
    for prompt in ("Q", [USER], [parts]):
        row = {"prompt": prompt, "chosen": [parts, GOOD], "rejected": [USER, BAD]}
        assert texts(row, chat=True) == ("preference", Texts([USER], ([GOOD], [BAD])))
    row = {"chosen": [parts, GOOD], "rejected": [USER, BAD]}
    assert texts(row, chat=True) == ("implicit-prompt", Texts([USER], ([GOOD], [BAD])))


@pytest.mark.parametrize(
    ("row", "prompt", "answers"),
    [
        ({"prompt": "Q", **SAME}, "Q", ("a", "b")),
        ({"question": "Q", **SAME}, "Q\n\n", ("a", "b")),
        ({"system": "S", "question": "Q", **SAME}, "S\n\nQ\n\n", ("a", "b")),
        ({"chosen": f"{HH} yes", "rejected": f"{HH} you"}, HH, (" yes", " you")),
        ({"chosen": "Q: yes", "rejected": "Q: no"}, "Q:", (" yes", " no")),
    ],
)
def test_without_a_template_a_row_is_text(row: dict[str, Any], prompt: str, answers: tuple[str, ...]):
    assert texts(row, chat=False)[1] == Texts(prompt, answers)


def test_text_without_marks_is_never_a_conversation():
    assert texts({"chosen": "Q: yes", "rejected": "Q: no"}, chat=True)[1] == Texts("Q:", (" yes", " no"))


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [("ab c", "ab d", "ab"), ("abc", "abd", "ab"), ("abc", "abcd", "ab"), ("a b", "a b d", "a "), ("a", "b", "")],
)
def test_the_prompt_of_two_texts_is_the_one_that_trl_finds(chosen: str, rejected: str, prompt: str):
    assert common_text(chosen, rejected) == common_text(rejected, chosen) == prompt


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("preference", {"prompt": "Q", "chosen": "a"}, "no column 'rejected'"),
        ("preference", {"prompt": "Q", "chosen": "a", "rejected": None}, "rejected is null, expected text or a list"),
        ("preference", {"prompt": "Q", "chosen": "a", "rejected": "a"}, EQUAL_ANSWERS),
        ("preference", {"prompt": "Q", "chosen": " ", "rejected": "b"}, "chosen is empty"),
        ("preference", {"prompt": "Q\ud83d", **SAME}, "prompt contains half of a surrogate pair"),
        ("preference", {"prompt": [], **SAME}, "prompt is empty"),
        ("preference", {"prompt": [USER], "chosen": [], "rejected": [BAD]}, "chosen is empty"),
        (
            "preference",
            {"prompt": [USER], "chosen": [GOOD], "rejected": [turn("assistant", "")]},
            r"rejected: content of",
        ),
        (
            "preference",
            {"prompt": [USER], "chosen": [GOOD, OTHER], "rejected": [BAD]},
            "last message is of the role 'user'",
        ),
        ("preference", {"prompt": "Q", "chosen": [USER, GOOD], "rejected": [OTHER, BAD]}, DIFFERENT_PROMPTS),
        (
            "preference",
            {"prompt": "R", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            f"{DIFFERENT_PROMPTS} from the",
        ),
        ("preference", {"prompt": [OTHER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, DIFFERENT_PROMPTS),
        ("preference", {"prompt": [USER], "chosen": [turn("tool", "x"), GOOD], "rejected": [BAD]}, DIFFERENT_PROMPTS),
        ("preference", {"prompt": "Q", **SAME, "tools": 3}, "tools is not a list of JSON schemas"),
        ("orca-pairs", {"question": "Q", "system": 3, **SAME}, "system is int, expected text"),
        ("orca-pairs", {"question": "Q", "chosen": "a", "rejected": "a"}, EQUAL_ANSWERS),
        ("implicit-prompt", {"chosen": [USER, GOOD], "rejected": [OTHER, BAD]}, DIFFERENT_PROMPTS),
        (
            "implicit-prompt",
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, OTHER, GOOD]},
            DIFFERENT_PROMPTS,
        ),
        ("implicit-prompt", {"chosen": "yes", "rejected": "no"}, DIFFERENT_PROMPTS),
        ("implicit-prompt", {"chosen": "", "rejected": "no"}, "chosen is empty"),
        ("implicit-prompt", {"chosen": "yes", "rejected": [GOOD]}, "one of chosen and rejected is text"),
        ("hh-rlhf-pairs", {"chosen": f"{HH} a", "rejected": f"\n\nHuman: Z{HH} b"}, DIFFERENT_PROMPTS),
        ("hh-rlhf-pairs", {"chosen": f"{HH} a", "rejected": f"{HH}"}, "rejected: the assistant's turn 3 is empty"),
        ("hh-rlhf-pairs", {"chosen": f"{HH} a", "rejected": f"{HH} a"}, EQUAL_ANSWERS),
        (
            "hh-rlhf-pairs",
            {"chosen": f"{HH} a\n\nHuman: Q", "rejected": f"{HH} b"},
            "chosen: the last turn is the human",
        ),
        ("unpaired-preference", {"prompt": "Q", "completion": "", "label": True}, "completion is empty"),
        ("unpaired-preference", {"prompt": "Q", "completion": None, "label": True}, "completion is null"),
    ],
)
def test_rows_that_are_refused(name: str, row: dict[str, Any], problem: str):
    found = FORMATS[name].check(row)
    assert found and problem in "; ".join(found), found
