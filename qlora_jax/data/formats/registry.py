"""The forms a row may have: how each is recognised, checked, and turned into a conversation or into plain text."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qlora_jax.data.formats import conversations
from qlora_jax.data.formats.tool_calls import call_problems, tools_problems, with_parsed_arguments
from qlora_jax.data.loss_mask.spans import Segment
from qlora_jax.data.tokenizer.chat_template import Message

Columns = Mapping[str, Any]

# The texts of artidoro/qlora's Alpaca format, its trailing space included.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response: "
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowFormat:
    """One form of rows.

    Fields:
      required, optional: its columns.
      explicit_only: its columns do not tell it from another form, so data.format has to.
      problems: what is wrong with a row that has the required columns; empty if nothing is.
      matches: whether a row with these columns is of this form rather than of another that has them too.
      examples: the rows of form `example` that one row holds; None: a row is one example.
      messages: the row as a conversation, for a tokenizer with a chat template; None: never one.
      plain: the row as text for a tokenizer without a template (bos and eos are added later); None: needs a template.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    explicit_only: bool = False
    problems: Callable[[Columns], list[str]]
    matches: Callable[[Columns], bool] = lambda row: True
    examples: Callable[[Columns], list[dict[str, Any]]] | None = None
    example: str = "input-output"
    messages: Callable[[Columns], Sequence[Message]] | None = None
    plain: Callable[[Columns], list[Segment]] | None = None

    def __str__(self) -> str:
        columns = [*self.required, *(f"{name} (optional)" for name in self.optional)]
        return f"{self.name}: {', '.join(columns)}"

    def check(self, row: Columns) -> list[str]:
        """What is wrong with this row, missing columns included."""
        missing = [name for name in self.required if name not in row]
        if missing:
            return [f"no column {' or '.join(map(repr, missing))}; found {', '.join(map(repr, row))}"]
        return self.problems(row)

    def content(self, row: Columns) -> str:
        """What the model gets to see of a row, in one canonical text: rows of equal content have equal ids."""
        columns = {name: row.get(name) or "" for name in (*self.required, *self.optional)}
        if not columns.get("tools"):  # rows without them have the text, and so the hash, that they always had
            columns.pop("tools", None)
        return json.dumps(columns, sort_keys=True, ensure_ascii=False, default=str)


_HALF_SURROGATE = re.compile("[\ud800-\udfff]")


def _text_problems(row: Columns, *names: str, may_be_blank: Sequence[str] = ()) -> list[str]:
    problems = [_text_problem(name, row[name], name in may_be_blank) for name in names]
    return [problem for problem in problems if problem]


def _text_problem(name: str, value: Any, may_be_blank: bool = False) -> str | None:
    if not isinstance(value, str):
        return f"{name} is {'null' if value is None else type(value).__name__}, expected text"
    if not may_be_blank and not value.strip():
        return f"{name} is empty"
    half = _HALF_SURROGATE.search(value)
    if half:
        return f"{name} holds half of a surrogate pair (\\u{ord(half.group()):x}), which is no character"
    return None


def _message_problems(row: Columns) -> list[str]:
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return ['messages is no list of objects like {"role": "user", "content": "..."}']
    problems = []
    for index, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or not ("content" in message or message.get("tool_calls")):
            problems.append(
                f"message {index} needs 'role' and 'content', found {', '.join(map(repr, message)) or 'nothing'}"
            )
            continue
        problems += [f"message {index}: {problem}" for problem in conversations.role_problems(message["role"])]
        name = f"content of message {index} ({message['role']})"
        if message.get("tool_calls"):
            problems += [f"message {index}: {problem}" for problem in call_problems(message)]
            if message.get("content") is None:
                continue
        speaks = message["role"] == "assistant" and not message.get("tool_calls")
        problem = _text_problem(name, message["content"], not speaks)
        problems += [problem] * bool(problem)
    roles = [message.get("role") for message in messages]
    if not problems and "assistant" not in roles:
        problems.append(f"no message has the role 'assistant', so there is nothing to learn; roles: {roles}")
    return problems


def _alpaca_problems(row: Columns) -> list[str]:
    texts = {**row, "input": row.get("input") or ""}
    return _text_problems(texts, "instruction", "input", "output", may_be_blank=("input",))


def _question(prompt: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _alpaca_messages(row: Columns) -> list[Message]:
    context = f"\n\n{row['input']}" if row.get("input") else ""
    return _question(row["instruction"] + context, row["output"])


def _alpaca_plain(row: Columns) -> list[Segment]:
    template = ALPACA_WITH_INPUT if row.get("input") else ALPACA_NO_INPUT
    prompt = template.format(instruction=row["instruction"], input=row.get("input"))
    return [Segment(prompt, False), Segment(row["output"], True)]


def _pair(name: str, prompt: str, answer: str) -> RowFormat:
    """A question and an answer: two turns where there is a template, else the two texts, eos after the answer."""
    return RowFormat(
        name=name,
        required=(prompt, answer),
        problems=lambda row: _text_problems(row, prompt, answer, may_be_blank=(prompt,)),
        messages=lambda row: _question(row[prompt], row[answer]),
        plain=lambda row: [Segment(row[prompt], False), Segment(row[answer], True)],
    )


def _marked(name: str, column: str, mark: re.Pattern[str]) -> RowFormat:
    """Turns marked in one text: a conversation where there is a template, else all of the text, supervised."""
    return RowFormat(
        name=name,
        required=(column,),
        explicit_only=True,
        problems=lambda row: _text_problems(row, column) or conversations.turn_problems(row[column], mark),
        messages=lambda row: conversations.parse_turns(row[column], mark),
        plain=lambda row: [Segment(row[column], True)],
    )


_INSTANCE = ("instruction_with_input", "output")


def _listed_problems(column: str, value: Any, *names: str, may_be_blank: Sequence[str] = ()) -> list[str]:
    """What keeps `value` from being a list of at least one object with these texts."""
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        texts = ", ".join(f'"{name}": "..."' for name in names)
        return [f"{column} is no list of objects like {{{texts}}}"]
    problems = []
    for index, one in enumerate(value):
        found = [f"needs {' and '.join(map(repr, names))}, found {', '.join(map(repr, one)) or 'nothing'}"]
        wrong = _text_problems(one, *names, may_be_blank=may_be_blank) if set(names) <= set(one) else found
        problems += [f"{column.removesuffix('s')} {index}: {problem}" for problem in wrong]
    return problems


def _unnatural_problems(row: Columns) -> list[str]:
    return _listed_problems("instances", row["instances"], *_INSTANCE)


def _full_problems(row: Columns) -> list[str]:
    some = row.get("reformulations")  # a task may have none
    return _unnatural_problems(row) + (_listed_problems("reformulations", some, *_INSTANCE) if some else [])


def _examples_in(*columns: str) -> Callable[[Columns], list[dict[str, Any]]]:
    """Each object of each of these columns: a prompt with its input in it, and an answer."""

    def examples(row: Columns) -> list[dict[str, Any]]:
        others = {name: value for name, value in row.items() if name not in columns}
        objects = [one for column in columns for one in row.get(column) or ()]
        return [{**others, "input": one["instruction_with_input"], "output": one["output"]} for one in objects]

    return examples


def _is_seed_task(row: Columns) -> bool:
    """Whether its instances have an input apart from the instruction, and none with it."""
    instances = row["instances"] if isinstance(row["instances"], list) else ()
    names = {name for one in instances if isinstance(one, dict) for name in one}
    return "input" in names and "instruction_with_input" not in names


def _seed_task_problems(row: Columns) -> list[str]:
    return [
        *_text_problems(row, "instruction"),
        *_listed_problems("instances", row["instances"], "input", "output", may_be_blank=("input",)),
    ]


def _seed_task_examples(row: Columns) -> list[dict[str, Any]]:
    others = {name: value for name, value in row.items() if name != "instances"}
    return [{**others, "input": one["input"], "output": one["output"]} for one in row["instances"]]


def _sharegpt_problems(row: Columns) -> list[str]:
    return conversations.sharegpt_problems(row) or _message_problems({"messages": conversations.sharegpt_messages(row)})


def _chip2_plain(row: Columns) -> list[Segment]:
    question, answer = conversations.chip2_pair(row["text"])
    return [Segment(question, False), Segment(answer, True)]


_FORMS = (
    RowFormat(
        name="messages",
        required=("messages",),
        optional=("tools",),
        problems=lambda row: _message_problems(row) + tools_problems(row),
        messages=lambda row: [with_parsed_arguments(message) for message in row["messages"]],
    ),
    RowFormat(
        name="sharegpt",
        required=("conversations",),
        problems=_sharegpt_problems,
        messages=conversations.sharegpt_messages,
    ),
    # Through a chat template as a user's and an assistant's turn; without one as the texts above, eos after the output.
    RowFormat(
        name="alpaca",
        required=("instruction", "output"),
        optional=("input",),
        problems=_alpaca_problems,
        messages=_alpaca_messages,
        plain=_alpaca_plain,
    ),
    _pair("completion", "prompt", "completion"),  # self-instruct
    _pair("input-output", "input", "output"),  # longform too
    RowFormat(
        name="seed-tasks",
        required=("instruction", "instances"),
        matches=_is_seed_task,
        problems=_seed_task_problems,
        examples=_seed_task_examples,
        example="alpaca",
    ),
    RowFormat(
        name="unnatural-instructions-full",
        required=("instances",),
        optional=("reformulations",),
        matches=lambda row: "reformulations" in row,
        problems=_full_problems,
        examples=_examples_in("instances", "reformulations"),
    ),
    RowFormat(
        name="unnatural-instructions",
        required=("instances",),
        problems=_unnatural_problems,
        examples=_examples_in("instances"),
    ),
    _pair("flan", "inputs", "targets"),
    _marked("hh-rlhf", "chosen", conversations.HH),
    _marked("guanaco", "text", conversations.GUANACO),
    RowFormat(
        name="chip2",
        required=("text",),
        explicit_only=True,
        problems=lambda row: _text_problems(row, "text") or conversations.chip2_problems(row["text"]),
        messages=lambda row: _question(*conversations.chip2_pair(row["text"])),
        plain=_chip2_plain,
    ),
    # Never a conversation: all of the text is supervised, eos after it.
    RowFormat(
        name="text",
        required=("text",),
        problems=lambda row: _text_problems(row, "text"),
        plain=lambda row: [Segment(row["text"], True)],
    ),
)
FORMATS = {form.name: form for form in _FORMS}
