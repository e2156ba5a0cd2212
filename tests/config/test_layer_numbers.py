"""Numbers of layers in settings."""

import pytest

from qlora_jax.config.parse import parse_layers


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, (3,)), ([4, 0, 4], (0, 4)), ("2", (2,)), ("8-10, 3,9 - 11", (3, 8, 9, 10, 11)), ("5-5", (5,))],
)
def test_numbers_and_ranges(value, expected):
    assert parse_layers(value) == expected


@pytest.mark.parametrize("value", [[], -1, [2, -3], "", "a", "1,", "1-", "-2", "3-1", "1:2", "all"])
def test_anything_else_is_refused(value):
    with pytest.raises(ValueError, match="found"):
        parse_layers(value)
