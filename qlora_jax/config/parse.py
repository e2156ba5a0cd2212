"""Plain dicts to frozen dataclasses and back, strictly: no key is ignored and no value bent; all problems at once."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from qlora_jax.config.suggestions import CHOICES, SYNONYMS

# Where a dotted key was set, for messages: {"lora.rank": "my.yaml:3"}.
Sources = Mapping[str, str]

# `A | B` is of the second kind where A is a Literal.
UNIONS = (types.UnionType, typing.Union)

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one line each."""

    def __init__(self, problems: list[str]):
        super().__init__("\n  ".join(["the configuration has problems:", *problems]))
        self.problems = problems


class _Mismatch(Exception):
    """A value is not of the type it should be."""


def expected(hint: Any) -> str:
    """The type in words: `expected(int | None)` is 'a whole number or null'."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin in UNIONS:
        first, *others = map(expected, arguments)
        if typing.get_origin(arguments[0]) is Literal:  # long lists are told once
            others = [words.replace(first, "one of these") for words in others]
        return " or ".join([first, *others])
    if origin is list:
        return f"a list of {expected(arguments[0])}"
    if origin is dict:
        return f"a mapping of {expected(arguments[0])} to {expected(arguments[1])}"
    return _WORDS[hint]


def _convert_scalar(hint: type, value: Any) -> Any:
    # bool is a subclass of int: `rank: true` must not pass for 1.
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if type(value) is not hint or hint is float:
        raise _Mismatch
    return value


def _convert_union(arms: tuple[Any, ...], value: Any) -> Any:
    for arm in arms:
        try:
            return convert(arm, value)
        except _Mismatch:
            continue
    raise _Mismatch


def convert(hint: Any, value: Any) -> Any:
    """The value as the type of the annotation; the only change ever made is int to float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal and value in arguments:
        return value
    if origin in UNIONS:
        return _convert_union(arguments, value)
    if origin is list and isinstance(value, list):
        return [convert(arguments[0], item) for item in value]
    if origin is dict and isinstance(value, Mapping):
        return {convert(arguments[0], key): convert(arguments[1], item) for key, item in value.items()}
    if origin is not None:
        raise _Mismatch
    return _convert_scalar(hint, value)


def walk(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """(dotted key, field, type) of every setting, sections flattened."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from walk(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, hints[field.name]


def _suggestion(key: str, known: list[str]) -> str:
    """Names are compared by their last part alone: a section that two share makes them no more alike."""
    last = key.rpartition(".")[2]
    same_name = [name for name in known if name.rpartition(".")[2] == last]
    synonym = [SYNONYMS[last]] if SYNONYMS.get(last) in known else []
    by_last = {name.rpartition(".")[2]: name for name in known}
    near = same_name or synonym or [by_last[word] for word in difflib.get_close_matches(last, by_last, n=1)]
    return f"; did you mean {near[0]}?" if near else "; --help lists all keys"


def _near_choices(value: str, choices: tuple[Any, ...]) -> list[str]:
    value = value.lower()
    synonym = CHOICES.get(value)
    return [synonym] if synonym is not None and synonym in choices else difflib.get_close_matches(value, choices, n=1)


def _choices(hint: Any) -> tuple[str, ...]:
    """The words that the type, or an arm of it, is one of."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return next((_choices(arm) for arm in typing.get_args(hint) if typing.get_origin(arm) is Literal), ())


def _nearest_value(hint: Any, value: Any) -> str:
    """What was probably meant by a value of another type, as the end of a message; empty where nothing is near."""
    near = _near_choices(str(value), _choices(hint))
    if isinstance(value, str) and any(typing.get_origin(arm) is list for arm in (hint, *typing.get_args(hint))):
        near = [f"[{(near or [value])[0]}]"]
    if near:
        return f"; did you mean {near[0]}?"
    return "; it is one value, with no settings below it" if isinstance(value, Mapping) else ""


def _value_problem(field: dataclasses.Field, hint: Any, value: Any) -> str | None:
    try:
        converted = convert(hint, value)
    except _Mismatch:
        return f"found {value!r}, expected {expected(hint)}{_nearest_value(hint, value)}"
    bound = field.metadata.get("bound")
    if bound is None or converted is None or bound.holds(converted):
        return None
    return f"found {value!r}, expected {bound.words}"


def _flatten(raw: Mapping[Any, Any], sections: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value), going down into sections only: the mappings below them are values."""
    for name, value in raw.items():
        key = f"{prefix}{name}"
        if key in sections and isinstance(value, Mapping):
            yield from _flatten(value, sections, f"{key}.")
        elif key not in sections or value is not None:  # a section with every line commented out is null
            yield key, value


def _sections(schema: type) -> set[str]:
    keys = [key for key, _, _ in walk(schema)]
    return {key[:i] for key in keys for i, letter in enumerate(key) if letter == "."}


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def find_problems(schema: type, raw: Mapping[str, Any], sources: Sources) -> list[str]:
    """Unknown keys, missing keys, values of a wrong type or out of bounds: one line each."""
    settings = {key: (field, hint) for key, field, hint in walk(schema)}
    values = dict(_flatten(raw, _sections(schema)))
    problems = []
    for key, value in values.items():
        place = f" ({sources[key]})" if key in sources else ""
        if key in _sections(schema):
            problems.append(f"{key}: found {value!r}, expected a section with settings below it{place}")
        elif key not in settings:
            problems.append(f"{key}: unknown key{_suggestion(key, list(settings))}{place}")
        elif problem := _value_problem(*settings[key], value):
            problems.append(f"{key}: {problem}{place}")
    for key, (field, _) in settings.items():
        if key not in values and _is_required(field):
            problems.append(f"{key}: missing (expected: {field.metadata['help']})")
    return problems


def _build(schema: Any, raw: Mapping[str, Any]) -> Any:
    hints, arguments = typing.get_type_hints(schema), {}
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            arguments[field.name] = _build(hint, raw.get(field.name) or {})
        elif field.name in raw:
            arguments[field.name] = convert(hint, raw[field.name])
    return schema(**arguments)


def decode[T](schema: type[T], raw: Mapping[str, Any], sources: Sources = types.MappingProxyType({})) -> T:
    """The dataclass that a nested dict describes; raises ConfigError with every problem."""
    if problems := find_problems(schema, raw, sources):
        raise ConfigError(problems)
    return _build(schema, raw)
