"""Formats of preferences: a chosen and a rejected answer to one prompt, or one answer that is desirable or not.

The prompt is a separate column, or the beginning that the chosen and the rejected text share. Both forms exist as
plain text and as lists of messages.
"""

from collections.abc import Sequence
from os.path import commonprefix

from qlora_jax.data.formats import conversations
from qlora_jax.data.formats.chat_messages import current_messages, form_problems, message_problems
from qlora_jax.data.formats.columns import SYNONYMS, text_problem, text_problems
from qlora_jax.data.formats.row_format import Columns, RowFormat, Text, Texts
from qlora_jax.data.formats.turn_fields import tools_problems, with_parsed_arguments
from qlora_jax.data.tokenizer.template_pipe import Message

EQUAL_ANSWERS = "chosen and rejected are equal"
DIFFERENT_PROMPTS = "the prompts of chosen and rejected differ"
_ANSWERS = ("chosen", "rejected")
_EXPECTED = "expected text or a list of messages"


def common_text(chosen: str, rejected: str) -> str:
    """Returns what both texts begin with, without a space at its end.

    If one is the beginning of the other, its last character is its answer.
    """
    end, most = len(commonprefix([chosen, rejected])), min(len(chosen), len(rejected)) - 1  # noqa: RUF071
    if end > most:
        return chosen[:most]
    return chosen[: end - 1] if chosen[:end].endswith(" ") else chosen[:end]


def common_messages(chosen: Sequence[Message], rejected: Sequence[Message]) -> Sequence[Message]:
    """Returns the messages that both conversations begin with; each keeps at least its last one as its answer."""
    most = min(len(chosen), len(rejected)) - 1
    end = next((index for index in range(most) if chosen[index] != rejected[index]), most)
    return chosen[:end]


def _as_messages(text: Text, role: str) -> list[Message]:
    """Returns messages; text becomes one of that role."""
    if isinstance(text, str):
        return [{"role": role, "content": text}]
    return [with_parsed_arguments(message) for message in text]


def _texts(prompt: Text, answers: Sequence[Text], chat: bool) -> Texts:
    """Returns plain text if all is text and `chat` is False, otherwise messages."""
    if not chat and all(isinstance(text, str) for text in (prompt, *answers)):
        return Texts(prompt, tuple(answers))
    return Texts(_as_messages(prompt, "user"), tuple(_as_messages(answer, "assistant") for answer in answers))


def _kind_problem(name: str, value: object) -> list[str]:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, dict) for one in value)):
        return []
    return [f"{name} is {'null' if value is None else type(value).__name__}, {_EXPECTED}"]


def _conversation_problems(name: str, prompt: Text, answer: Text) -> list[str]:
    """Returns the problems of a prompt and the answer that follows it, one of which is a list of messages."""
    before, after = (
        [{"role": role, "content": text}] if isinstance(text, str) else list(text)
        for role, text in (("user", prompt), ("assistant", answer))
    )
    if not before or not after:
        return [f"{name if before else 'prompt'} is empty"]
    problems = [f"{name}: {problem}" for problem in message_problems({"messages": [*before, *after]})]
    if not problems and after[-1]["role"] != "assistant":
        return [f"{name}: the last message is of the role {after[-1]['role']!r}, expected 'assistant'"]
    return problems


def _answer_problems(prompt: Text, answers: dict[str, Text]) -> list[str]:
    """Returns the problems of answers to a prompt, each a text or a list of messages."""
    problems: list[str] = []
    for name, answer in answers.items():
        if isinstance(prompt, str) and isinstance(answer, str):
            problems += [found for found in (text_problem(name, answer),) if found]
        else:
            problems += _conversation_problems(name, prompt, answer)
    if not isinstance(prompt, str) or problems:
        return problems
    found = text_problem("prompt", prompt, may_be_blank=True)
    return [found] if found else []


def _repeated_prompt(row: Columns) -> Sequence[Message]:
    """Returns the messages that chosen and rejected repeat before their answers; none if they are only answers.

    UltraFeedback's rows have the prompt as text, and once more as the first message of both.
    """
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if isinstance(chosen, str) or isinstance(rejected, str):
        return ()
    if isinstance(prompt, str):
        users = any(message.get("role") == "user" for answer in (chosen, rejected) for message in answer[:-1])
        return common_messages(chosen, rejected) if users else ()
    repeats = all(answer[: len(prompt)] == prompt and len(answer) > len(prompt) for answer in (chosen, rejected))
    return prompt if repeats and prompt else ()


def _shape_problems(row: Columns, *names: str) -> list[str]:
    """Returns the problems of a row whose columns of these names cannot be compared."""
    problems = [found for name in names for found in _kind_problem(name, row[name])]
    return problems or [
        f"{name}: {problem}" for name in names if not isinstance(row[name], str) for problem in form_problems(row[name])
    ]


def _current(row: Columns) -> Columns:
    """Returns the row with messages in the current form, in which equal ones can be found."""
    lists = [name for name in ("prompt", *_ANSWERS, "completion") if isinstance(row.get(name), list)]
    return {**row, **{name: current_messages(row[name]) for name in lists}}


def _explicit_problems(row: Columns) -> list[str]:
    problems = _shape_problems(row, "prompt", *_ANSWERS) or tools_problems(row)
    if problems:
        return problems
    row = _current(row)
    if row["chosen"] == row["rejected"]:
        return [EQUAL_ANSWERS]
    if isinstance(row["prompt"], str) and (repeated := _repeated_prompt(row)):
        asked = [message.get("content") for message in repeated if message.get("role") == "user"]
        if not any(isinstance(text, str) and text.strip() == row["prompt"].strip() for text in asked):
            return [f"{DIFFERENT_PROMPTS} from the column prompt"]
        return _implicit_problems(row)
    if not _repeated_prompt(row) and any(_is_asked(row[name]) for name in _ANSWERS):
        return [DIFFERENT_PROMPTS]
    prompt, answers = _explicit_parts(row)
    return _answer_problems(prompt, answers)


def _explicit_parts(row: Columns) -> tuple[Text, dict[str, Text]]:
    repeated = _repeated_prompt(row)
    if not repeated:
        return row["prompt"], {name: row[name] for name in _ANSWERS}
    return repeated, {name: row[name][len(repeated) :] for name in _ANSWERS}


def _explicit_texts(row: Columns, chat: bool) -> Texts:
    prompt, answers = _explicit_parts(_current(row))
    return _texts(prompt, [*answers.values()], chat)


def _implicit_problems(row: Columns) -> list[str]:
    problems = _shape_problems(row, *_ANSWERS) or tools_problems(row)
    if problems:
        return problems
    row = _current(row)
    chosen, rejected = row["chosen"], row["rejected"]
    if type(chosen) is not type(rejected):
        return ["one of chosen and rejected is text and the other a list of messages, expected both of the same type"]
    if problems := [f"{name} is empty" for name in _ANSWERS if not row[name]]:
        return problems
    if chosen == rejected:
        return [EQUAL_ANSWERS]
    prompt, answers = _implicit_parts(row)
    if not prompt or any(_is_asked(answer) for answer in answers.values()):
        return [DIFFERENT_PROMPTS]
    return _answer_problems(prompt, answers)


def _is_asked(answer: Text) -> bool:
    """Returns True if a list of messages begins with one that is a part of the prompt, such as a tool's answer."""
    return not isinstance(answer, str) and bool(answer) and answer[0].get("role") != "assistant"


def _has_no_prompt_column(row: Columns) -> bool:
    """Returns False for plain answers next to a column that is probably their prompt under another name."""
    return not isinstance(row["chosen"], str) or not any(name in row for name in SYNONYMS["prompt"])


def _implicit_parts(row: Columns) -> tuple[Text, dict[str, Text]]:
    chosen, rejected = row["chosen"], row["rejected"]
    prompt = common_text(chosen, rejected) if isinstance(chosen, str) else common_messages(chosen, rejected)
    return prompt, {name: row[name][len(prompt) :] for name in _ANSWERS}


def _implicit_texts(row: Columns, chat: bool) -> Texts:
    # Text whose prompt is not marked is never a conversation.
    prompt, answers = _implicit_parts(_current(row))
    return _texts(prompt, [*answers.values()], chat=chat and not isinstance(prompt, str))


def _last_answer(text: str) -> tuple[str, str]:
    """Returns (prompt, answer) of tagged turns; the prompt ends with the last tag of the assistant."""
    *_, last = [match for match in conversations.HH.finditer(text) if match[1] == "Assistant"]
    return text[: last.end()], text[last.end() :]


def _tagged_problems(row: Columns) -> list[str]:
    problems = text_problems(row, *_ANSWERS)
    problems = problems or [
        f"{name}: {problem}"
        for name in _ANSWERS
        for problem in conversations.turn_problems(row[name], conversations.HH)
    ]
    if problems:
        return problems
    if row["chosen"] == row["rejected"]:
        return [EQUAL_ANSWERS]
    (prompt, chosen), (other, rejected) = (_last_answer(row[name]) for name in _ANSWERS)
    if prompt != other:
        return [DIFFERENT_PROMPTS]
    ends = [name for name, text in (("chosen", chosen), ("rejected", rejected)) if conversations.HH.search(text)]
    return [f"{name}: the last turn is the human's, expected the assistant's" for name in ends]


def _tagged_texts(row: Columns, chat: bool) -> Texts:
    if chat:
        turns = [conversations.parse_turns(row[name], conversations.HH) for name in _ANSWERS]
        return Texts(turns[0][:-1], tuple(messages[-1:] for messages in turns))
    (prompt, chosen), (_, rejected) = (_last_answer(row[name]) for name in _ANSWERS)
    return Texts(prompt, (chosen, rejected))


def _is_tagged(row: Columns) -> bool:
    return all(isinstance(row[name], str) and conversations.HH.match(row[name]) for name in _ANSWERS)


def _orca_problems(row: Columns) -> list[str]:
    texts = {**row, "system": row.get("system") or ""}
    problems = text_problems(texts, "system", "question", *_ANSWERS, may_be_blank=("system", "question"))
    return problems or ([EQUAL_ANSWERS] if row["chosen"] == row["rejected"] else [])


def _orca_texts(row: Columns, chat: bool) -> Texts:
    system, question, answers = row.get("system") or "", row["question"], tuple(row[name] for name in _ANSWERS)
    if not chat:
        return Texts("".join(f"{part}\n\n" for part in (system, question) if part), answers)
    prompt = [*(_as_messages(system, "system") if system else ()), *_as_messages(question, "user")]
    return Texts(prompt, tuple(_as_messages(answer, "assistant") for answer in answers))


def _unpaired_problems(row: Columns) -> list[str]:
    problems = _shape_problems(row, "prompt", "completion") or tools_problems(row)
    if problems:
        return problems
    row = _current(row)
    return _answer_problems(row["prompt"], {"completion": row["completion"]})


def _unpaired_texts(row: Columns, chat: bool) -> Texts:
    row = _current(row)
    return _texts(row["prompt"], (row["completion"],), chat)


FORMS = (
    RowFormat(
        name="preference",
        kind="pair",
        required=("prompt", "chosen", "rejected"),
        optional=("tools", "margin"),
        problems=_explicit_problems,
        texts=_explicit_texts,
    ),
    RowFormat(
        name="orca-pairs",
        kind="pair",
        required=("question", "chosen", "rejected"),
        optional=("system", "margin"),
        problems=_orca_problems,
        texts=_orca_texts,
    ),
    RowFormat(
        name="hh-rlhf-pairs",
        kind="pair",
        required=("chosen", "rejected"),
        optional=("margin",),
        matches=_is_tagged,
        problems=_tagged_problems,
        texts=_tagged_texts,
    ),
    RowFormat(
        name="implicit-prompt",
        kind="pair",
        required=("chosen", "rejected"),
        optional=("tools", "margin"),
        matches=_has_no_prompt_column,
        problems=_implicit_problems,
        texts=_implicit_texts,
    ),
    RowFormat(
        name="unpaired-preference",
        kind="labelled",
        required=("prompt", "completion", "label"),
        optional=("tools",),
        problems=_unpaired_problems,
        texts=_unpaired_texts,
    ),
)
