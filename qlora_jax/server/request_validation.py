"""Reads the bodies of requests: bounded, strict JSON, with every field known.

A field is implemented, or it has a value that changes nothing (Body.inert), or the request is refused: nothing is
ignored.
"""

import asyncio
import collections
import json
import math
from collections.abc import Collection, Mapping
from typing import ClassVar, Never

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request

from qlora_jax.server.errors import ApiError, bad_request
from qlora_jax.untrusted_json import MAX_DEPTH, find_problems, is_too_deep, shorten, shorten_key

ANY = object()  # in Body.inert: every value changes nothing
BODY_SECONDS = 30.0  # for a body to arrive


class Fields(BaseModel):
    """A JSON object whose fields are all known."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Body(Fields):
    """The body of a request.

    Attributes:
      inert: fields that are not implemented, with the values that they may have, because these change nothing; null is
        always one of them.
    """

    inert: ClassVar[Mapping[str, Collection[object]]] = {}

    @classmethod
    def parse[T: "Body"](cls: type[T], value: object) -> T:
        """Returns a decoded body; raises ApiError that lists everything that is wrong with it."""
        if not isinstance(value, dict):
            raise bad_request([f"the body is not a JSON object (found {shorten(value)})"])
        problems = [
            f"{name}: not implemented (found {shorten(value[name])}, expected {_described(values)})"
            for name, values in cls.inert.items()
            if name in value and not _is_inert(value[name], values)
        ]
        given = {
            name: item
            for name, item in value.items()
            if name not in cls.inert and not (item is None and name in cls.model_fields)
        }
        problems += find_problems(given, cls)
        if problems:
            raise bad_request(problems)
        return cls.model_validate(given)


def _is_inert(value: object, values: Collection[object]) -> bool:
    return value is None or ANY in values or any(value == one and type(value) is type(one) for one in values)


def _described(values: Collection[object]) -> str:
    return " or ".join([*(json.dumps(value) for value in values), "null"])


async def read_body(request: Request, limit: int) -> bytes:
    """Returns the body of a request.

    Raises:
      ApiError: the body is not JSON by its headers, has more than `limit` bytes, or does not arrive.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(400, f"Content-Type: found {shorten(kind)}, expected application/json. Send JSON")
    if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
        raise ApiError(400, f"Content-Encoding: found {shorten(encoding)}, expected none. Send plain JSON")
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                content += piece
                if len(content) > limit:
                    raise ApiError(
                        413,
                        f"the body is too large (found more than {limit} bytes). Shorten it, or raise --max_body",
                        headers={"Connection": "close"},
                    )
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive in {BODY_SECONDS:g} s", headers={"Connection": "close"}) from None
    return bytes(content)


def decode_body(content: bytes) -> object:
    """Decodes JSON; raises ApiError for anything that another reader might read differently."""
    try:
        text = content.decode("utf-8")
        if is_too_deep(text):
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_not_a_number, parse_float=_finite)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is not a character
    except (UnicodeError, ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"a key occurs twice in an object: {shorten_key(twice)!r}")
    return found


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{shorten(text)} is too large")
    return value


def _not_a_number(text: str) -> Never:
    raise ValueError(f"{text} is not a number")
