"""JSON schemas of Python functions from their type hints and Google-style docstrings, equal to transformers'."""

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Sequence
from enum import Enum

from qlora_jax.untrusted_json import JsonObject

_TYPES: dict[object, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    types.NoneType: "null",
    list: "array",
    tuple: "array",
    dict: "object",
}
_ENTRY = re.compile(r"([ \t]*)(\w+)(?:[ \t]*\([^()\n]*\))?:")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def function_schema(function: Callable[..., object]) -> JsonObject:
    """Returns the schema by which a model knows how to call a function.

    Raises:
      ValueError: the function lacks a docstring, a type hint, or the description of an argument.
    """
    doc = (inspect.getdoc(function) or "").strip()
    if not doc:
        raise ValueError("has no docstring. Add one that says what the function does, with a section `Args:`")
    properties, required = _properties(function)
    returned, described = properties.pop("return", None), _descriptions(doc)
    for name, schema in properties.items():
        if name not in described:
            raise ValueError(f"its docstring does not describe the argument {name!r}. Add it below `Args:`")
        text = described[name]
        if choices := _CHOICES.search(text):
            schema["enum"] = _listed_choices(name, choices[1])
            text = text[: choices.start()].strip()
        schema["description"] = text  # the last key: templates write schemas as they are
    parameters = {"type": "object", "properties": properties} | ({"required": required} if required else {})
    found = {"name": function.__name__, "description": re.split("Args:|Returns:|Raises:", doc, maxsplit=1)[0].strip()}
    found["parameters"] = parameters
    if returned is not None:
        section = _section(doc, r"\n\s*Returns:\n\s*", "Raises:")
        found["return"] = returned if section is None else {**returned, "description": section.strip()}
    return {"type": "function", "function": found}


def _properties(function: Callable[..., object]) -> tuple[dict[str, JsonObject], list[str]]:
    """Returns (schema of each argument and of the result, the arguments without a default)."""
    parameters = inspect.signature(function).parameters
    if missing := [each.name for each in parameters.values() if each.annotation is each.empty]:
        raise ValueError(f"its argument {missing[0]!r} has no type hint. Add one, such as `{missing[0]}: str`")
    found: dict[str, JsonObject] = {}
    for name, hint in typing.get_type_hints(function).items():
        try:
            found[name] = _schema_of(hint)
        except ValueError as error:
            if name != "return":  # the model never writes the result
                raise ValueError(f"the type hint of {name!r} {error}") from None
    return found, [each.name for each in parameters.values() if each.default is each.empty]


def _schema_of(hint: object) -> JsonObject:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return {}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _enum([member.value for member in hint])
    if origin is None and hint in _TYPES:
        return {"type": _TYPES[hint]}
    if origin in (typing.Union, types.UnionType):
        return _union(inner)
    if origin is typing.Literal:
        return _enum(inner)
    if origin is list:
        return {"type": "array"} | ({"items": _schema_of(inner[0])} if inner else {})
    if origin is tuple and len(inner) != 1 and ... not in inner:
        return {"type": "array"} | ({"prefixItems": [*map(_schema_of, inner)]} if inner else {})
    if origin is dict:
        return {"type": "object"} | ({"additionalProperties": _schema_of(inner[1])} if len(inner) == 2 else {})
    expected = "int, float, str, bool, None, Any, list, dict, tuple, Literal, an Enum, or a union of them"
    raise ValueError(f"has no JSON schema (found {hint}, expected {expected}). Change it")


def _enum(values: Sequence[object]) -> JsonObject:
    kinds = [*dict.fromkeys(_TYPES.get(type(value), "") for value in values)]
    if not set(kinds) <= {"integer", "number", "string", "boolean", "null"} or not kinds:
        raise ValueError(f"has choices that are not JSON (found {[*values]}). Use numbers and texts")
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": [*values]}


def _union(hints: Sequence[object]) -> JsonObject:
    some = [_schema_of(hint) for hint in hints if hint is not types.NoneType]
    if len(some) == 1:
        found = some[0]
    elif all(schema.keys() == {"type"} for schema in some):
        names = sorted({schema["type"] for schema in some})
        found = {"type": names[0] if len(names) == 1 else names}
    else:
        found: JsonObject = {"anyOf": some}
    return found | ({"nullable": True} if types.NoneType in hints else {})


def _section(doc: str, heading: str, following: str) -> str | None:
    """Returns the text between a heading and the next one; None if the heading does not occur."""
    found = re.search(heading, doc)
    return None if found is None else re.split(following, doc[found.end() :], maxsplit=1)[0].rstrip()


def _descriptions(doc: str) -> dict[str, str]:
    """Returns the arguments' descriptions; one ends at the next name and colon that is not indented further."""
    section = _section(doc, r"\n\s*Args:\n", "Returns:|Raises:") or ""
    found: dict[str, list[str]] = {}
    indent, own = "", [""]
    for line in filter(str.strip, section.split("\n")):
        entry = _ENTRY.match(line)
        begins = not found or (any(own) and not line.startswith((f"{indent} ", f"{indent}\t")))
        if entry and begins:
            indent, own = entry[1], [line[entry.end() :].strip()]
            found[entry[2]] = own
        else:
            own.append(line.strip())
    return {name: " ".join(filter(None, lines)) for name, lines in found.items()}


def _listed_choices(name: str, text: str) -> list[object]:
    try:
        choices = json.loads(text)
    except ValueError:
        raise ValueError(f"the choices of {name!r} are not JSON (found {text}). Write them as a JSON list") from None
    return [choice.strip() if isinstance(choice, str) else choice for choice in choices]
