"""Random JSON schemas, each of which some value satisfies."""

import random
from typing import Any

Schema = dict[str, Any]
NAMES = ["id", "name", "größe", "with space", 'a "quote"', "x", "items", "$ref_", "path/to", ""]
CONSTANTS = [0, -1, 2.5, "red", "grün", 'a"b\\c', "\n", "", True, None, [1, "two"], {"a": [None]}]
PATTERNS = ["^[a-z]{2,6}$", "^\\d{3}-\\d{4}$", "^ab+c", "^(red|green|blue)$", "^[^\\x00-\\x1f]{1,5}$", "^$|^x"]


def random_schema(draw: random.Random, depth: int = 3) -> Schema:
    """A schema that nests up to `depth` levels."""
    leaves = [_string, _number, _integer, _enum, _constant, _simple]
    inner = [_object, _object, _array, _any_of, _tuple]
    return draw.choice(leaves + inner * 2 if depth else leaves)(draw, depth)


def _simple(draw: random.Random, depth: int) -> Schema:
    return {"type": draw.choice(["boolean", "null", ["boolean", "null"], "integer", "number", "string"])}


def _string(draw: random.Random, depth: int) -> Schema:
    if draw.random() < 0.4:
        return {"type": "string", "pattern": draw.choice(PATTERNS)}
    least = draw.randrange(6)
    bounds = {"minLength": least, "maxLength": least + draw.randrange(12)}
    return {"type": "string"} | dict(draw.sample(sorted(bounds.items()), draw.randrange(3)))


def _number(draw: random.Random, depth: int) -> Schema:
    low = round(draw.uniform(-1000, 1000), draw.randrange(4))
    high = round(low + draw.uniform(0.01, 500), 3)
    lower = {draw.choice(["minimum", "exclusiveMinimum"]): low}
    upper = {draw.choice(["maximum", "exclusiveMaximum"]): high}
    return {"type": "number"} | draw.choice([lower, upper, lower | upper])


def _integer(draw: random.Random, depth: int) -> Schema:
    low = draw.randrange(-300, 300)
    bounds = draw.choice([{"minimum": low}, {"maximum": low}, {"minimum": low, "maximum": low + draw.randrange(90)}])
    return {"type": "integer"} | bounds | draw.choice([{}, {"multipleOf": 1}])


def _enum(draw: random.Random, depth: int) -> Schema:
    return {"enum": draw.sample(CONSTANTS, draw.randint(1, 5))}


def _constant(draw: random.Random, depth: int) -> Schema:
    return {"const": draw.choice(CONSTANTS)}


def _object(draw: random.Random, depth: int) -> Schema:
    names = draw.sample(NAMES, draw.randrange(5))
    more = draw.choice([{"additionalProperties": False}] * 3 + [{}, {"additionalProperties": {"type": "integer"}}])
    properties = {name: random_schema(draw, depth - 1) for name in names}
    required = draw.sample(names, draw.randint(0, len(names)))
    return {"type": "object", "properties": properties, "required": required} | more


def _array(draw: random.Random, depth: int) -> Schema:
    least = draw.randrange(3)
    bounds = draw.choice([{}, {"minItems": least}, {"minItems": least, "maxItems": least + draw.randrange(3)}])
    return {"type": "array", "items": random_schema(draw, depth - 1)} | bounds


def _tuple(draw: random.Random, depth: int) -> Schema:
    first = [random_schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]
    return {"type": "array", "prefixItems": first, "items": False, "minItems": draw.randint(0, len(first))}


def _any_of(draw: random.Random, depth: int) -> Schema:
    return {"anyOf": [random_schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]}
