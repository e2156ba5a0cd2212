"""Plain values cross between processes unchanged; nothing else does."""

import collections
import decimal
import enum
import fractions
import math

import hypothesis
import pytest
from hypothesis import strategies as st

from qlora_jax.sandbox.json_values import decode, encode

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.sets(st.integers() | st.text())
        | st.frozensets(st.floats(allow_nan=False))
    ),
)


def equal(a: object, b: object) -> bool:
    return type(a) is type(b) and a == b


@hypothesis.settings(max_examples=25)
@hypothesis.given(PLAIN)
def test_values_cross(value):
    assert equal(decode(encode(value)), value)


def test_other_types_become_the_plain_type_that_they_extend():
    class Colour(enum.IntEnum):
        RED = 3

    Point = collections.namedtuple("Point", "x y")
    for value, plain in [
        (Colour.RED, 3),
        (Point(1, [2]), (1, [2])),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.deque([1]), collections.deque([1])),
        (fractions.Fraction(1, 3), fractions.Fraction(1, 3)),
        (decimal.Decimal("1.10"), decimal.Decimal("1.10")),
        (range(3, 1, -1), range(3, 1, -1)),
        (1 + 2j, 1 + 2j),
        (10**6000, 10**6000),
        ("\ud800", "\ud800"),
    ]:
        assert equal(decode(encode(value)), plain)
    assert math.isnan(decode(encode(math.nan)))


@pytest.mark.parametrize("value", [object(), len, lambda: 1, [object()], {1: int}, iter([])])
def test_other_objects_do_not(value):
    with pytest.raises(TypeError, match="cannot leave the process"):
        encode(value)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"1",
        b"{}",
        b"[]",
        b'["list"]',
        b'["eval", "1"]',
        b'["int", "x"]',
        b'["list", [1]]',
        b'["set", [["list", []]]]',
        b'["list", [' * 10000,
    ],
)
def test_a_malformed_message_is_an_error(message):
    with pytest.raises((ValueError, TypeError, KeyError, RecursionError)):
        decode(message)
