"""All row formats, and those of one text: how a row becomes a conversation or plain text."""

import dataclasses
import re
from collections.abc import Callable, Sequence

from qlora_jax.config.registry import load_implementation
from qlora_jax.config.row_formats import ROW_FORMATS, RowFormatDeclaration
from qlora_jax.data.formats import conversations, labelled, preference, prompts
from qlora_jax.data.formats.chat_messages import current_messages, message_problems
from qlora_jax.data.formats.columns import text_problems
from qlora_jax.data.formats.row_format import Columns, RowFormat, Segment
from qlora_jax.data.formats.turn_fields import TEMPLATE_KWARGS, tools_problems, with_parsed_arguments
from qlora_jax.data.tokenizer.template_pipe import Message
from qlora_jax.untrusted_json import shorten

# Texts of artidoro/qlora's Alpaca format, with its trailing space.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response: "
)


def _alpaca_problems(row: Columns) -> list[str]:
    texts = {**row, "input": row.get("input") or ""}
    return text_problems(texts, "instruction", "input", "output", may_be_blank=("input",))


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
    """A format of a question and an answer: two turns with a template; without, the two texts and then eos."""
    return RowFormat(
        name=name,
        required=(prompt, answer),
        problems=lambda row: text_problems(row, prompt, answer, may_be_blank=(prompt,)),
        messages=lambda row: _question(row[prompt], row[answer]),
        plain=lambda row: [Segment(row[prompt], False), Segment(row[answer], True)],
    )


def _tagged(name: str, column: str, tag: re.Pattern[str]) -> RowFormat:
    """A format of tagged turns in one text: a conversation with a template; without, the whole text, supervised."""
    return RowFormat(
        name=name,
        required=(column,),
        explicit_only=True,
        problems=lambda row: text_problems(row, column) or conversations.turn_problems(row[column], tag),
        messages=lambda row: conversations.parse_turns(row[column], tag),
        plain=lambda row: [Segment(row[column], True)],
    )


def _answer_segments(text: str, tag: re.Pattern[str]) -> list[Segment]:
    """Returns the text in segments. Those after the assistant's tags, up to the next tag, are supervised.

    The last turn is the assistant's.
    """
    segments, at = [], 0
    for match in tag.finditer(text):
        if match[1] == "Assistant":
            following = tag.search(text, match.end())
            end = following.start() if following else len(text)
            segments += [Segment(text[at : match.end()], False), Segment(text[match.end() : end], True)]
            at = end
    return segments


def _guanaco_answer_problems(row: Columns) -> list[str]:
    problems = FORMATS["guanaco"].problems(row)
    if not problems and conversations.parse_turns(row["text"], conversations.GUANACO)[-1]["role"] != "assistant":
        return ["the last turn is the human's, so no answer comes before the end of the text. Remove that turn"]
    return problems


_INSTANCE = ("instruction_with_input", "output")


def _listed_problems(column: str, value: object, *names: str, may_be_blank: Sequence[str] = ()) -> list[str]:
    """Returns the reasons why `value` is not a list of at least one object with these texts."""
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        texts = ", ".join(f'"{name}": "..."' for name in names)
        return [f"{column} is not a list of objects like {{{texts}}}"]
    problems = []
    for index, one in enumerate(value):
        found = [f"needs {' and '.join(map(repr, names))}, found {', '.join(map(repr, one)) or 'nothing'}"]
        wrong = text_problems(one, *names, may_be_blank=may_be_blank) if set(names) <= set(one) else found
        problems += [f"{column.removesuffix('s')} {index}: {problem}" for problem in wrong]
    return problems


def _unnatural_problems(row: Columns) -> list[str]:
    return _listed_problems("instances", row["instances"], *_INSTANCE)


def _full_problems(row: Columns) -> list[str]:
    some = row.get("reformulations")  # a task may have none
    return _unnatural_problems(row) + (_listed_problems("reformulations", some, *_INSTANCE) if some else [])


def _examples_in(*columns: str) -> Callable[[Columns], list[Columns]]:
    """Returns a function that turns each object of these columns into an example of a prompt and an answer."""

    def examples(row: Columns) -> list[Columns]:
        others = {name: value for name, value in row.items() if name not in columns}
        objects = [one for column in columns for one in row.get(column) or ()]
        return [{**others, "input": one["instruction_with_input"], "output": one["output"]} for one in objects]

    return examples


def _is_seed_task(row: Columns) -> bool:
    """Returns True if the row's instances have an input separate from the instruction, and never joined with it."""
    instances = row["instances"] if isinstance(row["instances"], list) else ()
    names = {name for one in instances if isinstance(one, dict) for name in one}
    return "input" in names and "instruction_with_input" not in names


def _seed_task_problems(row: Columns) -> list[str]:
    return [
        *text_problems(row, "instruction"),
        *_listed_problems("instances", row["instances"], "input", "output", may_be_blank=("input",)),
    ]


def _seed_task_examples(row: Columns) -> list[Columns]:
    others = {name: value for name, value in row.items() if name != "instances"}
    return [{**others, "input": one["input"], "output": one["output"]} for one in row["instances"]]


def _sharegpt_problems(row: Columns) -> list[str]:
    return conversations.sharegpt_problems(row) or message_problems({"messages": conversations.sharegpt_messages(row)})


def _chip2_plain(row: Columns) -> list[Segment]:
    question, answer = conversations.chip2_pair(row["text"])
    return [Segment(question, False), Segment(answer, True)]


_FORMS = (
    RowFormat(
        name="messages",
        required=("messages",),
        optional=("tools", "functions"),
        problems=lambda row: message_problems(row) + tools_problems(row),
        messages=lambda row: [with_parsed_arguments(message) for message in current_messages(row["messages"])],
        canonical=lambda row: {**row, "messages": current_messages(row["messages"])},
    ),
    RowFormat(
        name="sharegpt",
        required=("conversations",),
        problems=_sharegpt_problems,
        messages=lambda row: current_messages(conversations.sharegpt_messages(row)),
    ),
    # With a chat template a user's and an assistant's turn; without, the texts above with eos after the output.
    RowFormat(
        name="alpaca",
        required=("instruction", "output"),
        optional=("input",),
        problems=_alpaca_problems,
        messages=_alpaca_messages,
        plain=_alpaca_plain,
    ),
    _pair("completion", "prompt", "completion"),  # Self-Instruct uses it
    _pair("input-output", "input", "output"),  # LongForm uses it too
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
    _tagged("hh-rlhf", "chosen", conversations.HH),
    guanaco := _tagged("guanaco", "text", conversations.GUANACO),
    dataclasses.replace(
        guanaco,
        name="guanaco-answers",
        problems=_guanaco_answer_problems,
        plain=lambda row: _answer_segments(row["text"], conversations.GUANACO),
    ),
    RowFormat(
        name="chip2",
        required=("text",),
        explicit_only=True,
        problems=lambda row: text_problems(row, "text") or conversations.chip2_problems(row["text"]),
        messages=lambda row: _question(*conversations.chip2_pair(row["text"])),
        plain=_chip2_plain,
    ),
    # Never a conversation: the whole text is supervised, with eos after it.
    RowFormat(
        name="text",
        required=("text",),
        problems=lambda row: text_problems(row, "text"),
        plain=lambda row: [Segment(row["text"], True)],
    ),
)
FORMATS = {row_format.name: row_format for row_format in (*_FORMS, *preference.FORMS, *labelled.FORMS, *prompts.FORMS)}
# Columns that rows of some format may lack.
OPTIONAL_COLUMNS = frozenset(name for form in FORMATS.values() for name in form.optional) | {TEMPLATE_KWARGS}


def format_of(name: str) -> RowFormat:
    """Returns a format of FORMATS, or of another package.

    Raises:
      ValueError: it cannot be loaded, or is not a RowFormat of this name.
    """
    if name in FORMATS:
        return FORMATS[name]
    made = ROW_FORMATS[name].implementation
    found = load_implementation("data.format", name, made) if isinstance(made, str) else made
    if not isinstance(found, RowFormat) or found.name != name:
        raise ValueError(
            f"data.format: {name!r} is declared as {shorten(found)}, expected a RowFormat with this name. Repair or "
            "uninstall its package"
        )
    return found


def optional_columns(name: str) -> frozenset[str]:
    """Returns the columns that rows may lack: those of our formats, and of the one that is named."""
    return OPTIONAL_COLUMNS if name == "auto" else OPTIONAL_COLUMNS | {*format_of(name).optional}


def format_declaration(row_format: RowFormat) -> RowFormatDeclaration:
    """Returns the declaration of a format, for an entry point of the group qlora_jax.row_formats."""
    return RowFormatDeclaration(implementation=row_format, columns=(*row_format.required, *row_format.optional))


def register_row_format(row_format: RowFormat) -> None:
    """Adds a format to this process, for data.format; commands find one by an entry point.

    Raises:
      ValueError: the name is taken.
    """
    ROW_FORMATS.register(row_format.name, format_declaration(row_format))
