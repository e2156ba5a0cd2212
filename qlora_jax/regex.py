"""Matches regular expressions that a stranger may have written (settings) in linear time, with RE2.

Python's engine tries all ways to match, which takes years for `((a+)+)+!`. A pattern that both engines accept means the
same in both on names of ASCII letters, digits, dots and underscores; others are refused. For texts, in which all
characters may occur, patterns are translated (`last_match`).
"""

import functools
import re
import warnings
from collections.abc import Iterable, Mapping
from re import _parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import cast

import re2

MAX_LENGTH = 2000  # characters of a pattern
# Instructions of RE2's programs for all patterns of a file; compiling and matching so many takes a second or two.
MOST_INSTRUCTIONS = 2_000_000
_SHOWN = 60  # characters of a pattern
MOST_PROBLEMS = 20  # that a message lists; RE2 tries for a tenth of a second before it refuses a large pattern
# Parts of RE2's messages, and the names of what RE2 does not have.
_UNSUPPORTED = {
    "(?=": "a lookahead",
    "(?!": "a negative lookahead",
    "(?<": "a lookbehind",
    "(?P": "a backreference",
    "(?(": "a conditional group",
    "(?>": "an atomic group",
    "(?#": "a comment",
    "invalid escape sequence: \\": "a backreference or an escape that RE2 does not have",
    "invalid repetition size": "a repetition of more than 1000",
    "bad repetition operator": "a possessive quantifier",
    "pattern too large": "too many repetitions",
}
# Both engines accept these, with different meanings: RE2 reads {,3} as text and [[:alpha:]] as a class.
_AMBIGUOUS = {"{,": "a repetition without a lower bound, {,n}: write {0,n}", "[:": "[: in a class of characters"}


# Python's meaning of these in a text, in RE2's syntax, between the brackets of a class.
_TEXT_CLASSES = {"\\d": r"\p{Nd}", "\\w": r"\p{L}\p{N}_", "\\s": r"\s\x0b\x1c-\x1f\x85\p{Z}"}
_NEGATED = {"\\D": "\\d", "\\W": "\\w", "\\S": "\\s"}
_END = {"$": r"(?:\n?\z)", "\\Z": r"\z"}


class PatternError(ValueError):
    """A regular expression that cannot be used."""


def pattern_problems(pattern: str) -> list[str]:
    """Returns the reason why a pattern cannot be used, as a list; an empty one if it can."""
    try:
        _compiled(pattern)
    except PatternError as error:
        return [str(error)]
    return []


def file_pattern_problems(patterns: Mapping[str, Iterable[str]]) -> list[str]:
    """Returns the problems of all patterns of a file, up to MOST_PROBLEMS, or until their programs are too large.

    Args:
      patterns: by the setting that has them.
    """
    problems, size = [], 0
    for setting, pattern in ((setting, pattern) for setting, given in patterns.items() for pattern in given):
        try:
            size += _compiled(pattern).programsize
        except PatternError as error:
            problems.append(f"{setting}: {pattern[:_SHOWN]!r}: {error}")
        if size > MOST_INSTRUCTIONS:
            problems.append(
                f"{setting}: the file's patterns are too large (found more than {MOST_INSTRUCTIONS:,} instructions of "
                f"RE2 up to {pattern[:_SHOWN]!r}). Write fewer repetitions"
            )
        if size > MOST_INSTRUCTIONS or len(problems) == MOST_PROBLEMS:
            break
    return problems


def matches_whole(pattern: str, name: str) -> bool:
    """Returns re.fullmatch(pattern, name) is not None.

    Raises:
      PatternError: not a regular expression, or it uses something that linear time does not allow.
    """
    return _compiled(pattern).fullmatch(name) is not None


def matches_end(pattern: str, name: str) -> bool:
    r"""Returns whether the pattern matches the last parts of a dotted name: PEFT's re.match(rf"(.*\.)?({pattern})$").

    Raises:
      PatternError: not a regular expression, or it uses something that linear time does not allow.
    """
    _compiled(pattern)
    return _compiled(rf"(.*\.)?({pattern})").fullmatch(name) is not None


def last_match(pattern: str, text: str) -> list[str | None] | None:
    r"""Returns the last match of a pattern in a text and its groups, or None: the last of re.finditer(pattern, text).

    Three things differ from `re`: \b looks at ASCII characters; a match that ends with `$` has the text's last line
    break, if there is one, which then is not a match by itself; and after an empty match the search continues at the
    next character, while `re` first looks for a longer match at the same place.

    Raises:
      PatternError: not a regular expression, or it uses something that linear time does not allow.
    """
    matches = [*_compiled_for_texts(pattern).finditer(text)]
    return cast(list[str | None], [matches[-1].group(), *matches[-1].groups()]) if matches else None


def text_pattern_problems(pattern: str) -> list[str]:
    """Returns the reason why `last_match` cannot use a pattern, as a list; an empty one if it can."""
    try:
        _compiled_for_texts(pattern)
    except PatternError as error:
        return [str(error)]
    return []


@functools.lru_cache(maxsize=1024)
def _compiled_for_texts(pattern: str):
    _check(pattern)
    return _compile_with_re2(_translated(pattern))


def _translated(pattern: str) -> str:
    """Returns a pattern for RE2 that means in any text what `pattern` means to `re`."""
    lines = re.search(r"\(\?[a-zA-Z]*m", pattern) is not None  # `$` is the end of a line, in RE2 too
    pieces, class_start, at = [], -1, 0
    while at < len(pattern):
        token = pattern[at : at + 2] if pattern[at] == "\\" else pattern[at]
        at += len(token)
        if class_start >= 0:
            pieces.append(_in_class(token))
            if token == "]" and at > class_start:
                class_start = -1
        elif token == "[":
            pieces.append(token)
            # A bracket at the start of a class is a character of it.
            class_start = at + 1 + (pattern[at : at + 1] == "^")
        else:
            pieces.append(token if token == "$" and lines else _outside_class(token))
    return "".join(pieces)


def _in_class(token: str) -> str:
    if token in ("\\W", "\\S"):
        raise PatternError(f"not supported in a pattern: {token} in a class of characters. Write it outside of one")
    return r"\P{Nd}" if token == "\\D" else _TEXT_CLASSES.get(token, token)


def _outside_class(token: str) -> str:
    if token in _TEXT_CLASSES:
        return f"[{_TEXT_CLASSES[token]}]"
    if token in _NEGATED:
        return f"[^{_TEXT_CLASSES[_NEGATED[token]]}]"
    return _END.get(token, token)


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str):
    _check(pattern)
    return _compile_with_re2(pattern)


def _check(pattern: str) -> None:
    """Raises PatternError if `re` refuses a pattern, or RE2 would read it in another way.

    `re` only parses it: to compile a class over all of Unicode takes `re` milliseconds, and a pattern has hundreds.
    """
    if len(pattern) > MAX_LENGTH:
        raise PatternError(f"too long for a pattern (found {len(pattern)} characters, expected at most {MAX_LENGTH})")
    try:
        with warnings.catch_warnings(action="ignore"):
            _parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"not a regular expression: {error}. Escape special characters with \\") from None
    if found := [name for part, name in _AMBIGUOUS.items() if part in pattern]:
        raise PatternError(f"not supported in a pattern: {', '.join(found)}")


def _compile_with_re2(pattern: str):
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except UnicodeEncodeError:
        raise PatternError("not text: has half of a surrogate pair") from None
    except re2.error as error:
        message = error.args[0]
        raise PatternError(_unsupported(message.decode() if isinstance(message, bytes) else message)) from None


def _unsupported(message: str) -> str:
    name = next((name for part, name in _UNSUPPORTED.items() if part in message), "a construct that RE2 does not have")
    return f"not supported in a pattern, which must match in linear time: {name} ({message}). Write it without"
