"""Rows of JSON text: one a line, or the elements of one array, each with its line."""

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

SPACE = " \t\r\n"


def describe_json_error(error: json.JSONDecodeError) -> str:
    """What is wrong with JSON text, and in which column; some of the messages end with a word of their own for it."""
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


class BadValue(NamedTuple):
    """Stands for a row that can't be read."""

    problem: str


def json_lines(file: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """(line, value) of each line that is not blank."""
    for line, content in enumerate(file, start=1):
        if content.strip(SPACE):
            try:
                yield line, json.loads(content)
            except json.JSONDecodeError as error:
                yield line, BadValue(f"not JSON: {describe_json_error(error)}: {shorten(content.rstrip(SPACE))}")
            except (ValueError, RecursionError) as error:
                yield line, BadValue(f"not read: {error}")  # nested too deeply, or a number of thousands of digits


def json_array(text: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of each element; one by one, since json.loads would not tell their lines."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    at = _skip(text, text.index("[") + 1)
    while not text.startswith("]", at):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
            yield line, value
            at = _next_element(text, _skip(text, at))
        except json.JSONDecodeError as error:
            yield error.lineno, BadValue(f"not JSON: {describe_json_error(error)}; the array ends there")
            return
        except (ValueError, RecursionError) as error:
            yield line, BadValue(f"not read: {error}; the array ends there")
            return
    rest = _skip(text, at + 1)
    if rest < len(text):
        found = shorten(text[rest:])
        yield line + text.count("\n", counted, rest), BadValue(f"more text after the end of the array: {found}")


def _next_element(text: str, at: int) -> int:
    """Position of the next element after the comma at `at`, or of the closing bracket."""
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
    """The text, or the beginning of a long one."""
    return text if len(text) <= 60 else f"{text[:57]}..."
