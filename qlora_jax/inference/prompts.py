"""From what a person writes to the ids that a model answers: chat templates, files of prompts, stop tokens."""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.data.formats.registry import FORMATS, RowFormat
from qlora_jax.data.formats.tool_calls import Tools, read_tools
from qlora_jax.data.loss_mask.spans import turn_marks
from qlora_jax.data.readers.files import Place, Problem, Row, raise_problems, read_rows, read_text
from qlora_jax.data.tokenizer.chat_template import Message
from qlora_jax.data.tokenizer.tokenizer import Tokenizer

# Column that makes a row a prompt, and the form of training data that it belongs to.
PROMPT_COLUMNS = {"messages": "messages", "prompt": "completion", "instruction": "alpaca"}
JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_ANSWER = "."  # stands where rows of training data have an answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompter:
    """Encodes prompts for one model.

    Attributes:
      chat: prompts are turns of a user, put through the chat template; else they are text to go on with.
      system: the system message, or None for what the template does without one.
    """

    tokenizer: Tokenizer
    chat: bool
    system: str | None

    def text(self, text: str) -> list[int]:
        """Ids of plain text that the model goes on with; bos before it where the tokenizer asks for it."""
        bos = self.tokenizer.bos_id if self.tokenizer.add_bos_token else None
        return ([] if bos is None else [bos]) + self.tokenizer.encode(text)

    def conversation(self, messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
        """Ids of a conversation whose next turn is the assistant's."""
        has_system = any(message["role"] == "system" for message in messages)
        system = [] if self.system is None or has_system else [{"role": "system", "content": self.system}]
        return self.tokenizer.encode(
            self.tokenizer.render([*system, *messages], add_generation_prompt=True, tools=tools)
        )

    def row(self, columns: Mapping[str, Any]) -> list[int]:
        """Ids of a row that has one of PROMPT_COLUMNS, an answer at its end left out.

        Raises:
          ValueError: it has none of them, or does not fit the form that it belongs to.
        """
        name = next((form for column, form in PROMPT_COLUMNS.items() if column in columns), None)
        if name is None:
            known, found = (", ".join(map(repr, names)) for names in (PROMPT_COLUMNS, columns))
            raise ValueError(f"no prompt: expected one of the columns {known}; found {found}")
        form, answered = FORMATS[name], _answered(columns)
        if problems := form.check(answered):
            raise ValueError("; ".join(problems))
        if not self.chat:
            return self.text(_plain(form, answered))
        tools = read_tools(answered) if "tools" in form.optional else None
        return self.conversation(_conversation(form, answered), tools)


def prompter(tokenizer: Tokenizer, *, raw: bool, system: str | None) -> Prompter:
    """Prompts go through the chat template where there is one and `raw` is false."""
    chat = tokenizer.chat_template is not None and not raw
    if system is not None and not chat:
        reason = "--raw is given" if raw else "this model has none; give one by --chat_template"
        raise ValueError(f"--system is for a chat template, and {reason}")
    return Prompter(tokenizer=tokenizer, chat=chat, system=system)


def stop_ids(tokenizer: Tokenizer, named: Iterable[int], *, chat: bool) -> frozenset[int]:
    """Ids that end a reply: those that the model's files name, eos, and the end of a turn in its template."""
    ids = {*named, tokenizer.eos_id} - {None}
    if chat:
        # A template that ends turns with no special token is for training to refuse; here the other ids remain.
        with contextlib.suppress(ValueError):
            ids.add(tokenizer.encode(turn_marks(tokenizer).end)[-1])
    return frozenset(ids)


def read_prompts(path: str) -> list[Row]:
    """The rows of a JSON or JSON Lines file, or else one row {"prompt": line} for each line that is not blank."""
    if Path(path).name.endswith(JSON_SUFFIXES):
        return read_rows(path)
    lines = [(line, text) for line, text in enumerate(read_text(path).split("\n"), start=1) if text.strip()]
    if not lines:
        raise ValueError(f"{path}: holds no prompt; expected one a line")
    return [Row(Place(line, number), {"prompt": text}) for number, (line, text) in enumerate(lines)]


def encode_prompts(path: str, rows: Sequence[Row], prompter: Prompter, max_positions: int) -> list[list[int]]:
    """Ids of each row; ValueError that names every row that is no prompt, or leaves the model no room for a reply."""
    encoded: list[list[int]] = []
    problems: list[Problem] = []
    for row in rows:
        try:
            encoded.append(prompter.row(row.data))
        except ValueError as error:
            problems.append((row.place, str(error)))
            continue
        if len(encoded[-1]) >= max_positions:
            found = f"{len(encoded[-1])} tokens, and the model has {max_positions} positions for prompt and reply"
            problems.append((row.place, f"{found}; shorten it"))
    raise_problems(path, problems, len(rows))
    return encoded


def _answered(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The row with an answer of ours, so that it can be taken for one of training data."""
    answered = {**columns, "completion": _ANSWER, "output": _ANSWER}
    match columns.get("messages"):
        case [*_, {"role": role}] as messages if role != "assistant":
            answered["messages"] = [*messages, {"role": "assistant", "content": _ANSWER}]
    return answered


def _conversation(form: RowFormat, answered: Mapping[str, Any]) -> Sequence[Message]:
    assert form.messages is not None
    return form.messages(answered)[:-1]


def _plain(form: RowFormat, answered: Mapping[str, Any]) -> str:
    if form.plain is None:
        raise ValueError(
            f"rows of the form {form.name!r} need a chat template: leave --raw out or give --chat_template"
        )
    return "".join(segment.text for segment in form.plain(answered) if not segment.supervised)
