"""Tools in conversations: the schemas of a row, the calls of its turns, and a check that a template writes them."""

import json
from collections.abc import Sequence
from typing import Any

from qlora_jax.data.readers.json_rows import describe_json_error
from qlora_jax.data.tokenizer.template_protocol import Message
from qlora_jax.metadata import MAX_DEPTH, JsonObject, is_too_deep

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
