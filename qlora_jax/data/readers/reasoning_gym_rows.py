"""Generates rows of a task of reasoning-gym: `reasoning_gym:NAME[?size=500&seed=0&SETTING=VALUE]`.

The settings are those of the task. A value is JSON, or else text. Equal addresses give equal rows.
"""

import dataclasses
import difflib
import functools
import json
import urllib.parse
import warnings
from collections.abc import Iterator, Mapping
from typing import Protocol, cast, runtime_checkable

from qlora_jax.untrusted_json import JsonObject

SCHEME = "reasoning_gym:"
ADDRESS = "reasoning_gym"  # the column with the address, by which the reward finds the task
_SIZES = {"size": 500, "seed": 0}


@runtime_checkable
class Task(Protocol):
    """A task with its settings."""

    def __iter__(self) -> Iterator[JsonObject]:
        """Yields entries with question, answer and metadata."""
        ...

    def score_answer(self, answer: str | None, entry: JsonObject) -> float:
        """Returns the score of an answer to an entry's question."""
        ...


def reasoning_gym_rows(address: str) -> Iterator[JsonObject]:
    """Yields the rows of an address: a task's entries, with the question as the prompt, too.

    Raises:
      ValueError: the package is not installed, or it has no such task or setting.
    """
    for entry in open_task(address):
        yield {**entry, "prompt": entry["question"], ADDRESS: address}


@functools.cache
def open_task(address: str) -> Task:
    """Returns the task of an address; raises ValueError as `reasoning_gym_rows`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # in a package that it requires
            from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise ValueError(
            f"{address}: tasks of reasoning-gym need its package, which is not installed. "
            "Run pip install 'qlora-jax[reasoning-gym]'"
        ) from None
    name, _, query = address.removeprefix(SCHEME).partition("?")
    if name not in DATASETS:
        raise ValueError(f"{address}: found the task {name!r}, expected {_near(name, DATASETS)}. Correct the name")
    given = {key: _value(text) for key, text in urllib.parse.parse_qsl(query, keep_blank_values=True)}
    known = {field.name: field for field in dataclasses.fields(DATASETS[name][1])}
    if unknown := [key for key in given if key not in known]:
        raise ValueError(
            f"{address}: found the setting {unknown[0]!r}, expected {_near(unknown[0], known)}. Correct the address"
        )
    try:
        return cast(Task, create_dataset(name, **_SIZES | given))
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{address}: the task refuses its settings ({error}). Correct the address") from error


def _value(text: str) -> object:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return tuple(value) if isinstance(value, list) else value


def _near(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return " or ".join(near) if near else f"one of {', '.join(sorted(known))}"
