"""Digests of JSON lines, by which a reader notices a changed digit or a missing line.

A line ends with a digest of itself. A checkpoint contains the number of lines of a file, and a digest of all of them.

Every file that an earlier version wrote without digests opens with `warn_without_digests`.
"""

import functools
import re
import warnings
from pathlib import Path
from typing import TypedDict

import xxhash
from pydantic import NonNegativeInt

KEY = "xxh3_64"
_AT_END = re.compile(rf', "{KEY}": "([0-9a-f]{{16}})"\}}\n?$')


class LinesDigest(TypedDict):
    """The number of lines at the start of a file, and the digest of their bytes, line breaks included."""

    lines: NonNegativeInt
    xxh3_128: str


def with_digest(text: str) -> str:
    """Returns the line of a JSON object that is not empty: its text with a digest as the last key, and a line break."""
    return f'{text[:-1]}, "{KEY}": "{_digest(text)}"}}\n'


def without_digest(line: str, place: str, fix: str = "Delete this line", *, required: bool = False) -> str:
    """Returns the text that `with_digest` was given; a line without a digest is returned as it is.

    Args:
      place: the file and line, for the message.
      fix: its last sentence.
      required: True if a line without a digest is an error.

    Raises:
      ValueError: the line is not the one that was written.
    """
    found = _AT_END.search(line)
    if found is None and required:
        raise ValueError(f"{place}: not a record (found no digest at its end). {fix}")
    if found is None:
        return line
    text = line[: found.start()] + "}"
    if _digest(text) != found[1]:
        raise ValueError(f"{place}: damaged (its values are not those that were written). {fix}")
    return text


@functools.cache  # once per folder, because several of its files may lack digests
def warn_without_digests(folder: Path) -> None:
    """Warns that damage to a folder's files cannot be noticed."""
    warnings.warn(
        f"{folder}: an earlier version of qlora_jax wrote it without digests, so damage to it cannot be noticed. Files "
        "that are written from now on have digests",
        stacklevel=2,
    )


def _digest(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())
