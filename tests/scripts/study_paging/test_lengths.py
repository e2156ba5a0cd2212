"""Batches of the paging study: which pages they move, and how rows are read."""

import gzip

from qlora_jax.optim.page_layout import PAGE_BYTES
from scripts.study_paging import lengths


def test_batches_that_leave_room_move_nothing_and_long_ones_move_what_they_need(seven):
    data = {"buckets": [512, 2048], "steps": "0010010"}
    pages = -(-seven.state // PAGE_BYTES)
    extra = seven.per_batch(2048) - seven.per_batch(512)
    # Room for all pages beside a short batch, and a page to spare.
    enough = (seven.fixed + (pages + 1) * PAGE_BYTES + seven.per_batch(512)) / (1 - lengths.RESERVE)
    moved = lengths.moved_pages(seven, enough, 1, data)
    away = -(-(extra - PAGE_BYTES) // PAGE_BYTES)
    assert [steps > 0 for steps in moved] == [False, True, False, False, True, False]
    assert set(moved) == {0, 2 * away}
    assert lengths.moved_pages(seven, enough + extra / (1 - lengths.RESERVE), 1, data) == [0] * 6
    assert lengths.moved_pages(seven, seven.fixed, 1, data) is None


def test_articles_are_cut_at_their_titles(tmp_path):
    text = " \n = First = \n \n One . \n = = Part = = \n Two . \n \n = Second = \n \n Three . \n"
    (tmp_path / "text.gz").write_bytes(gzip.compress(text.encode()))
    parts = [row["text"] for row in lengths.SOURCES["WikiText-2 articles"](tmp_path / "text.gz")]
    assert [part.split()[0] for part in parts] == ["One", "Three"] and "Two" in parts[0]
