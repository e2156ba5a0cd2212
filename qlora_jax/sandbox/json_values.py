"""Plain values as JSON, for two processes that do not trust each other: no other object can cross.

A value becomes [type, content]. Values of subclasses, such as a Counter, become the plain type that they extend.
"""

import collections
import decimal
import fractions
import json
from collections.abc import Callable
from typing import NamedTuple

Content = bool | str | None | list


class PlainType(NamedTuple):
    """A type whose values can cross.

    Fields:
      to_content: value -> what JSON can hold.
      from_content: the inverse.
    """

    type: type
    to_content: Callable[..., Content]
    from_content: Callable[..., object]


def _listed(values: object) -> Content:
    return [_pack(value) for value in values]  # pyright: ignore[reportGeneralTypeIssues]


def _unlisted(contents: list) -> list:
    return [_unpack(content) for content in contents]


# A value has the first of these types that it is an instance of. Numbers are texts, which are exact and of any length.
_TYPES = {
    "none": PlainType(type(None), lambda _: None, lambda _: None),
    "bool": PlainType(bool, bool, bool),
    "int": PlainType(int, hex, lambda text: int(text, 16)),
    "float": PlainType(float, float.hex, float.fromhex),
    "complex": PlainType(complex, lambda v: [v.real.hex(), v.imag.hex()], lambda c: complex(*map(float.fromhex, c))),
    "str": PlainType(str, "".join, "".join),
    "bytes": PlainType(bytes, lambda value: bytes(value).hex(), bytes.fromhex),
    "list": PlainType(list, _listed, _unlisted),
    "tuple": PlainType(tuple, _listed, lambda contents: tuple(_unlisted(contents))),
    "set": PlainType(set, _listed, lambda contents: set(_unlisted(contents))),
    "frozenset": PlainType(frozenset, _listed, lambda contents: frozenset(_unlisted(contents))),
    "dict": PlainType(dict, lambda value: _listed(value.items()), lambda contents: dict(_unlisted(contents))),
    "deque": PlainType(collections.deque, _listed, lambda contents: collections.deque(_unlisted(contents))),
    "range": PlainType(range, lambda v: [hex(v.start), hex(v.stop), hex(v.step)], lambda c: _range(*c)),
    "fraction": PlainType(fractions.Fraction, str, fractions.Fraction),
    "decimal": PlainType(decimal.Decimal, str, decimal.Decimal),
}


def encode(value: object) -> bytes:
    """Encodes a value.

    Raises:
      TypeError: it has a type that cannot cross, or contains such a value.
      RecursionError: it is nested too deeply, or contains itself.
    """
    return json.dumps(_pack(value)).encode()


def decode(encoded: bytes) -> object:
    """Decodes a value from a process that may write anything.

    Raises:
      ValueError, TypeError, KeyError, RecursionError, MemoryError, ArithmeticError: not the encoding of a value.
    """
    return _unpack(json.loads(encoded))


def _pack(value: object) -> list:
    for name, plain in _TYPES.items():
        if isinstance(value, plain.type):
            return [name, plain.to_content(value)]
    raise TypeError(f"a value of type {type(value).__name__} cannot leave the process")


def _unpack(packed: list) -> object:
    name, content = packed
    return _TYPES[name].from_content(content)


def _range(*ends: str) -> range:
    return range(*(int(end, 16) for end in ends))
