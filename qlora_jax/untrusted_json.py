"""Decodes JSON metadata of unknown origin into typed structures, and reports every problem of a file at once.

Metadata are configs of models, tokenizers and adapters, indices and headers of weights, and the records of a run. Size
and depth are checked before anything is decoded. Training rows have their own reader (data/readers/json_rows.py).
"""

import collections
import functools
import itertools
import json
import os
import re
import reprlib
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, TypedDict

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

MAX_DEPTH = 200  # levels of objects and lists
MAX_BYTES = 4 << 20  # largest metadata file
MAX_LINES = 20  # problems listed in one error
MAX_KEY = 200  # characters of one key
MAX_PROBLEMS = 1000  # counted in one error

type Count = Annotated[int, Field(ge=1, lt=2**31)]
type Offset = Annotated[int, Field(ge=0, lt=2**53)]  # bytes in a file, or rows of an array

JsonObject = dict[str, Any]  # a decoded JSON object of unknown content, whose values the reader checks
Kind = Any  # an annotation that pydantic knows: Python has no type for these
FileName = str | os.PathLike
# Texts for pydantic's types of errors; {} is filled in from the error's context.
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "extra_forbidden": "no field of this name. Remove it",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_type": "an object",
    "none_required": "null",
    "string_too_long": "at most {max_length} characters",
    "string_type": "text",
    "too_long": "at most {max_length} elements",
    "too_short": "{min_length} or more elements",
    "typed_dict_type": "an object",
}
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'[]{}:"'))
_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_FEW_ESCAPES = 100  # bytes for each escape, at least
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}

_shortened = reprlib.Repr(maxstring=60, maxother=60, maxlist=4, maxdict=4, maxlevel=3)


class MetadataError(ValueError):
    """All problems of one metadata file."""


def read_json[T](path: FileName, kind: type[T] | GenericAlias, max_bytes: int = MAX_BYTES) -> T:
    """Reads a JSON file of a type.

    Args:
      kind: a TypedDict, or a list or dict of them. Unknown keys of a TypedDict are dropped, unless it allows them.

    Raises:
      MetadataError: the file is too large, not JSON, nested too deeply, or has values of other types.
    """
    return decode_json(read_bytes(path, max_bytes), kind, path)


def read_text(path: FileName, max_bytes: int = MAX_BYTES) -> str:
    """Reads a text file.

    Raises:
      MetadataError: the file is too large or not UTF-8.
    """
    _check_size(path, max_bytes)
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MetadataError(_not_utf8(path, error)) from None


def read_bytes(path: FileName, max_bytes: int = MAX_BYTES) -> bytes:
    """Reads a file; raises MetadataError if it is too large."""
    _check_size(path, max_bytes)
    return Path(path).read_bytes()


def decode_text(content: bytes, name: FileName) -> str:
    """Returns the text of a file's bytes; raises MetadataError if it is not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MetadataError(_not_utf8(name, error)) from None


def decode_json[T](content: str | bytes, kind: type[T] | GenericAlias, name: FileName) -> T:
    """Decodes JSON text into a value of type `kind`.

    A key that an object has twice is an error. NaN and Infinity are numbers, as in Python's json module.

    Args:
      name: the file, for messages.

    Raises:
      MetadataError: not JSON, nested too deeply, or values of other types; all of them are listed.
    """
    text = content if isinstance(content, str) else decode_text(content, name)
    structure = _structure(_to_bytes(content))
    if _depth(structure) > MAX_DEPTH:
        raise MetadataError(
            f"{name}: nested too deeply (found more than {MAX_DEPTH} levels of lists and objects). Download it again."
        )
    return check_value(_loads(text, structure.count(b":"), name), kind, name)


def check_value[T](value: object, kind: type[T] | GenericAlias, name: FileName) -> T:
    """Returns a decoded value as the type `kind`; a whole number becomes a float where one is expected.

    Raises:
      MetadataError: lists all values of other types.
    """
    try:
        return _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        problems = _problems(value, _first_errors(error))
    raise MetadataError(_message(name, problems))


def find_problems(value: object, kind: Kind, key: str = "") -> list[str]:
    """Returns one line for each part of a decoded value that does not have the type `kind`.

    Args:
      key: the value's key, which starts each line.
    """
    try:
        _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        return _problems(value, _first_errors(error), key)
    return []


def is_too_deep(content: str | bytes) -> bool:
    """Returns True if JSON text has more than MAX_DEPTH levels. It is not decoded, and the time is linear."""
    if isinstance(content, str):
        few = content.count("[") + content.count("{") <= MAX_DEPTH
    else:
        few = content.count(b"[") + content.count(b"{") <= MAX_DEPTH
    return not few and _depth(_structure(_to_bytes(content))) > MAX_DEPTH


def _to_bytes(content: str | bytes) -> bytes:
    return content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content


def _structure(data: bytes) -> bytes:
    """Returns the brackets and colons of JSON text that are outside of strings."""
    # All of it runs in C. Without escapes, each quote begins or ends a string, also after two adjacent ones are
    # removed. Every other piece between quotes is then outside of strings.
    quoted = _without_escapes(data).translate(None, _NOT_STRUCTURE).replace(b'""', b"")
    return b"".join(quoted.split(b'"')[::2])


def _depth(structure: bytes) -> int:
    """Returns the greatest number of open brackets."""
    brackets = structure.replace(b":", b"")
    for pair in (b"[]", b"{}"):  # one is enough of neighbours without inner levels, such as a vocabulary's merges
        while pair * 2 in brackets:
            brackets = brackets.replace(pair * 2, pair)
    return max(itertools.accumulate(map(_STEP.__getitem__, brackets)), default=0)


def _without_escapes(data: bytes) -> bytes:
    """Returns the data without its pairs of a backslash and a character, or without the pairs that matter to quotes."""
    if data.count(b"\\") * _FEW_ESCAPES < len(data):  # then the search for a backslash is the fastest
        return _ESCAPE.sub(b"", data)
    return data.replace(rb"\\", b"").replace(rb"\"", b"")


def shorten(value: object) -> str:
    """Returns the value as Python writes it, or the beginning of a long one."""
    return _shortened.repr(value)


def shorten_key(key: object) -> str:
    """Returns the text of a key, or the beginning of a long one."""
    text = str(key)
    return text if len(text) <= MAX_KEY else f"{text[:MAX_KEY]}..."


@functools.cache
def _adapter(kind: Kind) -> TypeAdapter:
    return TypeAdapter(kind)


def _loads(text: str, pairs: int, name: FileName) -> object:
    """Decodes JSON text with `pairs` colons outside of strings; fewer keys than that show that one is repeated."""
    keys = 0

    def count(found: dict[str, object]) -> dict[str, object]:
        nonlocal keys
        keys += len(found)
        return found

    try:
        value = json.loads(text, object_hook=count)
        # An object has a key once, so a repeated one is not counted. It is looked for only then, which takes time.
        return value if keys == pairs else json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        problem = f"{name}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
    except _RepeatedKeys as error:
        problem = f"{name}: keys that occur twice in one object: {error}. Remove one of each"
    except ValueError as error:  # a number of thousands of digits
        problem = f"{name}: not JSON: {error}"
    raise MetadataError(f"{problem}. Correct the file or download it again.")


def _check_size(path: FileName, max_bytes: int) -> None:
    size = Path(path).stat().st_size
    if size > max_bytes:
        raise MetadataError(
            f"{path}: too large for a metadata file (found {size} bytes, expected at most {max_bytes}). "
            "Download it again, or check that it is the right file."
        )


def _not_utf8(name: FileName, error: UnicodeDecodeError) -> str:
    return f"{name}: not UTF-8 text at byte {error.start}. Correct the file or download it again."


class _RepeatedKeys(Exception):
    """The keys that one object has twice."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        raise _RepeatedKeys(", ".join([shorten(key) for key in found if counts[key] > 1][:MAX_LINES]))
    return found


def _message(name: FileName, problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return f"{name}: {problems[0]}. Correct it, or download the file again."
    more = [f"and {len(problems) - MAX_LINES} more"] if len(problems) > MAX_LINES else []
    lines = "\n".join(f"  {problem}" for problem in [*problems[:MAX_LINES], *more])
    count = f"{MAX_PROBLEMS} or more" if len(problems) >= MAX_PROBLEMS else len(problems)
    return f"{name}: {count} values are wrong. Correct them, or download the file again:\n{lines}"


def _first_errors(error: ValidationError) -> list[ErrorDetails]:
    return error.errors(include_url=False, include_input=False)[:MAX_PROBLEMS]


class _Problem(TypedDict):
    """The expectations that one part of a value does not meet."""

    expected: list[str]
    found: str


def _problems(value: object, errors: Sequence[ErrorDetails], key: str = "") -> list[str]:
    """Returns a line per key; the expectations of a union's members are joined."""
    by_path: dict[tuple[str | int, ...], _Problem] = {}
    for error in errors:
        path, found = _locate(value, error["loc"], missing=error["type"] == "missing")
        problem = by_path.setdefault(path, {"expected": [], "found": found})
        text = _EXPECTED.get(error["type"])
        expected = error["msg"] if text is None else text.format(**error.get("ctx", {}))
        if expected not in problem["expected"]:
            problem["expected"].append(expected)
    inner = {path[:end] for path in by_path for end in range(len(path))}
    # A member of a union that got further says more than one that failed at once.
    start = [key] if key else []
    return [
        _line(".".join([*start, *map(shorten_key, path)]), problem)
        for path, problem in by_path.items()
        if path not in inner
    ]


def _line(key: str, problem: _Problem) -> str:
    start = f"{key}: " if key else ""
    if not problem["found"]:
        return f"{start}missing"
    return f"{start}found {problem['found']}, expected {' or '.join(problem['expected'])}"


def _locate(value: Any, place: Sequence[str | int], missing: bool) -> tuple[tuple[str | int, ...], str]:
    """Returns (the keys that lead to an error, the value there); names of a union's members are left out."""
    path: list[str | int] = []
    for step in place[:-1] if missing else place:
        if step in _keys_of(value):
            value = value[step]
            path.append(step)
    return (*path, place[-1]) if missing else tuple(path), "" if missing else shorten(value)


def _keys_of(value: object) -> Container[str | int]:
    return value if isinstance(value, Mapping) else range(len(value)) if isinstance(value, list) else ()
