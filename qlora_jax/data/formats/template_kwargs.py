"""Reads the column `chat_template_kwargs`: variables that a row gives the chat template, such as `enable_thinking`."""

import functools
import json
from collections.abc import Callable, Mapping

from qlora_jax.config.fields import TemplateValue
from qlora_jax.data.formats.tool_calls import decode_json
from qlora_jax.data.readers.json_rows import describe_json_error
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, with_template_kwargs
from qlora_jax.metadata import JsonObject

TEMPLATE_KWARGS = "chat_template_kwargs"
_CACHED = 64  # variables that rows have


def read_template_kwargs(row: JsonObject) -> dict[str, TemplateValue]:
    """Returns the row's variables. They may be JSON text, because typed columns cannot hold every object.

    A null is not a variable: files with typed columns write it where a row lacks one.
    """
    found = decode_json(_cell(row)) or {}
    return {name: value for name, value in found.items() if value is not None}


def template_kwargs_problems(row: JsonObject) -> list[str]:
    """Returns the reasons why the column is not an object of variables; empty if it is."""
    try:
        found = decode_json(_cell(row))
    except json.JSONDecodeError as error:
        return [f"{TEMPLATE_KWARGS} is not JSON: {describe_json_error(error)}"]
    if found is None or isinstance(found, dict):
        wrong = {name: value for name, value in (found or {}).items() if not _is_value(value)}
        expected = "expected true, false, a number, text or a list of texts"
        return [f"{TEMPLATE_KWARGS}: {name} is {type(value).__name__}, {expected}" for name, value in wrong.items()]
    return [
        f"{TEMPLATE_KWARGS} is not an object of the template's variables (found {type(found).__name__}, expected one "
        'like {"enable_thinking": false}). Rename the column if it is something else'
    ]


def _cell(row: JsonObject) -> object:
    """Returns the row's value; None for an empty cell, as CSV files have it."""
    value = row.get(TEMPLATE_KWARGS)
    return None if value == "" else value


def _is_value(value: object) -> bool:
    texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return texts or value is None or isinstance(value, bool | int | float | str)


def with_row_kwargs(tokenizer: Tokenizer, variables: Mapping[str, TemplateValue]) -> Tokenizer:
    """Returns the tokenizer with a row's variables, which take precedence over the tokenizer's.

    Raises:
      ValueError: the tokenizer has no chat template, or that reads no variable of a name.
    """
    if not variables:
        return tokenizer
    return with_template_kwargs(tokenizer, {**tokenizer.chat_template_kwargs, **variables}, TEMPLATE_KWARGS)


def by_template_kwargs[T](make: Callable[[Tokenizer], T], tokenizer: Tokenizer) -> Callable[[JsonObject], T]:
    """Returns a function of a row that calls `make` with the row's tokenizer, once for rows with equal variables."""

    @functools.lru_cache(_CACHED)
    def made(variables: str) -> T:
        return make(with_row_kwargs(tokenizer, json.loads(variables)))

    return lambda row: made(json.dumps(read_template_kwargs(row), sort_keys=True) if row.get(TEMPLATE_KWARGS) else "{}")


def check_plain(row: JsonObject) -> None:
    """Raises ValueError if a row that is plain text has variables, because no template writes it."""
    if read_template_kwargs(row):
        raise ValueError(f"{TEMPLATE_KWARGS}: the row is plain text, which no chat template writes. Remove the column")
