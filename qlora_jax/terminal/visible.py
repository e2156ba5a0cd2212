"""Makes any text safe to print: no character of it is a command for the terminal, and no URL in it has a password.

Rows, replies, error messages and the names of tensors and files may contain any character. ESC starts commands that
move the cursor, rewrite earlier lines or fill the clipboard. C1 controls do the same without ESC.
"""

import re

# Control characters become their pictures, and C1 controls and lone surrogates U+FFFD. Line ends and tabs stay.
VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "␡"}
VISIBLE |= {code: "\ufffd" for code in (*range(0x80, 0xA0), *range(0xD800, 0xE000))}
# Marks that change the direction of the following text, even past the end of their row.
VISIBLE |= {code: f"<U+{code:04X}>" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}

# JSON escapes controls below 32 itself; its own line ends stay.
_ESCAPED = {code: f"\\u{code:04x}" for code in VISIBLE if code >= 32}

# The part of a URL between :// and @, which has the user name and the password. The last @ before the path ends it.
_USERINFO = re.compile(r"(?<=://)[^\s/?#]*@")

_LONGEST_LINE = 4000  # characters
_BEGINNING, _END = 2000, 1000  # characters shown of a longer line


def fit_to_print(text: str) -> str:
    """Returns a message in which values of files can neither command the terminal nor fill it, without passwords."""
    return visible(shorten_lines(without_passwords(text)))


def shorten_lines(text: str) -> str:
    """Returns the text without the middle of lines of more than 4,000 characters."""
    return "\n".join(map(_shorten_line, text.split("\n")))


def _shorten_line(line: str) -> str:
    left_out = len(line) - _BEGINNING - _END
    if len(line) <= _LONGEST_LINE:
        return line
    return f"{line[:_BEGINNING]} ... ({left_out:,} characters left out) ... {line[-_END:]}"


def visible(text: str) -> str:
    """Returns the text with its control characters replaced by visible ones."""
    return text.translate(VISIBLE)


def visible_json(text: str) -> str:
    """Returns JSON of the same value; control characters, which JSON allows in strings, become escapes."""
    return text.translate(_ESCAPED)


def without_passwords(text: str) -> str:
    """Returns the text with `***` instead of the user name and password of each URL."""
    return _USERINFO.sub("***@", text)
