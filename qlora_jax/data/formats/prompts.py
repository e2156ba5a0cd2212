"""Formats of prompts, to which the model itself replies: as text, or as a conversation."""

from collections.abc import Sequence

from qlora_jax.data.formats.chat_messages import current_messages, message_problems
from qlora_jax.data.formats.columns import text_problems
from qlora_jax.data.formats.row_format import Columns, RowFormat, Texts
from qlora_jax.data.formats.turn_fields import tools_problems, with_parsed_arguments
from qlora_jax.data.tokenizer.template_pipe import Message

_REPLY: Message = {"role": "assistant", "content": "."}


def _problems(name: str, row: Columns) -> list[str]:
    if not isinstance(row[name], list):
        return text_problems(row, name) if name == "prompt" else message_problems(row)
    found = message_problems({"messages": [*row[name], _REPLY]}) or tools_problems(row)
    if not found and not any(message.get("role") == "user" for message in row[name]):
        found = ["no message has the role 'user', so there is nothing to reply to"]
    last = None if found else asked(row[name])[-1].get("content")
    if isinstance(last, str) and not last.strip():
        found = ["the last message before the reply is empty"]
    return [f"{name}: {problem}" for problem in found]


def asked(messages: Sequence[Message]) -> list[Message]:
    """Returns a conversation up to where the assistant replies; an answer at its end is dropped."""
    current = [with_parsed_arguments(message) for message in current_messages(messages)]
    return current[:-1] if current and current[-1]["role"] == "assistant" else current


def _texts(name: str, row: Columns, chat: bool) -> Texts:
    prompt = row[name]
    if isinstance(prompt, list):
        return Texts(asked(prompt), ())
    return Texts([{"role": "user", "content": prompt}] if chat else prompt, ())


def _prompts(name: str, column: str) -> RowFormat:
    return RowFormat(
        name=name,
        kind="prompt",
        required=(column,),
        optional=("tools",),
        problems=lambda row: _problems(column, row),
        texts=lambda row, chat: _texts(column, row, chat),
    )


FORMS = (_prompts("prompt", "prompt"), _prompts("prompt-messages", "messages"))
