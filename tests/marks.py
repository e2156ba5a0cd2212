"""Marks that select cases: unmarked ones always run, `slow` ones also in CI, `exhaustive` ones before a release."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

SLOW = pytest.mark.slow
EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)  # -m slow selects them, too


def some_in_ci(cases: Sequence[tuple], in_ci: Callable[[int], bool]) -> list[Any]:
    """Marks all cases slow, and those whose index fails `in_ci` exhaustive, too."""
    return [pytest.param(*case, marks=SLOW if in_ci(index) else EXHAUSTIVE) for index, case in enumerate(cases)]


def first_always(cases: Sequence[Any]) -> list[Any]:
    """Leaves the first case unmarked and marks the others exhaustive."""
    return [cases[0], *(pytest.param(*_as_tuple(case), marks=EXHAUSTIVE) for case in cases[1:])]


def first_slow(cases: Sequence[Any]) -> list[Any]:
    """Marks the first case slow and the others exhaustive."""
    return some_in_ci([_as_tuple(case) for case in cases], lambda index: index == 0)


def _as_tuple(case: Any) -> tuple:
    return case if isinstance(case, tuple) else (case,)
