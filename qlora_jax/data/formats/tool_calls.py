"""Tools in conversations: the schemas a row brings, the calls its turns make, and whether a template shows them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.data.readers.json_rows import describe_json_error
from qlora_jax.data.tokenizer.chat_template import Message
from qlora_jax.data.tokenizer.tokenizer import Tokenizer

Tools = Sequence[Mapping[str, Any]]


def read_tools(row: Mapping[str, Any]) -> Tools | None:
    """The row's `tools`, which may be JSON text, since columns of typed files can't hold schemas; None: it has none."""
    return _read(row.get("tools") or None) or None


def tools_problems(row: Mapping[str, Any]) -> list[str]:
    """What keeps `tools` from being a list of schemas, or empty."""
    try:
        tools = _read(row.get("tools") or None)
    except json.JSONDecodeError as error:
        return [f"tools is not JSON: {describe_json_error(error)}"]
    if not tools or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return []
    return ["tools is no list of JSON schemas"]


def call_problems(message: Message) -> list[str]:
    """What is wrong with a message's `tool_calls`, or empty."""
    calls = message["tool_calls"]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return ['tool_calls is no list of objects like {"function": {"name": "...", "arguments": {...}}}']
    return [problem for number, call in enumerate(calls) for problem in _call_problems(number, call)]


def _call_problems(number: int, call: Mapping[str, Any]) -> list[str]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
        return [f"tool call {number} needs a function with 'name' and 'arguments'"]
    try:
        arguments = _read(function["arguments"])
    except json.JSONDecodeError as error:
        return [f"the arguments of tool call {number} are not JSON: {describe_json_error(error)}"]
    return [] if isinstance(arguments, dict) else [f"the arguments of tool call {number} are no object"]


def with_parsed_arguments(message: Message) -> Message:
    """The message with its calls' arguments as objects, as templates want them; others write them as JSON text."""
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_with_parsed_arguments(call) for call in message["tool_calls"]]}


def _with_parsed_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_parsed_arguments(call["function"])}
    return {**call, "arguments": _read(call["arguments"])}


def _read(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except RecursionError as error:
        raise json.JSONDecodeError(str(error), arguments, 0) from None


def called_functions(message: Message) -> list[str]:
    """The functions that a message calls."""
    return [call.get("function", call)["name"] for call in message.get("tool_calls") or ()]


def check_template_shows(tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools | None, rendered: str) -> None:
    """Raises ValueError where `rendered` lacks the row's tools, or what neither a user nor an assistant says."""
    if tools is not None and tokenizer.render(messages) == rendered:
        raise ValueError(
            f"the row has {len(tools)} tools, and the chat template never shows them, so the model would learn to "
            "call what it has not seen. Use a template that takes tools: data.chat_template names a jinja file"
        )
    for message in messages:
        said = (message.get("content") or "").strip() if message["role"] not in ("user", "assistant") else ""
        # Some templates write what a tool says as a JSON string.
        if said not in rendered and json.dumps(said, ensure_ascii=False)[1:-1] not in rendered:
            # Without the message's number: rows that lack the same are told together.
            raise ValueError(
                f"the chat template leaves out what a message of the role {message['role']!r} says. Take such messages "
                "out of the rows, or use a template that shows them: chat_template (data.chat_template in training) "
                "names a jinja file"
            )
