"""Describes the server's routes as an OpenAPI document, from the same classes that read the bodies."""

import importlib.metadata
from collections.abc import Iterable, Mapping

from pydantic.json_schema import JsonSchemaValue, models_json_schema

from qlora_jax.server.errors import TYPES
from qlora_jax.server.request_validation import ANY, Body

REFERENCE = "#/components/schemas/{model}"
_TEXT, _TEXT_OR_NULL = {"type": "string"}, {"type": ["string", "null"]}
_KIND = {"enum": sorted({*TYPES.values()})}


def _object(**properties: JsonSchemaValue) -> JsonSchemaValue:
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


_ERRORS = {
    "Error": _object(error=_object(message=_TEXT, type=_KIND, param=_TEXT_OR_NULL, code=_TEXT_OR_NULL)),
    "AnthropicError": _object(type={"const": "error"}, error=_object(type=_KIND, message=_TEXT)),
}


def openapi_document(posts: Mapping[str, type[Body]], gets: Iterable[str]) -> JsonSchemaValue:
    """Returns the document.

    Args:
      posts: path -> body.
      gets: paths, in which `{name:path}` is the name of a model.
    """
    bodies = [*dict.fromkeys(posts.values())]
    names, schemas = models_json_schema([(body, "validation") for body in bodies], ref_template=REFERENCE)
    definitions = schemas["$defs"]
    for body in bodies:
        _add_values_that_change_nothing(definitions[names[body, "validation"]["$ref"].rpartition("/")[2]], body)
    paths: dict[str, JsonSchemaValue] = {}
    for path, body in posts.items():
        content = {"application/json": {"schema": names[body, "validation"]}}
        paths[path] = {"post": {"requestBody": {"required": True, "content": content}, "responses": _responses(path)}}
    for path in gets:
        name = {"name": "name", "in": "path", "required": True, "schema": _TEXT}
        parameters = {"parameters": [name]} if "{" in path else {}
        paths[path.replace(":path", "")] = {"get": {**parameters, "responses": _responses(path)}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "qlora-jax", "version": importlib.metadata.version("qlora-jax")},
        "paths": paths,
        "components": {"schemas": {**definitions, **_ERRORS}},
    }


def _add_values_that_change_nothing(schema: JsonSchemaValue, body: type[Body]) -> None:
    """Allows null for every field that is not required, and the values of `inert`."""
    fields = schema["properties"]
    for name in fields.keys() - {*schema.get("required", ())}:
        fields[name] = {"anyOf": [fields[name], {"type": "null"}]}
    for name, values in body.inert.items():
        fields[name] = {} if ANY in values else {"enum": [*values, None]}


def _responses(path: str) -> JsonSchemaValue:
    kind = "AnthropicError" if path.startswith("/v1/messages") else "Error"
    error = {"application/json": {"schema": {"$ref": REFERENCE.format(model=kind)}}}
    return {"200": {"description": "the answer"}, "default": {"description": "an error", "content": error}}
