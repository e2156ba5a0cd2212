"""A ready-made reward: the reply is JSON that follows a schema (extra `json-schema`)."""

import json
from collections.abc import Sequence
from pathlib import Path

import referencing
from jsonschema.validators import validator_for

from qlora_jax.rewards.answers import Completion, text_of


def json_reply(
    completions: Sequence[Completion], schema: str | Sequence[object] | None = None, **columns: object
) -> list[float]:
    """1 if the whole reply is JSON that follows the schema: that of a file, or a column of objects or JSON texts."""
    one = json.loads(Path(schema).read_text(encoding="utf-8")) if isinstance(schema, str) else None
    schemas = schema if schema is not None and one is None else [one] * len(completions)
    return [float(_follows(text_of(each), found)) for each, found in zip(completions, schemas, strict=True)]


def _follows(text: str, schema: object) -> bool:
    if isinstance(schema, str):
        schema = json.loads(schema)
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    if schema is None:
        return True
    if not isinstance(schema, dict):
        raise ValueError(f"schema: found {type(schema).__name__}, expected a JSON object")
    validator = validator_for(schema)
    validator.check_schema(schema)
    return validator(schema, registry=referencing.Registry()).is_valid(value)  # an empty registry fetches no address


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
