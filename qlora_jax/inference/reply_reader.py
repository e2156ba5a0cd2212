"""Takes a reply apart while it arrives: its reasoning, its content, and its calls of tools.

Nothing is lost: a text that begins like a call and is none becomes content.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from qlora_jax.data.loss_mask.turns import opened_reasoning
from qlora_jax.inference.engine.detokenizer import overlap
from qlora_jax.inference.reply_format import CallFormat, ReasoningFormat, ReplyFormat
from qlora_jax.untrusted_json import JsonObject

MAX_REFERENCES = 64  # definitions of a schema that are followed


class Text(NamedTuple):
    """A part of a reply that is text."""

    kind: Literal["reasoning", "content"]
    text: str


class Call(NamedTuple):
    """A call of a tool; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


Part = Text | Call


class ReplyReader:
    """Reads one reply."""

    def __init__(self, form: ReplyFormat, prompt: str, tools: Sequence[JsonObject]):
        """Starts before the reply.

        Args:
          prompt: the rendered conversation, whose end may open a block of reasoning.
          tools: the functions that the model may call; empty: its text has no calls.
        """
        self._reasoning = form.reasoning
        self._parser = None if form.calls is None or not tools else CallParser(form.calls, tools)
        self._buffer, self._parts, self._last = "", [], False
        self._said, self._called, self._trigger, self._needs_head = False, False, "", True
        self._state: Callable[[], bool] = self._start
        if opened := opened_reasoning(prompt):
            self._reasoning = ReasoningFormat(*opened, "")
            self._state = self._think

    def feed(self, text: str, *, last: bool = False) -> list[Part]:
        """Adds text and returns the parts that it completes; with `last`, all that is left."""
        self._buffer += text
        self._last = last
        while self._state():
            pass
        parts, self._parts = self._parts, []
        return parts

    # Each state consumes what it can, and returns True if another state follows.

    def _start(self) -> bool:
        mark = self._reasoning.opening if self._reasoning else ""
        text = self._buffer.lstrip()
        if mark and text.startswith(mark):
            self._buffer, self._state = text[len(mark) :], self._think
            return True
        if not self._last and mark.startswith(text):
            return False
        self._state = self._lead
        return True

    def _think(self) -> bool:
        assert self._reasoning is not None, "a block has its tags"
        closing = self._reasoning.closing
        thought, found, rest = self._buffer.partition(closing)
        if found or self._last:
            self._say("reasoning", thought.rstrip())
            self._buffer, self._state, self._said = rest, self._lead, False
            return True
        self._emit_up_to("reasoning", closing)
        return False

    def _lead(self) -> bool:
        lead, text = self._reasoning.lead if self._reasoning else "", self._buffer.lstrip()
        if not self._last and (not text or (len(text) < len(lead) and lead.startswith(text))):
            return False
        self._buffer, self._state = text.removeprefix(lead), self._content
        return True

    def _content(self) -> bool:
        if self._parser is None:
            self._say("content", self._buffer)
            self._buffer = ""
            return False
        trigger = self._parser.trigger
        if not trigger:
            return self._bare_call()
        before, found, rest = self._buffer.partition(trigger)
        if found:
            self._say("content", before.rstrip())
            self._buffer, self._state = rest, self._call
            self._trigger, self._needs_head = before[len(before.rstrip()) :] + trigger, True
            return True
        if self._last:
            self._say("content", before.rstrip() if self._called else before)
            self._buffer = ""
        else:
            self._emit_up_to("content", trigger)
        return False

    def _bare_call(self) -> bool:
        """Reads a reply that is a call if it is nothing but the JSON of one."""
        text = self._buffer.lstrip()
        if text.startswith("{") and not self._said and not self._called:
            self._buffer, self._state, self._trigger, self._needs_head = text, self._call, "", True
            return True
        if text or self._last:
            self._say("content", self._buffer.rstrip() if self._called else self._buffer)
            self._buffer = ""
        return False

    def _call(self) -> bool:
        assert self._parser is not None, "only a parser leads here"
        found = self._parser.parse(self._buffer, needs_head=self._needs_head)
        if found is not None:
            call, end = found
            self._parts.append(call)
            self._called, self._buffer, self._state = True, self._buffer[end:], self._after_call
            return True
        if self._last or self._parser.is_over(self._buffer):
            self._say("content", self._trigger + self._buffer)
            self._buffer, self._state = "", self._content
        return False

    def _after_call(self) -> bool:
        assert self._parser is not None, "only a parser leads here"
        if (end := self._parser.match_between(self._buffer)) is not None:
            self._buffer, self._needs_head, self._state, self._trigger = self._buffer[end:], False, self._call, ""
            return True
        if not self._last and self._parser.may_follow(self._buffer):
            return False
        self._buffer = self._buffer[self._parser.match_tail(self._buffer) :].lstrip()
        self._state = self._content
        return True

    def _say(self, kind: Literal["reasoning", "content"], text: str) -> None:
        if not self._said and (kind == "reasoning" or self._called):
            text = text.lstrip()
        if text:
            self._said = True
            self._parts.append(Text(kind, text))

    def _emit_up_to(self, kind: Literal["reasoning", "content"], mark: str) -> None:
        """Emits the buffer, but not spaces at its end, nor what may become the mark."""
        text = self._buffer
        shown = text[: len(text) - overlap(text, mark)].rstrip()
        self._say(kind, shown)
        self._buffer = text[len(shown) :]


def _flexible(literal: str) -> str:
    """Returns a pattern for a literal, with any spaces between its words and around it."""
    return "".join(rf"\s*{re.escape(word)}" for word in literal.split()) + r"\s*"


def _squeezed(text: str) -> str:
    return "".join(text.split())


class CallParser:
    """Parses calls in the format of a template."""

    def __init__(self, form: CallFormat, tools: Sequence[JsonObject]):
        self._form = form
        self._parameters = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        words = form.head.split()
        self.trigger = words[0] if words else ""
        self._head = re.compile(_flexible(form.head.strip()[len(self.trigger) :]))
        self._between = None if form.between is None else re.compile(_flexible(form.between))
        self._tail = re.compile(_flexible(form.tail))
        self._name = re.compile(rf"\s*(\S+?){_flexible(form.before_arguments)}(?={{)", re.DOTALL)
        if (tags := form.tags) is not None:
            key, end = _flexible(tags.before_key), _flexible(form.tail)
            self._tagged_name = re.compile(rf"\s*(\S+?){_flexible(tags.after_name)}(?={key}|{end})", re.DOTALL)
            value = (
                rf"{key}(\S+?){_flexible(tags.before_value).removesuffix(r'\s*')}(.*?){_flexible(tags.after_value)[3:]}"
            )
            self._argument = re.compile(value.removesuffix(r"\s*"), re.DOTALL)

    def parse(self, text: str, *, needs_head: bool) -> tuple[Call, int] | None:
        """Returns the call at the beginning of a text and its end; None if there is none, or not all of it."""
        start = 0
        if needs_head:
            if (head := self._head.match(text)) is None:
                return None
            start = head.end()
        match self._form.form:
            case "object":
                return self._parse_object(text, start)
            case "named":
                name = self._name.match(text, start)
                found = None if name is None else _decode(text, name.end())
                return None if name is None or found is None else (_made(name[1], found[0]), found[1])
            case "tagged":
                return self._parse_tagged(text, start)

    def _parse_object(self, text: str, start: int) -> tuple[Call, int] | None:
        found = _decode(text, start)
        if found is None:
            return None
        value, end = found
        name, arguments = value.get(self._form.name_key), value.get(self._form.arguments_key)
        known = bool(self.trigger) or name in self._parameters  # any JSON object may be an answer
        if not isinstance(name, str) or not isinstance(arguments, dict) or not known:
            return None
        return _made(name, arguments), end

    def _parse_tagged(self, text: str, start: int) -> tuple[Call, int] | None:
        name = self._tagged_name.match(text, start)
        tags = self._form.tags
        if name is None or tags is None:
            return None
        at, arguments = name.end(), {}
        while (found := self._argument.match(text, at)) is not None:
            # The line breaks of the format do not belong to the value.
            value = (
                found[2].removeprefix(_spaces_after(tags.before_value)).removesuffix(_spaces_before(tags.after_value))
            )
            arguments[found[1]] = _typed(value, self._parameters.get(name[1], {}), found[1])
            at = found.end()
        return (_made(name[1], arguments), at) if self._tail.match(text, at) else None

    def is_over(self, text: str) -> bool:
        """Returns True if a text that is not a call cannot become one any more."""
        # A bracket alone may belong to the arguments.
        return any(map(str.isalpha, self._form.tail)) and self._tail.search(text) is not None

    def match_between(self, text: str) -> int | None:
        """Returns the end of the text between two calls, if a text begins with it."""
        found = None if self._between is None else self._between.match(text)
        return found.end() if found and found.group().strip() else None

    def match_tail(self, text: str) -> int:
        """Returns the end of the text after the last call, 0 if a text does not begin with it."""
        found = self._tail.match(text)
        return found.end() if found else 0

    def may_follow(self, text: str) -> bool:
        """Returns True if a text is the beginning of what follows a call, so that more of it is needed."""
        return any(_squeezed(mark or "").startswith(_squeezed(text)) for mark in (self._form.between, self._form.tail))


def _spaces_after(text: str) -> str:
    return text[len(text.rstrip()) :]


def _spaces_before(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _decode(text: str, start: int) -> tuple[JsonObject, int] | None:
    try:
        value, end = json.JSONDecoder().raw_decode(text, start + len(_spaces_before(text[start:])))
    except (ValueError, RecursionError):
        return None
    return (value, end) if isinstance(value, dict) else None


def _made(name: str, arguments: JsonObject) -> Call:
    return Call(name, json.dumps(arguments, ensure_ascii=False))


def alternatives(schema: object, parameters: JsonObject, seen: set[str] | None = None) -> Iterator[JsonObject]:
    """Yields the schemas, none of which is a reference, of which a value has to follow one."""
    schema, seen = schema if isinstance(schema, dict) else {}, set() if seen is None else seen
    several = [one for name in ("anyOf", "oneOf") if isinstance(schema.get(name), list) for one in schema[name]]
    if isinstance(place := schema.get("$ref"), str) and place not in seen and len(seen) < MAX_REFERENCES:
        seen.add(place)
        kind, _, name = place.removeprefix("#/").partition("/")
        definitions = parameters.get(kind)
        several = [definitions.get(name) if isinstance(definitions, dict) else None]
    for one in several:
        yield from alternatives(one, parameters, seen)
    if not several:
        yield schema


def allows_text(schema: JsonObject) -> bool:
    """Returns True if a value of a schema of `alternatives` may be text, as far as the schema tells."""
    kinds, values = schema.get("type"), values_of(schema)
    if values is not None:
        return any(isinstance(value, str) for value in values)
    return kinds is None or "string" in (kinds if isinstance(kinds, list) else [kinds])


def values_of(schema: JsonObject) -> list[object] | None:
    """Returns the values that a schema allows; None if it does not list them."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return values if isinstance(values, list) else None


def _typed(text: str, parameters: JsonObject, key: str) -> object:
    """Returns the value of an argument; text where its schema allows text, or where it is not JSON."""
    properties = parameters.get("properties")
    schema = properties.get(key) if isinstance(properties, dict) else None
    found = [*alternatives(schema, parameters)]
    if text == "null" and any(one.get("type") == "null" for one in found):
        return None
    if any(map(allows_text, found)):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
