"""A mistake in one place of the code."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """One mistake: the first occurrence of `old` in `file` becomes `new`; one of `tests` must fail."""

    file: str
    old: str
    new: str
    tests: str
