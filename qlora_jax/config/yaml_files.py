"""Reads and writes configurations as YAML files, and compares them by dotted key."""

import dataclasses
import functools
import operator
import os
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from qlora_jax.atomic_files import write_text
from qlora_jax.config.fields import is_left_out
from qlora_jax.config.parse import ConfigError, from_dict, walk_settings
from qlora_jax.config.schema import Config
from qlora_jax.config.validate import validate
from qlora_jax.untrusted_json import shorten

MAX_DEPTH = 100  # levels of mappings and lists
MAX_NODES = 20_000
MAX_BYTES = 1 << 20  # largest YAML file
MOST_KEYS = 20  # keys that one error lists

# YAML 1.1 reads 2e-4 as text because it has no dot; YAML 1.2 reads it as a number.
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """yaml.SafeLoader with 2e-4 as a number, `on`, `off` and dates as text, and one type of error."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        """Returns the value of a node; the library converts texts like `!!int ''` or `!!bool x` without a look."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, OverflowError) as error:
            reason = f": {error}" if isinstance(error, ValueError) else ""
            kind = node.tag.rpartition(":")[2]
            raise _error(node.start_mark, f"found {shorten(node.value)}, expected {kind}{reason}") from None

    def fetch_more_tokens(self) -> None:
        """Reads on; the library converts escapes like `"\\U00110000"` and versions without a look."""
        try:
            super().fetch_more_tokens()
        except ValueError as error:
            raise _error(self.get_mark(), str(error)) from None


class _Dumper(yaml.SafeDumper):
    """yaml.SafeDumper that quotes the text "2e-4"."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


class _OneLineDumper(_Dumper):
    """A _Dumper that escapes line breaks in texts."""


def _quoted_if_several_lines(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_OneLineDumper.add_representer(str, _quoted_if_several_lines)


def _joined_text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    """Returns a text with its pairs of surrogates joined: JSON escapes a character beyond 16 bits as such a pair."""
    text = loader.construct_scalar(node)
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise yaml.constructor.ConstructorError(None, None, "half of a surrogate pair", node.start_mark) from None


_Loader.add_constructor("tag:yaml.org,2002:str", _joined_text)
# YAML 1.1 reads `off` as false, YAML 1.2 as text, which `paging: off` means; no setting is a date object. The dumper
# quotes both.
for _letters, _type in (("oO", ":bool"), ("0123456789", ":timestamp")):
    for _letter in _letters:
        _Loader.yaml_implicit_resolvers[_letter] = [
            (tag, pattern) for tag, pattern in _Loader.yaml_implicit_resolvers[_letter] if not tag.endswith(_type)
        ]


def parse_yaml(text: str) -> object:
    """Parses a YAML value; 2e-4 is a number, `off` is text.

    Raises:
      yaml.YAMLError: not YAML; or nested too deeply, too large with its aliases copied, or an alias to itself.
    """
    return _parse(text)[1]


def _parse(text: str) -> tuple[yaml.Node | None, object]:
    """(the tree of the first document, its value)"""
    _check_size(text)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _check_size(text: str) -> None:
    """Checks depth and number of nodes before there is a tree; an alias counts as often as its nodes."""
    sizes: dict[str, int] = {}  # nodes below each anchor
    opened: list[tuple[str | None, int]] = []  # (anchor, nodes before it) of each open collection
    nodes = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in (anchor for anchor, _ in opened):
                raise _error(event.start_mark, f"alias *{event.anchor} is part of what it stands for")
            nodes += sizes.get(event.anchor, 1)  # the parser reports an undefined one
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            sizes |= {event.anchor: 1} if event.anchor else {}
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, nodes))
            nodes += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            sizes |= {anchor: nodes - before} if anchor else {}
        if len(opened) > MAX_DEPTH:
            raise _error(event.start_mark, f"nested too deeply (found more than {MAX_DEPTH} levels)")
        if nodes > MAX_NODES:
            raise _error(event.start_mark, f"too large (found more than {MAX_NODES} values, those of aliases included)")


def _error(mark: yaml.Mark, problem: str) -> yaml.YAMLError:
    return yaml.YAMLError(f"line {mark.line + 1}: {problem}")


def one_line_yaml(value: object) -> str:
    """Returns a value as YAML on one line, so that parse_yaml(one_line_yaml(value)) == value."""
    text = yaml.dump(value, Dumper=_OneLineDumper, default_flow_style=True, width=float("inf"), sort_keys=False)
    return text.removesuffix("\n")


def _keys(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, yaml.Node]]:
    """Yields (dotted key, its node); a duplicate key appears twice, but only the first time with the keys below it."""
    if isinstance(node, yaml.MappingNode):
        found = set()
        for name, value in node.value:
            key = f"{prefix}{name.value}"
            yield key, name
            if key not in found:
                yield from _keys(value, f"{key}.")
            found.add(key)


def _places(node: yaml.Node, path: str | os.PathLike) -> dict[str, str]:
    """Returns {dotted key: "file:line"}; raises ConfigError for keys that are set twice or are not text."""
    places: dict[str, str] = {}
    problems = []
    for key, name in _keys(node):
        line, kind = name.start_mark.line + 1, name.tag.rpartition(":")[2]
        if key in places:
            problems.append(f"{key}: set twice ({places[key]} and line {line}). Remove one of them")
        if kind != "str":
            problems.append(f"{key}: found a key of type {kind}, expected text ({path}:{line}). Quote it")
        places[key] = f"{path}:{line}"
    if problems:
        more = [f"{path}: {len(problems) - MOST_KEYS} more keys like these"] if len(problems) > MOST_KEYS else []
        raise ConfigError(problems[:MOST_KEYS] + more)
    return places


def read_yaml(path: str | os.PathLike) -> tuple[dict[str, object], dict[str, str]]:
    """Returns (the file's nested dict, {dotted key: "file:line"}).

    Raises:
      ConfigError: the file is too large, is not YAML, is not a mapping from text, or sets a key twice.
    """
    if (size := Path(path).stat().st_size) > MAX_BYTES:
        raise ConfigError([f"{path}: too large for settings (found {size} bytes, expected at most {MAX_BYTES})"])
    try:
        node, raw = _parse(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: not a YAML file: {' '.join(str(error).split())}"]) from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError([f"{path}: found {type(raw).__name__}, expected sections such as `lora:`"])
    return raw, _places(node, path) if node else {}


def read_config(path: str | os.PathLike) -> Config:
    """The configuration in a YAML file; raises ConfigError with all problems."""
    config = from_dict(Config, *read_yaml(path))
    validate(config)
    return config


def to_dict(config: Config) -> dict[str, object]:
    """The configuration as nested plain dicts, including defaults but for those of later settings and sections."""
    whole = dataclasses.asdict(config)
    for key, field, _ in walk_settings(type(config)):
        if is_left_out(field, _value(config, key)):
            *sections, name = key.split(".")
            functools.reduce(operator.getitem, sections, whole).pop(name)
    sections = [field for field in dataclasses.fields(config) if field.name in whole]
    return {each.name: whole[each.name] for each in sections if not is_left_out(each, getattr(config, each.name))}


def config_text(config: Config) -> str:
    """The configuration as YAML, including defaults."""
    # allow_unicode would write some Unicode line ends unescaped, which YAML reads back as spaces.
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False)


def write_config(config: Config, path: str | os.PathLike) -> None:
    """Writes all settings, including defaults, so that read_config(path) == config."""
    write_text(Path(path), config_text(config))


def _value(config: Config, key: str) -> object:
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def differences(a: Config, b: Config) -> dict[str, tuple[object, object]]:
    """{dotted key: (value in a, value in b)} of the settings of files that differ, in the order of the schema."""
    keys = [key for key, field, _ in walk_settings(Config) if not field.metadata.get("command_line")]
    pairs = {key: (_value(a, key), _value(b, key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
