"""The paging study's arithmetic on points that are given by hand; nothing is compiled."""

import gzip

import pytest

from qlora_jax.optim.page_layout import PAGE_BYTES

MIB = 2**20


@pytest.fixture
def needs(load_with_neighbours):
    return load_with_neighbours("paging_needs")


@pytest.fixture
def seven(needs):
    """LLaMA-7B whose scratch is 100 MiB at 512 tokens, 200 at 2048, and 1736 at 8192."""
    sizes = {512: 100, 2048: 200, 8192: 1736}
    points = [needs.Point("llama-7b", "a6000", "full", length, size * MIB) for length, size in sizes.items()]
    return needs.Needs.of(points, "llama-7b", "a6000", "full")


def test_scratch_lies_on_the_line_through_two_neighbours(seven):
    for rows, expected in {512: 100, 1280: 150, 2048: 200, 4096: 712, 8192: 1736, 10240: 2248}.items():
        assert seven.scratch(rows) == pytest.approx(expected * MIB)


def test_what_is_held_and_kept_is_that_of_the_formulas(seven):
    assert seven.lora == 4 * 159_907_840 and seven.state == 8 * 159_907_840 + 8
    assert seven.held == pytest.approx((3.504 + 0.096 + 2 * 0.596) * 2**30, rel=1e-3)
    assert seven.moving(1024) - seven.scratch(1024) == 32 * 1024 * 4096 * 2


def test_the_longest_row_fits_and_the_next_does_not(seven):
    limit = 12 * 2**30
    longest = seven.longest(limit, seven.state)
    total = [seven.held + seven.state + seven.moving(rows) for rows in (longest, longest + 64)]
    assert longest % 64 == 0 and total[0] <= limit < total[1]
    assert seven.longest(2**30, 0) == 0


def test_every_cell_is_asked_for_once(needs):
    wanted = list(needs.missing([]))
    assert len(wanted) == len(set(wanted)) == 5 * sum(map(len, needs.CELLS.values()))
    done = needs.Point(*wanted[0], 1)
    assert list(needs.missing([done])) == wanted[1:]


def test_batches_that_leave_room_move_nothing_and_long_ones_move_what_they_need(seven, load_with_neighbours):
    study = load_with_neighbours("paging_lengths")
    data = {"buckets": [512, 2048], "steps": "0010010"}
    pages = -(-seven.state // PAGE_BYTES)
    extra = seven.moving(2048) - seven.moving(512)
    # Room for all pages beside a short batch, and a page to spare.
    enough = (seven.held + (pages + 1) * PAGE_BYTES + seven.moving(512)) / (1 - study.RESERVE)
    moved = study.moved_pages(seven, enough, 1, data)
    away = -(-(extra - PAGE_BYTES) // PAGE_BYTES)
    assert [steps > 0 for steps in moved] == [False, True, False, False, True, False]
    assert set(moved) == {0, 2 * away}
    assert study.moved_pages(seven, enough + extra / (1 - study.RESERVE), 1, data) == [0] * 6
    assert study.moved_pages(seven, seven.held, 1, data) is None


def test_articles_are_cut_at_their_titles(load_with_neighbours, tmp_path):
    study = load_with_neighbours("paging_lengths")
    text = " \n = First = \n \n One . \n = = Part = = \n Two . \n \n = Second = \n \n Three . \n"
    (tmp_path / "text.gz").write_bytes(gzip.compress(text.encode()))
    parts = [row["text"] for row in study.SOURCES["WikiText-2 articles"](tmp_path / "text.gz")]
    assert [part.split()[0] for part in parts] == ["One", "Three"] and "Two" in parts[0]
