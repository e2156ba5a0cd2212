"""Finds how a model writes calls of tools and reasoning, from its chat template.

The template renders a turn with a known call, and the texts around its name and arguments are the format. No table of
models is needed. Three forms of calls are known: one JSON object with the name and the arguments (Hermes, Qwen,
Llama 3), a name followed by the JSON of the arguments (Mistral, DeepSeek, gpt-oss), and arguments between tags
(Qwen3-Coder, GLM-4.5).
"""

import contextlib
import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from qlora_jax.data.formats.turn_fields import REASONING, TAGS
from qlora_jax.data.loss_mask.turns import PLACEHOLDER, opened_reasoning, text_behind
from qlora_jax.data.tokenizer.template_pipe import Message
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.untrusted_json import JsonObject

NAME, KEY, OTHER_KEY, VALUE, OTHER_VALUE, ANSWER, THOUGHT = (PLACEHOLDER.format(number) for number in range(7))
CALL_ID = "Qz7callx9"  # Mistral's templates expect nine letters and digits
_USER = {"role": "user", "content": "Hi"}
_PARAMETERS = {"type": "object", "properties": {KEY: {"type": "string"}, OTHER_KEY: {"type": "string"}}}
_TOOLS = [{"type": "function", "function": {"name": NAME, "description": "a tool", "parameters": _PARAMETERS}}]
_ARGUMENTS = {KEY: VALUE, OTHER_KEY: OTHER_VALUE}


class Tags(NamedTuple):
    """Texts around the arguments of a call that are not JSON.

    Fields:
      after_name: text between the name and the first argument.
      before_key, before_value, after_value: texts around each argument.
    """

    after_name: str
    before_key: str
    before_value: str
    after_value: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallFormat:
    """The texts that a template writes around calls.

    Attributes:
      form: "object" for one JSON object per call, "named" for a name and JSON arguments, "tagged" for tags.
      head: text before the first call; empty where a reply that is a JSON object is a call.
      between: text between two calls; None if a turn has one.
      tail: text after the last call, without the end of the turn.
      before_name: text of a call before its name, and `before_arguments` between the name and its arguments.
      after_arguments: text of a call after them.
      name_key, arguments_key: keys of the object.
      tags: of the form "tagged".
      end_id: id of the token that ends a turn with calls; None if none does.
    """

    form: Literal["object", "named", "tagged"]
    head: str
    between: str | None = None
    tail: str
    before_name: str
    before_arguments: str = ""
    after_arguments: str = ""
    name_key: str = ""
    arguments_key: str = ""
    tags: Tags | None = None
    end_id: int | None


class ReasoningFormat(NamedTuple):
    """The texts that a template writes around reasoning: before it, after it, and before the answer behind it."""

    opening: str
    closing: str
    lead: str


class ReplyFormat(NamedTuple):
    """The forms in which a model writes calls and reasoning; None for one that its template does not write."""

    calls: CallFormat | None
    reasoning: ReasoningFormat | None


def reply_format(tokenizer: Tokenizer) -> ReplyFormat:
    """Returns the format of the replies of a model with a chat template."""
    calls = _call_format(tokenizer)
    return ReplyFormat(calls, _reasoning_format(tokenizer, calls))


def _call(**arguments: str) -> JsonObject:
    return {"id": CALL_ID, "type": "function", "function": {"name": NAME, "arguments": arguments}}


def _written(tokenizer: Tokenizer, message: Message) -> str | None:
    """Returns what the model writes for a turn, through its end; None if the template does not write such turns."""
    tools = _TOOLS if message.get("tool_calls") else None
    try:
        prompt = tokenizer.render([_USER], add_generation_prompt=True, tools=tools)
        return text_behind(1, message, prompt, tokenizer.render([_USER, message], tools=tools))
    except ValueError:
        return None


def _turn(calls: int, **fields: str) -> Message:
    return {"role": "assistant", "content": "", "tool_calls": [_call(**_ARGUMENTS)] * calls, **fields}


def _call_format(tokenizer: Tokenizer) -> CallFormat | None:
    text = _written(tokenizer, _turn(1))
    if text is None or OTHER_VALUE not in text:
        return None
    ends = [*tokenizer.special_text.finditer(text, text.index(OTHER_VALUE))]
    end_id = tokenizer.backend.token_to_id(ends[-1].group()) if ends else None
    text = _EMPTY_BLOCKS.sub("", text[: ends[-1].start()] if ends else text, count=1)
    found = _json_call(text, end_id) or _tagged_call(text, end_id)
    two = _written(tokenizer, _turn(2))
    if found is None or two is None:
        return found
    call = text[len(found.head) : len(text) - len(found.tail)]
    first, *others = [match.start() for match in re.finditer(re.escape(call), two)] or [0]
    return dataclasses.replace(found, between=two[first + len(call) : others[0]] if len(others) == 1 else None)


# A block of reasoning that a template writes empty before calls, or only closes, because the prompt has opened it.
_EMPTY_BLOCKS = re.compile(
    "(?:" + "|".join(rf"\s*(?:{re.escape(opening)})?\s*{re.escape(closing)}\s*" for opening, closing in TAGS) + ")*"
)


class _Object(NamedTuple):
    """A JSON object in a text."""

    value: JsonObject
    start: int
    end: int


def _objects(text: str) -> Iterator[_Object]:
    """Yields the JSON objects of a text, also those inside others."""
    for match in re.finditer("{", text):
        with contextlib.suppress(ValueError):
            value, end = json.JSONDecoder().raw_decode(text, match.start())
            yield _Object(value, match.start(), end)


def _json_call(text: str, end_id: int | None) -> CallFormat | None:
    """Returns the format of a call whose arguments are JSON."""
    found = [*_objects(text)]
    arguments = next((one for one in found if one.value == _ARGUMENTS), None)
    if arguments is None or text.count(NAME) != 1 or text.index(NAME) > arguments.start:
        return None
    at, names, start, end = text.index(NAME), {}, text.index(NAME), arguments.end
    for one in found:
        keys = {key: value for key, value in one.value.items() if value in (NAME, _ARGUMENTS)}
        if len(keys) == 2:
            names, start, end = {json.dumps(value): key for key, value in keys.items()}, one.start, one.end
    return CallFormat(
        form="object" if names else "named",
        head=text[:start],
        tail=text[end:],
        before_name=text[start:at],
        before_arguments=text[at + len(NAME) : arguments.start],
        after_arguments=text[arguments.end : end],
        name_key=names.get(json.dumps(NAME), ""),
        arguments_key=names.get(json.dumps(_ARGUMENTS), ""),
        end_id=end_id,
    )


def _tagged_call(text: str, end_id: int | None) -> CallFormat | None:
    """Returns the format of a call whose arguments are between tags."""
    parts = [NAME, KEY, VALUE, OTHER_KEY, OTHER_VALUE]
    if re.findall("|".join(parts), text) != parts:
        return None
    head, first, before_value, following, _, rest = re.split("|".join(parts), text)
    before_key = _common(first[::-1], following[::-1])[::-1]
    after_value = following.removesuffix(before_key)
    tags = Tags(first.removesuffix(before_key), before_key, before_value, after_value)
    if not rest.startswith(after_value) or not all(tag.strip() for tag in tags[1:]):
        return None
    # The text after the last argument belongs to each call, up to where the next one begins.
    return CallFormat(
        form="tagged", head=head, tail=rest.removeprefix(after_value), before_name="", tags=tags, end_id=end_id
    )


def _reasoning_format(tokenizer: Tokenizer, calls: CallFormat | None) -> ReasoningFormat | None:
    """Returns the marks of reasoning in a rendered turn; without any, the tags that the template mentions."""
    answer = {"role": "assistant", "content": ANSWER, REASONING: THOUGHT}
    text = _written(tokenizer, answer) or ""
    if THOUGHT not in text or ANSWER not in text or text.index(ANSWER) < text.index(THOUGHT):
        template = tokenizer.chat_template or ""
        return next((ReasoningFormat(*pair, "") for pair in TAGS if pair[1] in template), None)
    opening, rest = text[: text.index(THOUGHT)], text[text.index(THOUGHT) + len(THOUGHT) : text.index(ANSWER)]
    calling = _written(tokenizer, _turn(1, **{REASONING: THOUGHT})) if calls is not None else None
    closing = rest
    if calls is not None and calling is not None and f"{THOUGHT}" in calling and calls.head in calling:
        # gpt-oss continues with another channel after its reasoning.
        before_call = calling[calling.index(THOUGHT) + len(THOUGHT) : calling.index(calls.head + calls.before_name)]
        closing = _common(rest, before_call)
    opening = opening or _opened(tokenizer)
    return ReasoningFormat(opening.strip(), closing.strip(), rest.removeprefix(closing).strip())


def _common(one: str, other: str) -> str:
    """Returns the beginning that two texts share."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(letter for letter, _ in pairs)


def _opened(tokenizer: Tokenizer) -> str:
    pair = opened_reasoning(tokenizer.render([_USER], add_generation_prompt=True))
    return "" if pair is None else pair[0]
