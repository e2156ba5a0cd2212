"""Formats of other data sets: the same texts as in artidoro/qlora, to the character, and conversations."""

import re

import pytest

from qlora_jax.data.formats.registry import FORMATS, conversations

GUANACO = "### Human: Is 7 prime?### Assistant: Yes.\n\nIt is.### Human: And 8?### Assistant: No."
HH = "\n\nHuman: Is 7 prime?\n\nAssistant: Yes.\n\nIt is.\n\nHuman: And 8?\n\nAssistant: No."
CHIP2 = "<human>: Is 7 prime?\nSay why.\n<bot>: Yes.\nIt is."
ALPACA = {"instruction": "Add", "input": "1 and 2", "output": "3 "}
HEAD = "Below is an instruction that describes a task"
TURNS = [("user", "Is 7 prime?"), ("assistant", "Yes.\n\nIt is."), ("user", "And 8?"), ("assistant", "No.")]

# (input, output) of the reference's mappings: artidoro/qlora 7f4e95a, qlora.py, local_dataset and below.
REFERENCE = {
    "alpaca": (
        ALPACA,
        f"{HEAD}, paired with an input that provides further context. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nAdd\n\n### Input:\n1 and 2\n\n### Response: ",
        "3 ",
    ),
    "alpaca, no input": (
        {**ALPACA, "input": ""},
        f"{HEAD}. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd\n\n### Response: ",
        "3 ",
    ),
    "chip2": ({"text": CHIP2}, "Is 7 prime?\nSay why.", "Yes.\nIt is."),
    "hh-rlhf": ({"chosen": HH, "rejected": ""}, "", HH),
    "guanaco": ({"text": GUANACO}, "", GUANACO),
    "completion": ({"prompt": " Q ", "completion": " A "}, " Q ", " A "),  # self-instruct
    "input-output": ({"input": " Q ", "output": " A "}, " Q ", " A "),  # longform too
}


@pytest.mark.parametrize("name", REFERENCE)
def test_plain_text_is_the_references(name):
    row, prompt, answer = REFERENCE[name]
    row_format = FORMATS[name.partition(",")[0]]
    assert row_format.check(row) == []
    segments = row_format.plain(row)
    assert "".join(s.text for s in segments if not s.supervised) == prompt
    assert "".join(s.text for s in segments if s.supervised) == answer
    assert [s.supervised for s in segments] == sorted(s.supervised for s in segments)


@pytest.mark.parametrize(
    ("name", "row", "turns"),
    [
        ("guanaco", {"text": GUANACO}, TURNS),
        ("hh-rlhf", {"chosen": HH}, TURNS),
        ("chip2", {"text": CHIP2}, [("user", "Is 7 prime?\nSay why."), ("assistant", "Yes.\nIt is.")]),
        ("flan", {"inputs": "Q", "targets": "A"}, [("user", "Q"), ("assistant", "A")]),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "Q", "weight": 1},
                    {"from": "gpt", "value": "A"},
                    {"from": "observation", "value": "42"},
                ]
            },
            [("system", "Be brief."), ("user", "Q"), ("assistant", "A"), ("tool", "42")],
        ),
    ],
)
def test_conversations(name, row, turns):
    row_format = FORMATS[name]
    assert row_format.check(row) == []
    assert [(message["role"], message["content"]) for message in row_format.messages(row)] == turns


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("guanaco", {"text": "Hello ### Human: Q### Assistant: A"}, "text before the first turn (found 'Hello '"),
        ("guanaco", {"text": "### Human: Q"}, "no turn of the assistant"),
        ("guanaco", {"text": "### Human: Q### Assistant: "}, "the assistant's turn 1 is empty"),
        ("guanaco", {"text": "   "}, "text is empty"),
        ("hh-rlhf", {"chosen": [1]}, "chosen is list, expected text"),
        ("hh-rlhf", {"text": HH}, "no column 'chosen'"),
        ("chip2", {"text": "<human>: Q"}, r"found ['human']"),
        ("chip2", {"text": CHIP2 + "\n<bot>: More"}, r"found ['human', 'bot', 'bot']"),
        ("sharegpt", {"conversations": "x"}, "conversations is not a list of objects"),
        (
            "sharegpt",
            {"conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
            "conversations has messages (found 'role' and 'content', expected 'from' and 'value'). "
            "Set --data.columns '{messages: conversations}' (--file_columns in evaluate)",
        ),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "turn 0 needs 'from' and 'value', found 'from'"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, "turn 0 is from 'alien'; known are human"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Q"}]}, "no message has the role 'assistant'"),
        ("sharegpt", {"conversations": [{"from": ["gpt"], "value": "Q"}]}, "turn 0 is from ['gpt']"),
        ("flan", {"inputs": "Q", "targets": " "}, "targets is empty"),
    ],
)
def test_what_is_wrong_is_told(name, row, problem):
    assert problem in "; ".join(FORMATS[name].check(row))


def test_marks_inside_a_line_are_no_turns():
    assert len(conversations.CHIP2.findall("<human>: say <bot>: loudly\n<bot>: No.")) == 2
    assert (
        conversations.parse_turns("\n\nHuman: say Human: x\n\nAssistant: ok", conversations.HH)[0]["content"]
        == "say Human: x"
    )
    with pytest.raises(ValueError, match=re.escape("text before the first turn")):
        conversations.parse_turns("Human: x\n\nAssistant: y", conversations.HH)
