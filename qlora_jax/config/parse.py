"""Parses plain dicts into frozen dataclasses: unknown keys and values of a wrong type are errors, reported together."""

import dataclasses
import functools
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from qlora_jax.config.registry import choices_of, registry_of
from qlora_jax.config.suggestions import (
    replacement_of,
    suggest_key,
    suggest_section,
    suggest_section_key,
    suggest_value,
)

# Where each dotted key was set, for messages: {"lora.rank": "my.yaml:3"}.
Sources = Mapping[str, str]
COMMAND_LINE = "command line"  # such a place
# An annotation such as `int | None`; Python has no type for these.
Hint = Any

# `A | B` is typing.Union if A is a Literal, types.UnionType otherwise.
UNIONS = (types.UnionType, typing.Union)

_DESCRIPTIONS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}


class ConfigError(ValueError):
    """All problems of a configuration, one line each."""

    def __init__(self, problems: list[str]):
        super().__init__("\n  ".join(["the configuration has problems:", *problems]))
        self.problems = problems


class _Mismatch(Exception):
    """A value does not have the expected type."""


def describe_type(hint: Hint) -> str:
    """The type in plain words: `describe_type(int | None)` is 'a whole number or null'."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if (choices := choices_of(hint)) is not None:
        return ("one of " if len(choices) > 1 else "") + ", ".join(choices)
    if origin in UNIONS:
        first, *others = map(describe_type, arguments)
        if choices_of(arguments[0]) is not None:  # list the choices only once
            others = [words.replace(first, "one of these") for words in others]
        return " or ".join([first, *others])
    if origin is list:
        return f"a list of {describe_type(arguments[0])}"
    if origin is dict:
        return f"a mapping of {describe_type(arguments[0])} to {describe_type(arguments[1])}"
    return _DESCRIPTIONS[hint]


def _has_float(number: int | float) -> bool:
    """True if the number is finite, and not a whole number that is too large for a float."""
    return abs(number) <= sys.float_info.max


def _convert_union(arms: tuple[Hint, ...], value: object) -> object:
    for arm in arms:
        try:
            return convert(arm, value)
        except _Mismatch:
            continue
    raise _Mismatch


def convert(hint: Hint, value: object) -> object:
    """The value as the annotated type; only whole numbers are converted, to float where one is expected."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if (origin is Literal and value in arguments) or (isinstance(value, str) and value in (registry_of(hint) or ())):
        return value
    if origin in UNIONS:
        return _convert_union(arguments, value)
    if origin is list and isinstance(value, list):
        return [convert(arguments[0], item) for item in value]
    if origin is dict and isinstance(value, Mapping):
        return {convert(arguments[0], key): convert(arguments[1], item) for key, item in value.items()}
    if origin is not None:
        raise _Mismatch
    # bool is a subclass of int, but `rank: true` must not become 1.
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and _has_float(value):
        return float(value)
    if type(value) is not hint or hint is float:
        raise _Mismatch
    return value


@functools.cache  # resolving the annotations of all settings takes tens of milliseconds
def _hints(schema: type) -> Mapping[str, Hint]:
    return typing.get_type_hints(schema, include_extras=True)


def walk_settings(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Hint]]:
    """Yields (dotted key, field, annotation) of every setting, section by section."""
    hints = _hints(schema)
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from walk_settings(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, hints[field.name]


def _value_problem(key: str, field: dataclasses.Field, hint: Hint, value: object) -> str | None:
    try:
        converted = convert(hint, value)
    except _Mismatch:
        return f"found {value!r}, expected {describe_type(hint)}{suggest_value(key, hint, value)}"
    bound = field.metadata.get("bound")
    if bound is None or converted is None or bound.holds(converted):
        return None
    return f"found {value!r}, expected {bound.description}"


def _flatten(raw: Mapping[str, object], sections: frozenset[str], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields (dotted key, value); a mapping that is not a section is a value."""
    for name, value in raw.items():
        key = f"{prefix}{name}"
        if key in sections and isinstance(value, Mapping):
            yield from _flatten(value, sections, f"{key}.")
        elif key not in sections or value is not None:  # YAML reads a section with every line commented out as null
            yield key, value


@functools.cache  # asked for with each key of a file
def _sections(schema: type) -> frozenset[str]:
    keys = [key for key, _, _ in walk_settings(schema)]
    return frozenset(key[:i] for key in keys for i, letter in enumerate(key) if letter == ".")


def is_required(field: dataclasses.Field) -> bool:
    """True if the field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def find_problems(schema: type, raw: Mapping[str, object], sources: Sources) -> list[str]:
    """Unknown keys, missing keys, and values of a wrong type or out of bounds, one line each."""
    return given_problems(schema, raw, sources) + _missing_problems(schema, raw)


def given_problems(schema: type, raw: Mapping[str, object], sources: Sources) -> list[str]:
    """Unknown keys, and values of a wrong type or out of bounds, one line each."""
    settings = {key: (field, hint) for key, field, hint in walk_settings(schema)}
    values = dict(_flatten(raw, _sections(schema)))
    problems = []
    for key, value in values.items():
        place = f" ({sources[key]})" if key in sources else ""
        if key in _sections(schema):
            near = suggest_section_key(key, list(settings))
            problems.append(f"{key}: found {value!r}, expected a section with settings below it{near}{place}")
        elif key not in settings:
            suggest = suggest_section if isinstance(value, Mapping) else suggest_key
            problems.append(f"{key}: unknown setting{suggest(key, list(settings))}{place}")
        elif settings[key][0].metadata.get("command_line") and sources.get(key, COMMAND_LINE) != COMMAND_LINE:
            problems.append(f"{key}: files cannot set it, because it names code to run{place}. Write --{key} instead")
        elif problem := _value_problem(key, *settings[key], value):
            problems.append(f"{key}: {problem}{place}")
    return problems


def _missing_problems(schema: type, raw: Mapping[str, object]) -> list[str]:
    """Missing keys, except those that replace an unknown key."""
    settings = {key: field for key, field, _ in walk_settings(schema)}
    values = dict(_flatten(raw, _sections(schema)))
    replaced = [replacement_of(key, list(settings)) for key in values if key not in settings]
    found = {*values, *(replacement.key for replacement in replaced if replacement)}
    return [
        f"{key}: missing (expected: {field.metadata['help']})"
        for key, field in settings.items()
        if key not in found and is_required(field)
    ]


def _build[T](schema: type[T], raw: Mapping[str, Any]) -> T:
    hints, arguments = _hints(schema), {}
    for field in dataclasses.fields(schema):  # pyright: ignore[reportArgumentType]
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            arguments[field.name] = _build(typing.cast(type, hint), raw.get(field.name) or {})
        elif field.name in raw:
            arguments[field.name] = convert(hint, raw[field.name])
    make: Callable[..., T] = schema
    return make(**arguments)


def from_dict[T](schema: type[T], raw: Mapping[str, object], sources: Sources = types.MappingProxyType({})) -> T:
    """The dataclass that a nested dict describes.

    Raises:
      ConfigError: the dict has unknown keys, lacks keys, or has values of a wrong type or out of bounds.
    """
    if problems := find_problems(schema, raw, sources):
        raise ConfigError(problems)
    return _build(schema, raw)


_PART = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")
_EXPECTED = "expected numbers from 0 or ranges, such as [0, 2] or 8-15,20"


def parse_layers(value: int | list[int] | str) -> tuple[int, ...]:
    """Returns the numbers in ascending order, each once; both ends of a range belong to it.

    Raises:
      ValueError: malformed, empty, or a number below 0.
    """
    if isinstance(value, str):
        numbers = [number for part in value.split(",") for number in _range_of(part, value)]
    else:
        numbers = value if isinstance(value, list) else [value]
    if not numbers or min(numbers) < 0:
        raise ValueError(f"found {value!r}, {_EXPECTED}")
    return tuple(sorted(set(numbers)))


def _range_of(part: str, whole: str) -> range:
    match = _PART.fullmatch(part)
    if match is None:
        raise ValueError(f"found {whole!r}, {_EXPECTED}")
    first = int(match[1])
    last = int(match[2] or first)
    if last < first:
        raise ValueError(f"found the range {part.strip()} in {whole!r}, expected its lower end first")
    return range(first, last + 1)
