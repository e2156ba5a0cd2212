"""Turns prompts into token ids: chat templates, files of prompts, and the stop tokens of replies."""

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.formats.row_format import RowFormat
from qlora_jax.data.formats.turn_fields import Tools, check_plain, read_template_kwargs, read_tools, with_row_kwargs
from qlora_jax.data.loss_mask.turns import turn_marks
from qlora_jax.data.readers.files import Place, Problem, Row, raise_problems, read_lines, read_rows
from qlora_jax.data.tokenizer.template_pipe import Message
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.untrusted_json import JsonObject

# Column that makes a row a prompt -> the format of training data that the row then has.
PROMPT_COLUMNS = {"messages": "messages", "prompt": "completion", "instruction": "alpaca"}
JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_ANSWER = "."  # placeholder for the answer, which formats of training data require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompter:
    """Encodes prompts for one model.

    Attributes:
      chat: True if prompts are user messages for the chat template, False if they are text to continue.
      system: the system message, or None for the template's default.
    """

    tokenizer: Tokenizer
    chat: bool
    system: str | None

    def text(self, text: str) -> list[int]:
        """Ids of plain text for the model to continue, with a bos token first if the tokenizer adds one."""
        bos = self.tokenizer.bos_id if self.tokenizer.add_bos_token else None
        return ([] if bos is None else [bos]) + self.tokenizer.encode(text)

    def conversation(self, messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
        """Ids of a conversation, up to where the assistant's next turn begins."""
        has_system = any(message["role"] == "system" for message in messages)
        system = [] if self.system is None or has_system else [{"role": "system", "content": self.system}]
        return self.tokenizer.encode(
            self.tokenizer.render([*system, *messages], add_generation_prompt=True, tools=tools)
        )

    def row(self, columns: JsonObject) -> list[int]:
        """Ids of a row that has one of PROMPT_COLUMNS; an answer at its end is dropped.

        Raises:
          ValueError: the row has none of these columns, or does not match its format.
        """
        name = next((name for column, name in PROMPT_COLUMNS.items() if column in columns), None)
        if name is None:
            known, found = (", ".join(map(repr, names)) for names in (PROMPT_COLUMNS, columns))
            raise ValueError(f"no prompt (found columns {found}, expected one of {known})")
        row_format, answered = FORMATS[name], _with_answer(columns)
        if problems := row_format.check(answered):
            raise ValueError("; ".join(problems))
        if not self.chat:
            check_plain(columns)
            return self.text(_plain(row_format, answered))
        tools = read_tools(answered) if "tools" in row_format.optional else None
        own = dataclasses.replace(self, tokenizer=with_row_kwargs(self.tokenizer, read_template_kwargs(columns)))
        return own.conversation(_conversation(row_format, answered), tools)


def prompter(tokenizer: Tokenizer, *, raw: bool, system: str | None) -> Prompter:
    """Returns a Prompter that uses the chat template, unless there is none or `raw` is true.

    Raises:
      ValueError: there is a system message but no chat template is used.
    """
    chat = tokenizer.chat_template is not None and not raw
    if system is not None and not chat:
        fix = "Remove --raw" if raw else "The model has none; set --chat_template"
        raise ValueError(f"--system: requires a chat template. {fix}")
    return Prompter(tokenizer=tokenizer, chat=chat, system=system)


def stop_ids(tokenizer: Tokenizer, named: Iterable[int], *, chat: bool) -> frozenset[int]:
    """Ids that end a reply: those in the model's files (`named`), eos, and in a chat the template's end of a turn."""
    ids = {*named, tokenizer.eos_id} - {None}
    if chat:
        # Training rejects a template that ends turns without a special token; here the other ids remain.
        with contextlib.suppress(ValueError):
            ids.add(tokenizer.encode(turn_marks(tokenizer).end)[-1])
    return frozenset(ids)


def read_prompts(path: str) -> list[Row]:
    """Reads the rows of a JSON or JSON Lines file; of any other file, a row {"prompt": line} per non-blank line.

    Raises:
      ValueError: the file has no prompt, or a row is malformed.
    """
    if Path(path).name.endswith(JSON_SUFFIXES):
        return read_rows(path)
    lines = [(line, text) for line, text in read_lines(path) if text.strip()]
    if not lines:
        raise ValueError(f"{path}: contains no prompts (expected one per line)")
    return [Row(Place(line, number), {"prompt": text}) for number, (line, text) in enumerate(lines)]


def encode_prompts(path: str, rows: Sequence[Row], prompter: Prompter, max_positions: int) -> list[list[int]]:
    """Encodes each row.

    Raises:
      ValueError: rows that are not prompts, or that leave no position for a reply; the message lists them.
    """
    encoded: list[list[int]] = []
    problems: list[Problem] = []
    for row in rows:
        try:
            encoded.append(prompter.row(row.data))
        except ValueError as error:
            problems.append((row.place, str(error)))
            continue
        if len(encoded[-1]) >= max_positions:
            found = f"{len(encoded[-1])} tokens; the model has {max_positions} positions for prompt and reply"
            problems.append((row.place, f"too long (found {found}). Shorten it"))
    raise_problems(path, problems, len(rows))
    return encoded


def _with_answer(columns: JsonObject) -> dict[str, object]:
    """The row with a placeholder answer, so that it has a format of training data."""
    answered = {**columns, "completion": _ANSWER, "output": _ANSWER}
    match columns.get("messages"):
        case [*_, {"role": role}] as messages if role != "assistant":
            answered["messages"] = [*messages, {"role": "assistant", "content": _ANSWER}]
    return answered


def _conversation(row_format: RowFormat, answered: JsonObject) -> Sequence[Message]:
    assert row_format.messages is not None
    return row_format.messages(answered)[:-1]


def _plain(row_format: RowFormat, answered: JsonObject) -> str:
    if row_format.plain is None:
        raise ValueError(
            f"rows of the format {row_format.name!r} require a chat template. Remove --raw or set --chat_template"
        )
    return "".join(segment.text for segment in row_format.plain(answered) if not segment.supervised)
