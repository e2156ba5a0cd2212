"""Conversations as other data sets write them: lists of ShareGPT, and turns marked in one text."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.data.tokenizer.chat_template import Message

# Who speaks in `messages`. Beside the usual four: developer is what gpt-oss's templates call the system, and function,
# ipython (Llama 3) and observation (GLM-4) are what others call a tool.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
# Who speaks, by the names that ShareGPT's rows use.
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
# What precedes a turn of timdettmers/openassistant-guanaco, of Anthropic/hh-rlhf, and of laion/OIG's chip2.
GUANACO = re.compile(r"### (Human|Assistant):")
HH = re.compile(r"\n\n(Human|Assistant):")
CHIP2 = re.compile(r"(?:^|\n)<(human|bot)>: ")
_ROLES = {"Human": "user", "human": "user", "Assistant": "assistant", "bot": "assistant"}


def role_problems(role: str) -> list[str]:
    """What is wrong with a message's role: most templates render any, and one that is misspelt is never learned."""
    if role in ROLES:
        return []
    lower = role.lower()
    near = [SHAREGPT_ROLES[lower]] if lower in SHAREGPT_ROLES else difflib.get_close_matches(lower, ROLES, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    return [f"the role {role!r} is unknown; known are {', '.join(ROLES)}{meant}"]


def sharegpt_problems(row: Mapping[str, Any]) -> list[str]:
    """What keeps `conversations` from being a list of turns with a known speaker."""
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return ['conversations is no list of objects like {"from": "human", "value": "..."}']
    problems = []
    for index, turn in enumerate(turns):
        if "from" not in turn or "value" not in turn:
            problems.append(f"turn {index} needs 'from' and 'value', found {', '.join(map(repr, turn)) or 'nothing'}")
        elif turn["from"] not in list(SHAREGPT_ROLES):  # it may be anything, a list too
            problems.append(f"turn {index} is from {turn['from']!r}; known are {', '.join(SHAREGPT_ROLES)}")
    return problems


def sharegpt_messages(row: Mapping[str, Any]) -> list[Message]:
    """The turns as messages."""
    return [{"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]


def parse_turns(text: str, mark: re.Pattern[str]) -> list[Message]:
    """The turns that `mark` begins, without the blanks around each.

    Raises:
      ValueError: text before the first mark, or no turn of the assistant.
    """
    before, *pieces = mark.split(text)
    if before.strip():
        raise ValueError(f"{before[:40]!r} stands before the first mark of a turn, {_told(mark)}")
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    messages: list[Message] = [{"role": _ROLES[who], "content": said.strip()} for who, said in turns]
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"no turn of the assistant; turns are marked by {_told(mark)}")
    return messages


def turn_problems(text: str, mark: re.Pattern[str]) -> list[str]:
    """Why the text has no turns, or empty."""
    try:
        messages = parse_turns(text, mark)
    except ValueError as error:
        return [str(error)]
    empty = [i for i, message in enumerate(messages) if message["role"] == "assistant" and not message["content"]]
    return [f"the assistant's turn {index} is empty" for index in empty]


def chip2_pair(text: str) -> Sequence[str]:
    """(question, answer) of a chip2 row, to the character as artidoro/qlora takes them.

    What follows a second answer is left out there; such rows are refused here (`chip2_problems`).
    """
    question, answer = text.split("\n<bot>: ")
    return question.replace("<human>: ", ""), answer


def chip2_problems(text: str) -> list[str]:
    """Why the text is not one question and one answer, or empty."""
    speakers = CHIP2.findall(text)
    if speakers != ["human", "bot"] or not text.startswith("<human>: "):
        return [f"expected one '<human>: ' and then one '<bot>: ' at starts of lines, found {speakers}"]
    return []


def _told(mark: re.Pattern[str]) -> str:
    return repr(mark.pattern)
