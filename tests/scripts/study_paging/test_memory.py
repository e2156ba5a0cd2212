"""The memory arithmetic of the paging study, on points given by hand."""

import pytest

from scripts.study_paging import memory
from tests.scripts.study_paging.conftest import MIB


def test_scratch_lies_on_the_line_through_two_neighbours(seven):
    for rows, expected in {512: 100, 1280: 150, 2048: 200, 4096: 712, 8192: 1736, 10240: 2248}.items():
        assert seven.scratch(rows) == pytest.approx(expected * MIB)


def test_what_is_held_and_kept_is_that_of_the_formulas(seven):
    assert seven.lora == 4 * 159_907_840 and seven.state == 8 * 159_907_840 + 8
    assert seven.fixed == pytest.approx((3.504 + 0.096 + 2 * 0.596) * 2**30, rel=1e-3)
    assert seven.per_batch(1024) - seven.scratch(1024) == 32 * 1024 * 4096 * 2


def test_the_longest_row_fits_and_the_next_does_not(seven):
    limit = 12 * 2**30
    longest = seven.longest(limit, seven.state)
    total = [seven.fixed + seven.state + seven.per_batch(rows) for rows in (longest, longest + 64)]
    assert longest % 64 == 0 and total[0] <= limit < total[1]
    assert seven.longest(2**30, 0) == 0


def test_every_cell_is_asked_for_once():
    wanted = list(memory.missing([]))
    assert len(wanted) == len(set(wanted)) == 5 * sum(map(len, memory.CELLS.values()))
    done = memory.Point(*wanted[0], 1)
    assert list(memory.missing([done])) == wanted[1:]
