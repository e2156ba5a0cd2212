"""Reasoning in messages: in a field that has one of several names, or between tags at the start of the content."""

from typing import NamedTuple

from qlora_jax.data.tokenizer.template_protocol import Message

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
