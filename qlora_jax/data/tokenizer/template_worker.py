"""Renders chat templates in a separate process, with limits on memory and processor time.

A template is a program from a stranger. Jinja's sandbox keeps it away from Python's objects, but not from endless loops
and gigabytes of text. The kernel therefore limits this process. A rendering that reaches a limit ends it. Where the
system can, the process is also sealed, as those of programs are: no network, processes or files but Python's libraries.

template_process.py starts it, and template_pipe.py describes the requests on its standard input and its replies.
"""

import array
import contextlib
import datetime
import functools
import itertools
import json
import os
import pickle
import re
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from qlora_jax.data.tokenizer.template_pipe import (
    ENCODING,
    HEADER,
    LENGTHS,
    MEMORY_REACHED,
    OUTPUT_PER_INPUT,
    OUTPUT_REACHED,
    STRFTIME_NOW,
    Limits,
    Message,
    Tool,
)
from qlora_jax.sandbox.landlock_seccomp import seal_if_possible
from qlora_jax.sandbox.limits import limit_resources

# The fields of a Rendering.
Call = tuple[Sequence[Message], bool, Sequence[Tool] | None, Mapping[str, object] | None]

_LONGEST_ERROR = 2000  # characters
_BUFFER = 1 << 18  # bytes of requests that are read at once

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


def _with_date(variables: Mapping[str, object]) -> Mapping[str, object]:
    """Returns the variables of a template, with a date among them as the function that writes this date."""
    date = variables.get(STRFTIME_NOW)
    return {**variables, STRFTIME_NOW: date.strftime} if isinstance(date, datetime.date) else variables


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox without its dozen checks per attribute for attributes that every turn of a chat reads."""

    def getattr(self, obj: object, attribute: str) -> object:
        """Returns the value of `obj.attribute` in a template."""
        if type(obj) is jinja2.runtime.LoopContext and attribute in _LOOP:
            return getattr(obj, attribute)
        if type(obj) is dict and attribute in obj and attribute not in _METHODS:
            return obj[attribute]
        return super().getattr(obj, attribute)


def make_environment(*, optimized: bool = True) -> jinja2.Environment:
    """Returns the sandbox that chat templates run in, with the tags that they use."""
    extensions = [_GenerationBlock, jinja2.ext.loopcontrols]
    return _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=optimized)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = make_environment()
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, STRFTIME_NOW: _strftime_now}
    try:
        compiled = environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"the chat template does not parse: line {error.lineno}: {error.message}. Correct its jinja."
        ) from error
    except (SyntaxError, RecursionError) as error:  # raised by the Python code that jinja generates
        raise ValueError(f"the chat template does not parse: {error.args[0]}. Correct its jinja.") from error
    compiled.globals = dict(
        compiled.globals
    )  # was a ChainMap, which costs ten times as much to copy, once per rendering
    return compiled


def _rendered(compiled: jinja2.Template, given: Mapping[str, object]) -> str:
    """Returns what `compiled.render(given)` returns, without its copies, which take a third of the time."""
    context = compiled.new_context({**compiled.globals, **given}, shared=True)
    return "".join(compiled.root_render_func(context))


@functools.lru_cache(maxsize=8)
def _reasoning_names(template: str) -> tuple[str, ...]:
    """Returns the other names of `reasoning_content` that the template reads, such as gpt-oss's `thinking`."""
    return tuple(name for name in ("reasoning", "thinking") if re.search(rf"""[.'"]{name}\b""", template))


def _with_reasoning(message: Message, names: Sequence[str]) -> Message:
    if message.get("reasoning_content") is None:
        return message
    return {**{name: message["reasoning_content"] for name in names}, **message}


def _with_content(message: Message) -> Message:
    return {"content": "", **message} if message.get("tool_calls") else message


def render_conversation(
    template: str,
    variables: Mapping[str, object],
    messages: Sequence[Message],
    add_generation_prompt: bool,
    tools: Sequence[Tool] | None,
    own_variables: Mapping[str, object] | None,
) -> str:
    """Renders one conversation; see chat_template.render.

    Args:
      own_variables: those of this conversation, which take precedence.

    Raises:
      ValueError: the template does not parse, rejects these messages or fails on them.
    """
    chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
    if names := _reasoning_names(template):
        chat = [_with_reasoning(message, names) for message in chat]
    given = {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt, **_with_date(variables)}
    given |= own_variables or {}
    compiled = _compile(template)
    try:
        with contextlib.suppress(jinja2.UndefinedError):
            return _rendered(compiled, {"messages": chat, **given})
        # First without content, as in transformers, for templates that test it (`is defined`, `is string`). Templates
        # that join it to text fail on missing content, and mean "".
        return _rendered(compiled, {"messages": [_with_content(message) for message in chat], **given})
    except MemoryError:
        raise
    except Exception as error:  # a template may call any method of strings, lists and dicts
        roles = [message.get("role") for message in messages]
        raise ValueError(f"the chat template rejects a conversation with roles {roles}: {error}") from error


def _answer(template: str, variables: Mapping[str, object], call: Call) -> tuple[bool, str]:
    """Returns (True, the error) or (False, the rendered text)."""
    try:
        return False, render_conversation(template, variables, *call)
    except ValueError as error:
        message = str(error)
        return True, message if len(message) <= _LONGEST_ERROR else f"{message[:_LONGEST_ERROR]}..."


def _answer_all(
    template: str, variables: Mapping[str, object], pickled: bytes, limits: Limits
) -> list[tuple[bool, str]]:
    """Returns the answer to each call. The kernel ends the process if one takes too long."""
    groups = pickle.loads(pickled)
    # The conversations of a group may share all messages, which are pickled once.
    answers, written, allowed = [], 0, OUTPUT_PER_INPUT * len(pickled) * max(map(len, groups), default=0)
    timer_ends = 0.0
    for call in itertools.chain.from_iterable(groups):
        # The timer counts processor time, which is at most the time that passes. Starting it takes a system call.
        if (now := time.perf_counter()) >= timer_ends:
            signal.setitimer(signal.ITIMER_PROF, limits.seconds)
            timer_ends = now + limits.seconds / 4
        answers.append(_answer(template, variables, call))
        written, allowed = written + len(answers[-1][1]), allowed + limits.output + len(template)
        if written > allowed:
            os._exit(OUTPUT_REACHED)
    signal.setitimer(signal.ITIMER_PROF, 0)
    return answers


def _reply(answers: Sequence[tuple[bool, str]]) -> bytes:
    texts = [text for _, text in answers]
    content = "".join(texts).encode(*ENCODING)
    failed = bytes([is_error for is_error, _ in answers])
    lengths = array.array(LENGTHS, map(len, texts)).tobytes()
    return b"".join([HEADER.pack(len(texts), len(content)), failed, lengths, content])


def _serve(requests: BinaryIO, replies: BinaryIO, limits: Limits) -> None:
    """Answers requests until their end."""
    while True:
        try:
            template, variables, pickled = pickle.load(requests)
        except EOFError:
            return
        replies.write(_reply(_answer_all(template, variables, pickled, limits)))
        replies.flush()


def main(seconds: str, memory: str, output: str) -> None:
    """Runs the process with the fields of Limits."""
    limits = Limits(float(seconds), int(memory), int(output))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for the text
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    limit_resources({resource.RLIMIT_AS: limits.memory, resource.RLIMIT_CORE: 0})
    time.localtime()  # reads the time zone
    seal_if_possible(jinja2)  # which imports some of its modules late
    try:
        with open(sys.stdin.fileno(), "rb", buffering=_BUFFER, closefd=False) as requests:
            _serve(requests, sys.stdout.buffer, limits)
    except MemoryError:
        os._exit(MEMORY_REACHED)
    except BrokenPipeError:  # the process that started this one was killed
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
