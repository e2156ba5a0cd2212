"""Fields of turns beside their text: tools and their calls, reasoning, and variables of the template."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from qlora_jax.config.fields import TemplateValue
from qlora_jax.data.readers.json_rows import describe_json_error
from qlora_jax.data.tokenizer.template_pipe import Message
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, with_template_kwargs
from qlora_jax.untrusted_json import MAX_DEPTH, JsonObject, is_too_deep

Tools = Sequence[JsonObject]


def read_tools(row: JsonObject) -> Tools | None:
    """Returns the row's `tools`, or None. They may be JSON text, because typed columns cannot contain schemas.

    Without tools, those of OpenAI's deprecated column `functions` are returned.
    """
    if tools := decode_json(row.get("tools") or None):
        return tools
    functions = decode_json(row.get("functions") or None) or ()
    return [{"type": "function", "function": function} for function in functions] or None


def tools_problems(row: JsonObject) -> list[str]:
    """Returns the reasons why `tools` and `functions` are not lists of schemas; empty if they are."""
    return [problem for name in ("tools", "functions") for problem in _schema_problems(name, row.get(name))]


def _schema_problems(name: str, value: object) -> list[str]:
    try:
        schemas = decode_json(value or None)
    except json.JSONDecodeError as error:
        return [f"{name} is not JSON: {describe_json_error(error)}"]
    if not schemas or (isinstance(schemas, list) and all(isinstance(schema, dict) for schema in schemas)):
        return []
    return [f"{name} is not a list of JSON schemas"]


def call_problems(message: Message) -> list[str]:
    """Returns the problems of a message's `tool_calls`."""
    calls = message["tool_calls"]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return ['tool_calls is not a list of objects like {"function": {"name": "...", "arguments": {...}}}']
    return [problem for number, call in enumerate(calls) for problem in _call_problems(number, call)]


def _call_problems(number: int, call: JsonObject) -> list[str]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
        return [f"tool call {number} needs a function with 'name' and 'arguments'"]
    try:
        arguments = decode_json(function["arguments"])
    except json.JSONDecodeError as error:
        return [f"the arguments of tool call {number} are not JSON: {describe_json_error(error)}"]
    return [] if isinstance(arguments, dict) else [f"the arguments of tool call {number} are not an object"]


def with_parsed_arguments(message: Message) -> Message:
    """Returns the message with the arguments of its calls as objects, which templates expect, not as JSON text."""
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_with_parsed_arguments(call) for call in message["tool_calls"]]}


def _with_parsed_arguments(call: JsonObject) -> JsonObject:
    if "function" in call:
        return {**call, "function": _with_parsed_arguments(call["function"])}
    return {**call, "arguments": decode_json(call["arguments"])}


def decode_json(value: object) -> Any:
    """Returns decoded JSON if `value` is text, else `value`."""
    if not isinstance(value, str):
        return value
    if is_too_deep(value):
        raise json.JSONDecodeError(f"nested more than {MAX_DEPTH} levels deep", value, 0)
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # a number with thousands of digits
        raise json.JSONDecodeError(str(error), value, 0) from None


def called_functions(message: Message) -> list[str]:
    """Returns the names of the functions that a message calls."""
    return [call.get("function", call)["name"] for call in message.get("tool_calls") or ()]


def check_template_shows(messages: Sequence[Message], rendered: str, without_tools: str | None) -> None:
    """Raises ValueError if `rendered` lacks the tools, or the text of a role other than user and assistant.

    Args:
      without_tools: the messages rendered without the row's tools, or None if the row has none.
    """
    if without_tools == rendered:
        raise ValueError(
            "the chat template does not write the row's tools, so the model would learn to call functions that it has "
            "not seen. Set data.chat_template to a jinja file that writes tools."
        )
    for message in messages:
        text = (message.get("content") or "").strip() if message["role"] not in ("user", "assistant") else ""
        # Some templates write a tool's answer as a JSON string.
        if text not in rendered and json.dumps(text, ensure_ascii=False)[1:-1] not in rendered:
            # Without the message's index: rows with equal problems are reported together.
            raise ValueError(
                f"the chat template drops the text of a message of the role {message['role']!r}. Remove such messages "
                "from the rows, or set chat_template (data.chat_template in training) to a jinja file that writes them."
            )


REASONING = "reasoning_content"
# Other names of the field: OpenRouter's and vLLM's, and that of gpt-oss's template.
OTHER_NAMES = ("reasoning", "thinking")
# Tags around reasoning in the content: of DeepSeek-R1, Qwen3 and most others, of Magistral, and of Seed-OSS.
TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))


class Thought(NamedTuple):
    """A message taken apart.

    Fields:
      reasoning: without the tags and the space around it; empty if the message has none.
      answer: the rest of the content.
      head: the content up to the answer, with its tags and spaces, if the reasoning is inside the content.
    """

    reasoning: str
    answer: str
    head: str = ""


def read_thought(message: Message) -> Thought:
    """Returns the reasoning and the answer of a message whose field of reasoning has our name."""
    content: str = message.get("content") or ""
    if message.get(REASONING):
        return Thought(message[REASONING].strip(), content)
    for opening, closing in TAGS:
        head, found, answer = content.rpartition(closing)
        if found:
            reasoning = head.lstrip().removeprefix(opening).strip()
            answer = answer.lstrip()
            return Thought(reasoning, answer, content[: len(content) - len(answer)])
    return Thought("", content)


def without_reasoning(message: Message) -> Message:
    """Returns the message without its reasoning."""
    rest = {name: value for name, value in message.items() if name != REASONING}
    thought = read_thought(message)
    return {**rest, "content": thought.answer} if thought.head else rest


def has_other_name(message: Message) -> bool:
    """Returns True if the message has a field of reasoning under another name than ours."""
    return any([name in message for name in OTHER_NAMES])


def with_our_name(message: Message) -> Message:
    """Returns the message with its reasoning in `reasoning_content`."""
    names = [name for name in (REASONING, *OTHER_NAMES) if message.get(name)]
    others = {name: value for name, value in message.items() if name not in OTHER_NAMES}
    return {**others, REASONING: message[names[0]]} if names else others


def reasoning_problems(message: Message) -> list[str]:
    """Returns the problems of a message's fields of reasoning."""
    given = {name: message[name] for name in (REASONING, *OTHER_NAMES) if message.get(name)}
    if wrong := [name for name, value in given.items() if not isinstance(value, str)]:
        return [f"{name} is not text (found {type(given[name]).__name__})" for name in wrong]
    if len(set(given.values())) > 1:
        return [f"{' and '.join(given)} differ. Keep one of them"]
    if given and message.get("role") != "assistant":
        return [
            f"{next(iter(given))} in a message of the role {message.get('role')!r}, expected only in the assistant's"
        ]
    return []


TEMPLATE_KWARGS = "chat_template_kwargs"
_CACHED = 64  # variables that rows have


def read_template_kwargs(row: JsonObject) -> dict[str, TemplateValue]:
    """Returns the row's variables. They may be JSON text, because typed columns cannot hold every object.

    A null is not a variable: files with typed columns write it where a row lacks one.
    """
    found = decode_json(_cell(row)) or {}
    return {name: value for name, value in found.items() if value is not None}


def template_kwargs_problems(row: JsonObject) -> list[str]:
    """Returns the reasons why the column is not an object of variables; empty if it is."""
    try:
        found = decode_json(_cell(row))
    except json.JSONDecodeError as error:
        return [f"{TEMPLATE_KWARGS} is not JSON: {describe_json_error(error)}"]
    if found is None or isinstance(found, dict):
        wrong = {name: value for name, value in (found or {}).items() if not _is_value(value)}
        expected = "expected true, false, a number, text or a list of texts"
        return [f"{TEMPLATE_KWARGS}: {name} is {type(value).__name__}, {expected}" for name, value in wrong.items()]
    return [
        f"{TEMPLATE_KWARGS} is not an object of the template's variables (found {type(found).__name__}, expected one "
        'like {"enable_thinking": false}). Rename the column if it is something else'
    ]


def _cell(row: JsonObject) -> object:
    """Returns the row's value; None for an empty cell, as CSV files have it."""
    value = row.get(TEMPLATE_KWARGS)
    return None if value == "" else value


def _is_value(value: object) -> bool:
    texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return texts or value is None or isinstance(value, bool | int | float | str)


def with_row_kwargs(tokenizer: Tokenizer, variables: Mapping[str, TemplateValue]) -> Tokenizer:
    """Returns the tokenizer with a row's variables, which take precedence over the tokenizer's.

    Raises:
      ValueError: the tokenizer has no chat template, or that reads no variable of a name.
    """
    if not variables:
        return tokenizer
    return with_template_kwargs(tokenizer, {**tokenizer.chat_template_kwargs, **variables}, TEMPLATE_KWARGS)


def by_template_kwargs[T](make: Callable[[Tokenizer], T], tokenizer: Tokenizer) -> Callable[[JsonObject], T]:
    """Returns a function of a row that calls `make` with the row's tokenizer, once for rows with equal variables."""

    @functools.lru_cache(_CACHED)
    def made(variables: str) -> T:
        return make(with_row_kwargs(tokenizer, json.loads(variables)))

    return lambda row: made(json.dumps(read_template_kwargs(row), sort_keys=True) if row.get(TEMPLATE_KWARGS) else "{}")


def check_plain(row: JsonObject) -> None:
    """Raises ValueError if a row that is plain text has variables, because no template writes it."""
    if read_template_kwargs(row):
        raise ValueError(f"{TEMPLATE_KWARGS}: the row is plain text, which no chat template writes. Remove the column")
