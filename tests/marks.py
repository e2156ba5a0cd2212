"""Which cases run when: a few always, `slow` ones in CI as well, `exhaustive` ones before a release."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

SLOW = pytest.mark.slow
EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)  # so that -m slow alone is all of them


def some_in_ci(cases: Sequence[tuple], in_ci: Callable[[int], bool]) -> list[Any]:
    """The cases as slow ones, of which CI runs those whose index it is told."""
    return [pytest.param(*case, marks=SLOW if in_ci(index) else EXHAUSTIVE) for index, case in enumerate(cases)]


def first_always(cases: Sequence[Any]) -> list[Any]:
    """The first case always, the others as exhaustive ones."""
    return [cases[0], *(pytest.param(*_as_tuple(case), marks=EXHAUSTIVE) for case in cases[1:])]


def _as_tuple(case: Any) -> tuple:
    return case if isinstance(case, tuple) else (case,)
