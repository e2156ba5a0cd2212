"""Chat templates: jinja in a sandbox, with the extras of transformers that published templates rely on."""

import contextlib
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

Message = Mapping[str, Any]  # a JSON object: `content` is text, but `tool_calls` is a list, and templates read more

# Names that are safe in any template: attributes of a loop, and keys that are not methods of a dict.
_LOOP = frozenset({"first", "last", "index", "index0", "length"})
_METHODS = frozenset(dir(dict))


class _GenerationBlock(jinja2.ext.Extension):
    """Reads `{% generation %}...{% endgeneration %}` as its body. Masks come from spans, not from these marks."""

    tags = {"generation"}  # noqa: RUF012 (a class attribute that jinja reads)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox without its dozen checks per attribute for attributes that every turn of a chat reads."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Returns the value of `obj.attribute` in a template."""
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
        raise ValueError(
            f"the chat template does not parse: line {error.lineno}: {error.message}. Correct its jinja."
        ) from error
    except (SyntaxError, RecursionError) as error:  # of the Python code that jinja generates
        raise ValueError(f"the chat template does not parse: {error.args[0]}. Correct its jinja.") from error
    compiled.globals = dict(
        compiled.globals
    )  # was a ChainMap, which costs ten times as much to copy, once per rendering
    return compiled


def _with_content(message: Message) -> Message:
    return {"content": "", **message} if message.get("tool_calls") else message


def render(
    template: str,
    messages: Sequence[Message],
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, object]] | None = None,
) -> str:
    """Renders `messages` to the same text as transformers' `apply_chat_template(tokenize=False)`.

    Args:
      template: jinja source.
      messages: dicts with `role` and `content`. Keys whose value is None are dropped. A turn that calls tools may lack
        content. A template that fails without it then gets empty text.
      special_tokens: `bos_token`, `eos_token` and others, by name, if the tokenizer has them.
      add_generation_prompt: True if the text ends with the prompt of an assistant's turn.
      tools: JSON schemas of the functions that the model may call.

    Raises:
      ValueError: the template does not parse, rejects these messages or fails on them.
    """
    chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
    given = {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt, **special_tokens}
    compiled = _compile(template)
    try:
        with contextlib.suppress(jinja2.UndefinedError):
            return compiled.render(messages=chat, **given)
        # First without content, as in transformers, for templates that test it (`is defined`, `is string`). Templates
        # that join it to text fail on missing content, and mean "".
        return compiled.render(messages=[_with_content(message) for message in chat], **given)
    except Exception as error:  # a template may call any method of strings, lists and dicts
        roles = [message.get("role") for message in messages]
        raise ValueError(f"the chat template rejects a conversation with roles {roles}: {error}") from error
