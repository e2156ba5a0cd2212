"""Reads rows of JSON text, one per line or the elements of one array, each with its line number."""

import collections
import io
import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from qlora_jax.untrusted_json import MAX_DEPTH, is_too_deep

SPACE = " \t\r\n"
MAX_ROW = 64 << 20  # characters; a row of text that models can use has a few millions
TOO_LONG = f"longer than {MAX_ROW:,} characters, so reading stops there. Split it into several rows"
_TOO_DEEP = f"can't be read: nested too deeply (found more than {MAX_DEPTH} levels of lists and objects)"
_EARLY = "the array ends too early"
_BLOCK = 1 << 20  # characters
# An error this close to the end of what has been read may be due to what has not been read. The longest token that is
# decoded at once is a pair of escapes such as \ud83d\ude00.
_TOKEN = 16
_spaces = re.compile(f"[{SPACE}]*")
_LINE_ENDS = ("\n", "\r\n", "")
_WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
_UNFINISHED = re.compile(r"u[\da-fA-F]{0,4}|\.|[eE][+-]?")  # beginnings of an escape, and of the parts of a number


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Returns an object; raises ValueError if it has a key twice, of which Python would use the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, _),) = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"an object has the key {shorten(json.dumps(key))} twice; remove one of them")
    return found


_decoder = json.JSONDecoder(object_pairs_hook=_unique)


def describe_json_error(error: json.JSONDecodeError) -> str:
    """Returns the problem of JSON text and its column. Some messages of the json library already end with "at"."""
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def _ends_early(error: json.JSONDecodeError, text: str) -> bool:
    """Returns True if more text at the end might have prevented the error."""
    rest = text[error.pos :]
    unfinished = error.msg == "Expecting value" and any(word.startswith(rest) for word in _WORDS)
    return not rest or unfinished or error.msg.startswith("Unterminated") or bool(_UNFINISHED.fullmatch(rest))


class BadValue(NamedTuple):
    """A value that can't be read.

    Fields:
      ends_file: True if the rows after it can't be read either.
    """

    problem: str
    ends_file: bool = False


def limited_lines(file: io.TextIOBase) -> Iterator[str]:
    """Yields the lines of a file. One that is too long is cut off after MAX_ROW + 1 characters, and is the last."""
    while line := file.readline(MAX_ROW + 1):
        yield line
        if len(line) > MAX_ROW:
            return


def json_lines(file: io.TextIOBase) -> Iterator[tuple[int, object]]:
    """Yields (line, value) of each line that is not blank."""
    for line, content in enumerate(limited_lines(file), start=1):
        if content.strip(SPACE):
            yield line, _decode_line(content)


def _decode_line(content: str) -> object:
    if len(content) > MAX_ROW:
        return BadValue(TOO_LONG, ends_file=True)
    if is_too_deep(content):
        return BadValue(_TOO_DEEP)
    try:
        value, end = _decoder.raw_decode(content)  # takes two thirds of the time of json.loads
        if content[end:] in _LINE_ENDS:
            return value
    except ValueError:
        pass  # json.loads raises it again, unless only white space was in the way
    try:
        return json.loads(text := content.rstrip("\r\n"), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        early = f"the line ends too early at column {len(text) + 1}"
        problem = early if _ends_early(error, text) else describe_json_error(error)
        return BadValue(f"not JSON: {problem}: {shorten(content.rstrip(SPACE))}")
    except ValueError as error:  # a number with thousands of digits, or a repeated key
        return BadValue(f"can't be read: {error}")


def json_array(file: io.TextIOBase) -> Iterator[tuple[int, object]]:
    """Yields (line, value) of each element of the array that the file contains, with a few of them in memory."""
    text = _ArrayText(file)
    try:
        text.take("[")
        while text.peek() != "]":
            value = text.decode()
            yield text.line, value
            if text.peek() != "]":
                text.take(",")
                text.expect_value()
        text.take("]")
    except _BrokenArrayError as error:
        yield text.line, BadValue(str(error), ends_file=True)
        return
    if text.peek():
        text.count_lines()
        yield text.line, BadValue(f"more text after the end of the array: {shorten(text.rest)}", ends_file=True)


class _BrokenArrayError(Exception):
    """The problem at which reading an array stops."""


class _ArrayText:
    """The unread text of an array; only a window of it is in memory.

    Attributes:
      line: line of the last element that was decoded, of an error, or of the text after the array.
    """

    def __init__(self, file: io.TextIOBase):
        self._file = file
        self._text, self._at, self._ended = "", 0, False
        self.line, self._counted, self._line_start = 1, 0, 0

    @property
    def rest(self) -> str:
        """The unread text in memory."""
        return self._text[self._at :]

    def peek(self) -> str:
        """Skips white space and returns the next character; empty at the end."""
        while True:
            found = _spaces.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read_more()

    def take(self, expected: str) -> None:
        """Skips this character; raises _BrokenArrayError if it does not follow."""
        if (found := self.peek()) != expected:
            raise self._broken("expected ',' or ']' after an element of the array" if found else _EARLY, self._at)
        self._at += 1

    def expect_value(self) -> None:
        """Raises _BrokenArrayError if the array ends after a comma."""
        if self.peek() == "]":
            raise self._broken("expected a row after the comma", self._at)

    def decode(self) -> object:
        """Returns the next element, or its problem if the ones after it can be read.

        Raises:
          _BrokenArrayError: the text is not JSON, or the element is too long.
        """
        self.count_lines()
        while True:
            try:
                value, end = _decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos + _TOKEN >= len(self._text)
                if self._ended and _ends_early(error, self._text):
                    raise self._broken(_EARLY, len(self._text)) from None
                if self._ended or not cut_off:
                    raise self._broken(error.msg.removesuffix(" at"), error.pos) from None
            except (RecursionError, ValueError) as error:  # as above, or much too deep
                raise _BrokenArrayError(f"can't be read: {error}; reading stops there") from None
            else:
                # A number may go on: "1." is read as 1 and more text.
                if isinstance(value, dict | list | str) or self._ended or end + _TOKEN <= len(self._text):
                    self._check_length(end)
                    content, self._at = self._text[self._at : end], end
                    return BadValue(_TOO_DEEP) if is_too_deep(content) else value
            self._check_length(len(self._text))
            self._read_more()

    def _check_length(self, end: int) -> None:
        if end - self._at > MAX_ROW:
            raise _BrokenArrayError(TOO_LONG)

    def _read_more(self) -> None:
        """Doubles the window, so the text of a long element is decoded a few times only."""
        size = max(_BLOCK, len(self._text) - self._at)
        more = self._file.read(size)
        self.count_lines()
        self._counted, self._line_start = self._counted - self._at, self._line_start - self._at
        self._text, self._at, self._ended = self._text[self._at :] + more, 0, len(more) < size

    def count_lines(self, stop: int | None = None) -> None:
        """Sets `line` to the line of the next character, or of the one at `stop`."""
        stop = self._at if stop is None else stop
        if lines := self._text.count("\n", self._counted, stop):
            self.line += lines
            self._line_start = self._text.rindex("\n", self._counted, stop) + 1
        self._counted = stop

    def _broken(self, problem: str, position: int) -> _BrokenArrayError:
        self.count_lines(position)
        column = position - self._line_start + 1
        return _BrokenArrayError(f"not JSON: {problem} at column {column}; reading stops there")


def shorten(text: str) -> str:
    """Returns the text, or the first 57 characters of a long one and "..."."""
    return text if len(text) <= 60 else f"{text[:57]}..."
