"""`--config FILE --section.key value` to a Config, `--help`, and user errors without a traceback."""

import dataclasses
import itertools
import json
import os
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import yaml

from qlora_jax.config.parse import UNIONS, ConfigError, decode, walk
from qlora_jax.config.schema import Config
from qlora_jax.config.validate import validate
from qlora_jax.config.yaml_files import parse_yaml, read_yaml

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
_OPENED = {"[": list, "{": dict}


def _from_text(hint: Any, text: str) -> Any:
    """A command line's text as the YAML value that the type asks for; text it stays where that fails."""
    arms = typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,)
    opened = _OPENED.get(text[:1]) in [typing.get_origin(arm) or arm for arm in arms]
    if str in arms and not (text == "null" and types.NoneType in arms) and not opened:
        return text
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return text
    return text if str in arms and not isinstance(value, list | dict | None) else value


def _split(argv: Sequence[str], switches: Mapping[str, str]) -> tuple[dict[str, str], set[str], list[str]]:
    """(settings as text, switches given, problems) of `--key value`, `--key=value` and `--switch`."""
    settings: dict[str, str] = {}
    given: set[str] = set()
    problems = []
    words = list(reversed(argv))
    while words:
        word = words.pop()
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            problems.append(f"{word}: stands alone; settings are given as --section.key value")
        elif name in switches and not equals:
            given.add(name)
        elif name in settings:
            problems.append(f"--{name}: given twice")
        elif equals or (words and not words[-1].startswith("--")):
            settings[name] = value if equals else words.pop()
        else:
            problems.append(f"--{name}: lacks a value")
    return settings, given, problems


def _merge(raw: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(raw.get(section), dict):
            raw[section] = {}
        raw = raw[section]
    raw[name] = value


def _metavar(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "{" + ",".join(arguments) + "}"
    if origin in UNIONS:
        return "|".join(_metavar(arm) for arm in arguments)
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
    # As argparse does: a head that is too long has a line of its own.
    start = f"{first}  {body[0]}" if len(first) <= _HELP_COLUMN - 2 else f"{first}\n{indent}{body[0]}"
    return "\n".join([start, *(indent + line for line in body[1:])])


def _section_title(schema: type, section: str) -> str:
    return f"{section}: {typing.get_type_hints(schema)[section].__doc__}" if section else str(schema.__doc__)


def help_text(prog: str, switches: Mapping[str, str], schema: type = Config) -> str:
    """Every setting by section: its type, what it does, its default."""
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    key = "section.key" if any("." in key for key, _, _ in walk(schema)) else "key"
    lines = [f"usage: {prog} [--config FILE] [--{key} value ...]", ""]
    lines.append(_entry("config FILE", "YAML file of the settings below; the command line wins over it", width))
    lines += [_entry(name, text, width) for name, text in switches.items()]
    for section, settings in itertools.groupby(walk(schema), lambda setting: setting[0].rpartition(".")[0]):
        lines += ["", *textwrap.wrap(_section_title(schema, section), width)]
        for key, field, hint in settings:
            lines.append(_entry(f"{key} {_metavar(hint)}", f"{field.metadata['help']} {_default(field)}", width))
    return "\n".join(lines)


def read_command_line[T](
    argv: Sequence[str],
    prog: str,
    switches: Mapping[str, str],
    schema: type[T] = Config,
    check: Callable[[T], None] = validate,
) -> tuple[T, set[str]]:
    """(the validated settings, the switches given), from a YAML file and the settings that override it.

    `switches` maps the name of a flag without a value to its help text; `check` raises ConfigError where settings
    contradict each other. `--help` prints and exits.
    """
    if {"--help", "-h"} & set(argv):
        print(help_text(prog, switches, schema))
        sys.exit(0)
    settings, given, problems = _split(argv, switches)
    raw, sources = read_yaml(settings.pop("config")) if "config" in settings else ({}, {})
    if problems:
        raise ConfigError(problems)
    hints = {key: hint for key, _, hint in walk(schema)}
    for key, text in settings.items():
        _merge(raw, key, _from_text(hints.get(key, str), text))
        sources[key] = "command line"
    settings_read = decode(schema, raw, sources)
    check(settings_read)
    return settings_read, given


def parse(argv: Sequence[str], prog: str) -> Config:
    """The validated configuration of `prog --config FILE --section.key value`; raises ConfigError."""
    return read_command_line(argv, prog, {})[0]


def _words(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def run_main(main: Callable[[list[str]], None]) -> None:
    """Runs `main(arguments)`: bad input is one message and exit code 2; QLORA_JAX_TRACEBACK=1 shows the traceback."""
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `... | head` has read enough; what is left to flush goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as error:
        if os.environ.get("QLORA_JAX_TRACEBACK") == "1":
            raise
        print(f"error: {_words(error)}", file=sys.stderr)
        sys.exit(2)
