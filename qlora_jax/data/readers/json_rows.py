"""Reads rows of JSON text, one per line or the elements of one array, each with its line number."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

JSONObject = Mapping[str, Any]  # decoded JSON of unknown content: row formats check the types of its values

SPACE = " \t\r\n"


def describe_json_error(error: json.JSONDecodeError) -> str:
    """Returns the problem of JSON text and its column. Some messages of the json library already end with "at"."""
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


class BadValue(NamedTuple):
    """A value that can't be read.

    Fields:
      ends_file: True if the rows after it can't be read either.
    """

    problem: str
    ends_file: bool = False


def json_lines(file: Iterable[str]) -> Iterator[tuple[int, object]]:
    """Yields (line, value) of each line that is not blank."""
    for line, content in enumerate(file, start=1):
        if content.strip(SPACE):
            try:
                yield line, json.loads(content)
            except json.JSONDecodeError as error:
                yield line, BadValue(f"not JSON: {describe_json_error(error)}: {shorten(content.rstrip(SPACE))}")
            except (ValueError, RecursionError) as error:
                yield (
                    line,
                    BadValue(f"can't be read: {error}"),
                )  # nested too deeply, or a number with thousands of digits


def json_array(text: str) -> Iterator[tuple[int, object]]:
    """Yields (line, value) of each element. Decodes one at a time, because json.loads does not report lines."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    at = _skip(text, text.index("[") + 1)
    while not text.startswith("]", at):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
            yield line, value
            at = _next_element(text, _skip(text, at))
        except json.JSONDecodeError as error:
            yield error.lineno, BadValue(f"not JSON: {describe_json_error(error)}; reading stops there", True)
            return
        except (ValueError, RecursionError) as error:
            yield line, BadValue(f"can't be read: {error}; reading stops there", True)
            return
    rest = _skip(text, at + 1)
    if rest < len(text):
        found = shorten(text[rest:])
        problem = BadValue(f"more text after the end of the array: {found}", True)
        yield line + text.count("\n", counted, rest), problem


def _next_element(text: str, at: int) -> int:
    """Returns the position of the next element after the comma at `at`, or of the closing bracket."""
    if text.startswith("]", at):
        return at
    if not text.startswith(",", at):
        raise json.JSONDecodeError("expected ',' or ']' after an element of the array", text, at)
    at = _skip(text, at + 1)
    if text.startswith("]", at):
        raise json.JSONDecodeError("expected a row after the comma", text, at)
    return at


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in SPACE:
        at += 1
    return at


def shorten(text: str) -> str:
    """Returns the text, or the first 57 characters of a long one and "..."."""
    return text if len(text) <= 60 else f"{text[:57]}..."
