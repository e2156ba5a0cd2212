"""Reads the conversations of other data sets: ShareGPT's lists, and tagged turns in one text."""

import difflib
import re
from collections.abc import Sequence

from qlora_jax.data.tokenizer.template_pipe import Message
from qlora_jax.untrusted_json import JsonObject

# Roles in `messages`. Besides the usual four: gpt-oss's templates call the system developer. Other templates call a
# tool function, ipython (Llama 3) or observation (GLM-4).
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
# Roles by the names in ShareGPT's rows.
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# Tags before a turn in timdettmers/openassistant-guanaco, Anthropic/hh-rlhf, and laion/OIG's chip2.
GUANACO = re.compile(r"### (Human|Assistant):")
HH = re.compile(r"\n\n(Human|Assistant):")
CHIP2 = re.compile(r"(?:^|\n)<(human|bot)>: ")
_ROLES = {"Human": "user", "human": "user", "Assistant": "assistant", "bot": "assistant"}


def role_problems(role: str) -> list[str]:
    """Returns the problems of a message's role. Most templates render any role, but never learn a misspelt one."""
    if role in ROLES:
        return []
    lower = role.lower()
    near = [SHAREGPT_ROLES[lower]] if lower in SHAREGPT_ROLES else difflib.get_close_matches(lower, ROLES, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    return [f"unknown role {role!r}; known are {', '.join(ROLES)}{meant}"]


def sharegpt_problems(row: JsonObject) -> list[str]:
    """Returns the reasons why `conversations` is not a list of turns with known speakers."""
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return ['conversations is not a list of objects like {"from": "human", "value": "..."}']
    if turns and all("role" in turn and "content" in turn for turn in turns):
        return [
            "conversations has messages (found 'role' and 'content', expected 'from' and 'value'). "
            "Set --data.columns '{messages: conversations}' (--file_columns in evaluate)"
        ]
    problems = []
    for index, turn in enumerate(turns):
        if "from" not in turn or "value" not in turn:
            problems.append(f"turn {index} needs 'from' and 'value', found {', '.join(map(repr, turn)) or 'nothing'}")
        elif turn["from"] not in list(SHAREGPT_ROLES):  # the value may be unhashable
            problems.append(f"turn {index} is from {turn['from']!r}; known are {', '.join(SHAREGPT_ROLES)}")
    return problems


def sharegpt_messages(row: JsonObject) -> list[Message]:
    """Returns the turns as messages."""
    return [{"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]


def parse_turns(text: str, tag: re.Pattern[str]) -> list[Message]:
    """Returns the turns that `tag` begins, without surrounding whitespace.

    Raises:
      ValueError: text before the first tag, or no turn of the assistant.
    """
    before, *pieces = tag.split(text)
    if before.strip():
        raise ValueError(f"text before the first turn (found {before[:40]!r}, expected a tag {tag.pattern!r})")
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    messages: list[Message] = [{"role": _ROLES[who], "content": content.strip()} for who, content in turns]
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"no turn of the assistant; turns begin with {tag.pattern!r}")
    return messages


def turn_problems(text: str, tag: re.Pattern[str]) -> list[str]:
    """Returns the reasons why `parse_turns` fails, or which answers are empty."""
    try:
        messages = parse_turns(text, tag)
    except ValueError as error:
        return [str(error)]
    empty = [i for i, message in enumerate(messages) if message["role"] == "assistant" and not message["content"]]
    return [f"the assistant's turn {index} is empty" for index in empty]


def chip2_pair(text: str) -> Sequence[str]:
    """Returns (question, answer) of a chip2 row, with the same characters as artidoro/qlora.

    There, the text after a second answer is dropped. Here, `chip2_problems` rejects such rows.
    """
    question, answer = text.split("\n<bot>: ")
    return question.replace("<human>: ", ""), answer


def chip2_problems(text: str) -> list[str]:
    """Returns the reason why the text is not one question and one answer; empty if it is."""
    speakers = CHIP2.findall(text)
    if speakers != ["human", "bot"] or not text.startswith("<human>: "):
        return [f"expected one '<human>: ' and then one '<bot>: ' at starts of lines, found {speakers}"]
    return []
