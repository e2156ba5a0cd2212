"""Chat templates: jinja in a sandbox, with the extras that published templates count on (those of transformers)."""

import contextlib
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.runtime
import jinja2.sandbox

Message = Mapping[str, Any]

# Names that are safe in any template: what a loop tells, and keys that are no method of a dict.
_LOOP = frozenset({"first", "last", "index", "index0", "length"})
_METHODS = frozenset(dir(dict))


class _GenerationBlock(jinja2.ext.Extension):
    """Reads `{% generation %}...{% endgeneration %}` as its body: our masks come from spans, not from marks."""

    tags = {"generation"}  # noqa: RUF012 (a class attribute that jinja reads)

    def parse(self, parser: Any) -> list[Any]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys=False
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's, which asks a dozen questions of all that templates read: not of what every turn of a chat needs."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """What `obj.attribute` is in a template."""
        if type(obj) is jinja2.runtime.LoopContext and attribute in _LOOP:
            return getattr(obj, attribute)
        if type(obj) is dict and attribute in obj and attribute not in _METHODS:
            return obj[attribute]
        return super().getattr(obj, attribute)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    try:
        compiled = environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template does not parse: line {error.lineno}: {error.message}") from error
    except (SyntaxError, RecursionError) as error:  # of the Python that jinja makes of it
        raise ValueError(f"the chat template does not parse: {error.args[0]}") from error
    compiled.globals = dict(compiled.globals)  # a ChainMap, copied for every rendering at ten times a dict's cost
    return compiled


def _with_content(message: Message) -> Message:
    return {"content": "", **message} if message.get("tool_calls") else message


def render(
    template: str,
    messages: Sequence[Message],
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The text that `template` makes of `messages`, as transformers' `apply_chat_template(tokenize=False)` gives it.

    Args:
      template: jinja source.
      messages: dicts with `role` and `content`; keys whose value is None are dropped. A turn that calls tools may have
        no content: it is empty text to a template that fails without.
      special_tokens: `bos_token`, `eos_token`, ... by name; those that the tokenizer lacks are left out.
      add_generation_prompt: ends with what comes before an assistant's turn.
      tools: what the model may call, as JSON schemas.

    Raises:
      ValueError: the template does not parse, refuses these messages or fails on them.
    """
    chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
    given = {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt, **special_tokens}
    compiled = _compile(template)
    try:
        with contextlib.suppress(jinja2.UndefinedError):
            return compiled.render(messages=chat, **given)
        # As transformers has it first, so that templates that ask whether there is content are told the truth (`is
        # defined`, `is string`); those that join it to text fail on what is missing, and mean "".
        return compiled.render(messages=[_with_content(message) for message in chat], **given)
    except Exception as error:  # a template may call whatever strings, lists and dicts can do
        roles = [message.get("role") for message in messages]
        raise ValueError(f"the chat template refuses a conversation with roles {roles}: {error}") from error
