"""Checks the messages of a conversation, and rewrites OpenAI's other forms of them.

Content may be a list of parts; those with text are joined. Reasoning may have another name than ours. Before
tools existed, a turn called a function with `function_call`, the role `function` answered, and the column `functions`
had the schemas.
"""

from collections.abc import Mapping, Sequence

from qlora_jax.data.formats.columns import text_problem
from qlora_jax.data.formats.conversations import role_problems
from qlora_jax.data.formats.turn_fields import call_problems, has_other_name, reasoning_problems, with_our_name
from qlora_jax.data.tokenizer.template_pipe import Message
from qlora_jax.untrusted_json import JsonObject

# Types of parts that hold text, in OpenAI's Chat Completions and Responses.
TEXT_PARTS = ("text", "input_text", "output_text")


def current_messages(messages: Sequence[Message]) -> Sequence[Message]:
    """Returns the messages with text as content, reasoning under our name, and tool calls for function calls.

    Parts are joined without a separator, as templates join them that read parts.
    """
    if not any([_has_other_form(message) for message in messages]):
        return messages
    has_function_calls = any(message.get("function_call") for message in messages)
    return [_current(message, has_function_calls) for message in messages]


def message_problems(row: JsonObject) -> list[str]:
    """Returns the reasons why `messages` is not a conversation from which the assistant's turns can be learned."""
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return ['messages is not a list of objects like {"role": "user", "content": "..."}']
    if problems := form_problems(messages):
        return problems
    current = current_messages(messages)
    problems = [problem for index, message in enumerate(current) for problem in _problems(index, message)]
    roles = [message.get("role") for message in current]
    if not problems and "assistant" not in roles:
        return [f"no message has the role 'assistant', so the row has nothing to learn (found the roles {roles})"]
    return problems


def form_problems(messages: Sequence[Message]) -> list[str]:
    """Returns the reasons why `current_messages` cannot rewrite the messages."""
    problems = [
        f"message {index}{problem}"
        for index, message in enumerate(messages)
        if _has_other_form(message)
        for problem in (*_part_problems(message), *_function_call_problems(message))
    ]
    problems += [
        f"message {index}: {problem}"
        for index, message in enumerate(messages)
        for problem in reasoning_problems(message)
    ]
    return problems


def _has_other_form(message: Message) -> bool:
    return isinstance(message.get("content"), list) or bool(message.get("function_call")) or has_other_name(message)


def _current(message: Message, has_function_calls: bool) -> Message:
    changed: JsonObject = dict(with_our_name(message))
    if isinstance(message.get("content"), list):
        changed["content"] = "".join([part["text"] for part in message["content"]])
    if has_function_calls and "function_call" in message:
        call = changed.pop("function_call")
        if call:
            changed["tool_calls"] = [{"type": "function", "function": call}]
    if has_function_calls and message.get("role") == "function":
        changed["role"] = "tool"
    return changed


def _part_problems(message: Message) -> list[str]:
    """Returns the problems of content that is a list; each begins with ': '."""
    content = message.get("content")
    if not isinstance(content, list):
        return []
    problems = [_part_problem(part) for part in content]
    return [f": part {index} of content {problem}" for index, problem in enumerate(problems) if problem]


def _part_problem(part: object) -> str | None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str):
        return 'is not an object like {"type": "text", "text": "..."}'
    if kind not in TEXT_PARTS:
        return f"is {kind!r}, and only text can be learned. Remove such parts or rows"
    return None if isinstance(part.get("text"), str) else "has no text"


def _function_call_problems(message: Message) -> list[str]:
    call = message.get("function_call")
    if not call:
        return []
    if message.get("tool_calls"):
        return [" has both function_call and tool_calls. Remove one of them"]
    if not isinstance(call, dict):
        return [': function_call is not an object like {"name": "...", "arguments": "{...}"}']
    return []


def _problems(index: int, message: Message) -> list[str]:
    if not isinstance(message.get("role"), str) or not ("content" in message or message.get("tool_calls")):
        return [f"message {index} needs 'role' and 'content', found {', '.join(map(repr, message)) or 'nothing'}"]
    problems = [f"message {index}: {problem}" for problem in role_problems(message["role"])]
    if message.get("tool_calls"):
        problems += [f"message {index}: {problem}" for problem in call_problems(message)]
        if message.get("content") is None:
            return problems
    speaks = message["role"] == "assistant" and not message.get("tool_calls")
    problem = text_problem(f"content of message {index} ({message['role']})", message["content"], not speaks)
    return [*problems, problem] if problem else problems
