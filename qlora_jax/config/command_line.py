"""Reads the command lines of all commands: `--config FILE --section.key value --flag`, `--help`, and user errors."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import sys
import textwrap
import threading
import types
import typing
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import yaml

from qlora_jax.atomic_files import write_error
from qlora_jax.config.parse import (
    COMMAND_LINE,
    UNIONS,
    ConfigError,
    Hint,
    from_dict,
    given_problems,
    is_required,
    walk_settings,
)
from qlora_jax.config.registry import choices_of
from qlora_jax.config.schema import Config
from qlora_jax.config.validate import validate
from qlora_jax.config.yaml_files import parse_yaml, read_yaml
from qlora_jax.terminal.visible import fit_to_print
from qlora_jax.untrusted_json import JsonObject

# `--model X` is `--model.path X` where there is such a setting.
SHORT_NAMES = {"model": "model.path"}
ALL = "all"  # `--help all`

SIGNALLED = 128  # plus the number of the signal that ended a command: its exit code, as in shells
AFTER_IMPORT_SECONDS = 0.1  # until a signal that came during an import is sent again

_HELP_COLUMN = 34
_METAVARS = {
    bool: "true|false",
    int: "INT",
    float: "NUMBER",
    str: "TEXT",
    types.NoneType: "null",
    list: "LIST",
    dict: "MAPPING",
}
_SEVERAL_FILES = "write several with weights: --data.train '{a.jsonl: 1, b.jsonl: 1}'"
_BRACKETS = {"[": list, "{": dict}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command[T]:
    """The command-line interface of one command.

    Attributes:
      name: of its module, `train` for `qlora-jax train`.
      summary: one sentence for `--help` and for the list of commands.
      example: arguments of a typical call.
      schema: the dataclass of its settings.
      check: raises ConfigError if settings contradict each other.
      flags: name and help text of each option without a value.
      common: settings that `--help` lists next to those that the schema marks; without any, it lists all.
      positional: the option whose value may come first, without its name.
    """

    name: str
    summary: str
    example: str
    schema: type[T]
    check: Callable[[T], None] = lambda settings: None
    flags: Mapping[str, str] = types.MappingProxyType({})
    common: Collection[str] = ()
    positional: str | None = None

    @property
    def prog(self) -> str:
        """The shell command without arguments; `python -m ...` if it was started as a module."""
        module, main = f"qlora_jax.{self.name}", sys.modules["__main__"].__spec__
        return f"python -m {module}" if main is not None and main.name == module else f"qlora-jax {self.name}"

    def read(self, argv: Sequence[str]) -> tuple[T, set[str]]:
        """Returns (the validated settings, the names of the flags given); `--help` prints and exits.

        Raises:
          ConfigError: a malformed argument, an unknown setting, a wrong value, or settings that contradict each other.
        """
        if {"--help", "-h"} & set(argv):
            print(help_text(self, every=ALL in argv))
            sys.exit(0)
        named = [f"--{self.positional}"] if self.positional and argv and not argv[0].startswith("-") else []
        settings, flags = read_settings(self.schema, [*named, *argv], self.flags)
        self.check(settings)
        return settings, flags


def read_settings[T](
    schema: type[T], argv: Sequence[str], flags: Mapping[str, str] = types.MappingProxyType({})
) -> tuple[T, set[str]]:
    """Returns (the settings of `--config FILE --key value ...`, the names of the flags given).

    Settings on the command line override those in the YAML file.

    Raises:
      ConfigError: a malformed argument, an unknown setting, or a wrong value.
    """
    hints = {key: hint for key, _, hint in walk_settings(schema)}
    repeated = [key for key, field, _ in walk_settings(schema) if field.metadata.get("repeated")]
    words = _split(argv, _Names(hints, [*flags], _required(schema), repeated))
    raw, sources = read_yaml(words.settings.pop("config")) if "config" in words.settings else ({}, {})
    given = {key: _parse_value(hints.get(key, str), text) for key, text in words.settings.items()}
    for key, value in {**given, **words.lists}.items():
        _set_nested(raw, key, value)
        sources[key] = COMMAND_LINE
    if words.problems:  # a setting without its value would be missing, too
        raise ConfigError([*words.problems, *given_problems(schema, raw, sources)])
    return from_dict(schema, raw, sources), words.flags


def read_arguments(argv: Sequence[str]) -> Config:
    """The validated configuration of a training run, from `--config FILE --section.key value`.

    Raises:
      ConfigError: a malformed argument, an unknown setting, a wrong value, or settings that contradict each other.
    """
    config, _ = read_settings(Config, argv)
    validate(config)
    return config


class _Names(NamedTuple):
    """The names that a command line may use; `repeated` are those of lists whose elements are given one by one."""

    settings: Mapping[str, Hint]
    flags: list[str]
    required: list[str]
    repeated: list[str]

    def full(self, name: str) -> str:
        """The setting that `name` stands for."""
        full = SHORT_NAMES.get(name, name)
        return full if full in self.settings else name

    def underscored(self, name: str) -> str | None:
        """The new form of a hyphenated option, without its value; None for any other name."""
        fixed = name.replace("-", "_")
        if fixed == name:
            return None
        if fixed in (*self.settings, *self.flags):
            return f"--{fixed}"
        negated = fixed.removeprefix("no_")
        return f"--{negated} false" if negated in self.settings else None

    def example(self, key: str) -> str | None:
        """A value for a setting; None for an unknown name."""
        if key not in self.settings and key != "config":
            return None
        return "true" if self.settings.get(key) is bool else "VALUE"


class _Words(NamedTuple):
    """A command line, split: settings as text, lists of texts by their setting, flags, and problems."""

    settings: dict[str, str]
    lists: dict[str, list[str]]
    flags: set[str]
    problems: list[str]


def _required(schema: type) -> list[str]:
    return [key for key, field, _ in walk_settings(schema) if is_required(field)]


def _split(argv: Sequence[str], names: _Names) -> _Words:
    """Splits `--key value`, `--key=value` and `--flag`."""
    found = _Words({}, {}, set(), [])
    words, before = list(reversed(argv)), None
    while words:
        word = words.pop()
        name, equals, value = word.removeprefix("--").partition("=")
        key = names.full(name)
        is_alone = not equals and (not words or words[-1].startswith("--"))
        if not word.startswith("--"):
            found.problems.append(f"{word}: {_nameless(word, before, names, found)}")
            continue
        if fixed := names.underscored(name):
            found.problems.append(f"--{name}: names have underscores; write {fixed}")
            if not (is_alone or equals):
                words.pop()
        elif name in names.flags and not equals:
            found.flags.add(name)
        elif key in found.settings:
            found.problems.append(f"--{name}: given twice{f'; {_SEVERAL_FILES}' if key == 'data.train' else ''}")
            if not (is_alone or equals):
                words.pop()
        elif is_alone and (example := names.example(key)):
            found.problems.append(f"--{name}: its value is missing; write --{name} {example}")
        elif key in names.repeated:
            found.lists.setdefault(key, []).append(value if equals else words.pop())
        else:  # an unknown name without a value may be a flag of another trainer
            found.settings[key] = value if equals else "" if is_alone else words.pop()
        before = key
    return found


def _nameless(word: str, before: str | None, names: _Names, found: _Words) -> str:
    """The problem of a value that follows the value of the setting `before`, or nothing."""
    if before == "data.train":
        return f"found a second file; {_SEVERAL_FILES}"
    missing = [each for each in names.required if each not in found.settings]
    return f"found a value without a name; write --{missing[0] if missing else 'name'} {word}"


def _parse_value(hint: Hint, text: str) -> object:
    """The YAML value that the annotation asks for; the text itself if it is not valid YAML."""
    arms = typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,)
    is_collection = _BRACKETS.get(text[:1]) in [typing.get_origin(arm) or arm for arm in arms]
    if str in arms and not (text == "null" and types.NoneType in arms) and not is_collection:
        return text
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return text
    return text if str in arms and not isinstance(value, list | dict | None) else value


def _set_nested(raw: JsonObject, key: str, value: object) -> None:
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(raw.get(section), dict):
            raw[section] = {}
        raw = raw[section]
    raw[name] = value


def help_text(command: Command, *, every: bool = False) -> str:
    """The text of `--help`: usage, an example, flags and common settings; with `every`, all settings."""
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    settings = list(walk_settings(command.schema))
    common = [] if every else _common_settings(command)
    key = "section.key" if any("." in key for key, _, _ in settings) else "key"
    lines = [f"usage: {command.prog} [--config FILE] [--{key} value ...]", ""]
    lines += [*textwrap.wrap(command.summary, width), "", "example:"]
    lines += [f"  {command.prog} {command.example}", ""]
    lines.append(_entry("config FILE", "YAML file of settings; the command line overrides it", width))
    lines += [_entry(name, text, width) for name, text in command.flags.items()]
    if not common:
        return "\n".join([*lines, *_sections_text(command.schema, width)])
    lines += ["", "common settings:"]
    for key, field, _ in common:
        name = next((short for short, full in SHORT_NAMES.items() if full == key), key)
        text = field.metadata["common"] or field.metadata["help"]
        lines.append(_entry(name, f"{text} {_default(field)}", width))
    return "\n".join([*lines, "", f"--help all lists all {len(settings)} settings."])


def _common_settings(command: Command) -> list[tuple[str, dataclasses.Field, Hint]]:
    settings = walk_settings(command.schema)
    return [(key, field, hint) for key, field, hint in settings if field.metadata["common"] or key in command.common]


def _sections_text(schema: type, width: int) -> list[str]:
    lines = []
    by_section = itertools.groupby(walk_settings(schema), lambda setting: setting[0].rpartition(".")[0])
    for section, settings in by_section:
        lines += ["", *textwrap.wrap(_section_title(schema, section), width)]
        for key, field, hint in settings:
            lines.append(_entry(f"{key} {_metavar(hint)}", f"{field.metadata['help']} {_default(field)}", width))
    return lines


def _section_title(schema: type, section: str) -> str:
    return f"{section}: {typing.get_type_hints(schema)[section].__doc__}" if section else str(schema.__doc__)


def _metavar(hint: Hint) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if (choices := choices_of(hint)) is not None:
        return "{" + ",".join(choices) + "}"
    if origin in UNIONS:
        return "|".join(dict.fromkeys(map(_metavar, arguments)))
    return _METAVARS[origin or hint]


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"[{field.default if isinstance(field.default, str) else json.dumps(field.default)}]"
    if field.default_factory is not dataclasses.MISSING:
        return f"[{json.dumps(field.default_factory())}]"
    return "(required)"


def _entry(head: str, text: str, width: int) -> str:
    body = textwrap.wrap(text, width - _HELP_COLUMN, break_on_hyphens=False)
    indent = " " * _HELP_COLUMN
    if len(f"  --{head}") > width:  # many choices
        head = textwrap.fill(head.replace(",", ", "), width, initial_indent=" " * 4, subsequent_indent=indent).strip()
    first = f"  --{head}".ljust(_HELP_COLUMN - 2)
    # Same layout as argparse: a head that is too long gets its own line.
    start = f"{first}  {body[0]}" if len(first) <= _HELP_COLUMN - 2 else f"{first}\n{indent}{body[0]}"
    return "\n".join([start, *(indent + line for line in body[1:])])


def _message(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _run(main: Callable[[list[str]], None], argv: Sequence[str]) -> None:
    """Runs `main` and flushes standard output, which may be a file on a full disk."""
    try:
        main([*argv])
    except OSError as error:
        if error.filename is None:
            _end_output("\n")  # fails with the name of standard output, if that is where the error comes from
        raise
    _end_output()


def _end_output(last: str = "") -> None:
    try:
        print(end=last, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        raise write_error(error, Path("standard output")) from error


def _drop_output() -> None:
    """Redirects standard output to nowhere, so that later flushes do not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: IO[str] | None = None,
    line: str | None = None,
) -> None:
    """Prints a warning for the user as one line; one for programmers keeps its place in the code."""
    is_for_user = issubclass(category, UserWarning | RuntimeWarning)
    text = str(message) if is_for_user else f"{filename}:{lineno}: {category.__name__}: {message}"
    print(f"warning: {fit_to_print(text)}", file=sys.stderr)


@contextlib.contextmanager
def _printed_warnings() -> Iterator[None]:
    before = warnings.showwarning
    warnings.showwarning = _print_warning
    try:
        yield
    finally:
        warnings.showwarning = before


class Terminated(SystemExit):
    """SIGTERM while a command runs: it ends as after Ctrl-C, with its files and processes in order."""


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    """Raises KeyboardInterrupt or Terminated; only after an import, because an extension module may lose either."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            again = threading.Timer(AFTER_IMPORT_SECONDS, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    raise Terminated(SIGNALLED + number)


@contextlib.contextmanager
def _raised_signals() -> Iterator[None]:
    """Makes SIGINT and SIGTERM raise exceptions, unless the program has another use for them, or ignores them."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL} if in_main_thread else {}
    before = {number: handler for number, handler in before.items() if signal.getsignal(number) == handler}
    for number in before:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_main(main: Callable[[list[str]], None], argv: Sequence[str] | None = None) -> None:
    """Runs `main(arguments)` and turns its errors into exit codes.

    Bad input prints one message and exits with 2; with QLORA_JAX_TRACEBACK=1 it shows the traceback. Ctrl-C exits with
    130, SIGTERM with 143, a reader that closes standard output with 141.

    Args:
      argv: the arguments; None for those of the process.
    """
    try:
        with _printed_warnings(), _raised_signals():
            _run(main, sys.argv[1:] if argv is None else argv)
    except BaseException as error:
        code = report_error(error)
        if code is None:
            raise
        sys.exit(code)


def report_error(error: BaseException) -> int | None:
    """Prints the error that ends a command, and returns its exit code; None if Python is to show the traceback."""
    if isinstance(error, KeyboardInterrupt | Terminated):
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        print(f"stopped by {'SIGTERM' if number == signal.SIGTERM else 'Ctrl-C'}", file=sys.stderr)
        return SIGNALLED + number
    if isinstance(error, BrokenPipeError):  # `... | head` has read enough
        _drop_output()
        return 141
    if not isinstance(error, ValueError | OSError) or os.environ.get("QLORA_JAX_TRACEBACK") == "1":
        return None
    print(f"error: {fit_to_print(_message(error))}", file=sys.stderr)
    return 2
