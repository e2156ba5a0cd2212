"""Matches regular expressions that a stranger may have written (settings of adapters) in linear time, with RE2.

Python's engine tries all ways to match, which takes years for `((a+)+)+!`. A pattern that both engines accept means the
same in both on names of ASCII letters, digits, dots and underscores; others are refused.
"""

import functools
import re
import warnings

import re2

MAX_LENGTH = 2000  # characters of a pattern
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


class PatternError(ValueError):
    """A regular expression that cannot be used."""


def pattern_problems(pattern: str) -> list[str]:
    """Returns the reason why a pattern cannot be used, as a list; an empty one if it can."""
    try:
        _compiled(pattern)
    except PatternError as error:
        return [str(error)]
    return []


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


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str):
    if len(pattern) > MAX_LENGTH:
        raise PatternError(f"too long for a pattern (found {len(pattern)} characters, expected at most {MAX_LENGTH})")
    try:
        with warnings.catch_warnings(action="ignore"):
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"not a regular expression: {error}. Escape special characters with \\") from None
    if found := [name for part, name in _AMBIGUOUS.items() if part in pattern]:
        raise PatternError(f"not supported in a pattern: {', '.join(found)}")
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        message = error.args[0]
        raise PatternError(_unsupported(message.decode() if isinstance(message, bytes) else message)) from None


def _unsupported(message: str) -> str:
    name = next((name for part, name in _UNSUPPORTED.items() if part in message), "a construct that RE2 does not have")
    return f"not supported in a pattern, which must match in linear time: {name} ({message}). Write it without"
