"""Paging policies: counts by hand for a few pages, the lower bound, and equality with the moves of the pager."""

import pytest

from qlora_jax.optim.pager import evict_to_budget
from scripts.study_paging import policies as study
from tests.optim.test_pager import ARGS, MEMORY, PAGES, Run, page_size

LRU, MRU, BELADY, LRU_ZIGZAG, ZIGZAG = range(5)  # places in the table of policies


@pytest.fixture
def moved():
    """Returns a function of (policy, pages, room, steps) that returns the moves of each step."""

    def moved(which, pages, room, steps):
        return study.simulate(list(study.POLICIES.values())[which], pages, [study.Room(room, room)] * steps)

    return moved


@pytest.fixture
def steady():
    """Returns a function of (policy, pages, room) that returns the pages moved per step in the steady state."""
    return lambda which, *args, **kwargs: study.steady_moves(list(study.POLICIES.values())[which], *args, **kwargs)


def test_three_pages_two_places_by_hand(moved):
    # 012 012: LRU has just sent away the page that comes next.
    assert moved(LRU, 3, 2, 3) == [(3, 1), (3, 3), (3, 3)]
    # 012 | 012: with 0, 1 there, 2 takes the place of 1 (MRU): 0 2 stay; 0 hit, 1 replaces 0, 2 hit; 0 replaces 2 ...
    assert moved(MRU, 3, 2, 4) == [(3, 1), (1, 1), (2, 2), (1, 1)]
    # Belady, same order: 2 takes the place of 1, for 0 comes sooner; then 1 takes that of 0, for 2 comes sooner; then 0
    # is missing and takes 2's place (1 comes sooner), and 2 takes 1's, since 0 comes sooner again.
    assert moved(BELADY, 3, 2, 4) == [(3, 1), (1, 1), (2, 2), (1, 1)]
    # 012 210 012: 2 and 1 are there when the way back begins, and 0 takes the place of 2.
    assert moved(LRU_ZIGZAG, 3, 2, 3) == [(3, 1), (1, 1), (1, 1)]
    assert moved(ZIGZAG, 3, 2, 3) == [(3, 1), (1, 1), (1, 1)]


def test_lru_hits_nothing_below_full_room_and_all_at_it(steady):
    for pages in (2, 5, 32):
        for room in range(1, pages):
            assert steady(LRU, pages, room) == pages
        assert steady(LRU, pages, pages) == 0


@pytest.mark.parametrize("pages", [2, 3, 8, 32])
def test_zigzag_moves_p_minus_c_and_nothing_moves_less(steady, pages):
    for room in range(1, pages + 1):
        assert steady(ZIGZAG, pages, room) == pages - room
        for policy in range(5):
            assert steady(policy, pages, room) >= pages - room - 1e-9


def test_belady_in_one_order_moves_p_minus_c_times_p_over_p_minus_1(steady):
    assert steady(BELADY, 32, 5, cycles=31 * 8) == pytest.approx((32 - 5) * 32 / 31)


def test_a_long_batch_sends_away_what_it_needs_and_it_comes_back():
    rooms = [(4, 4), (4, 4), (1, 4), (4, 4), (0, 2), (4, 4)]
    found = study.simulate(study.POLICIES[study.OURS], 4, [study.Room(*room) for room in rooms])
    assert found == [
        (4, 0),
        (0, 0),
        (3, 3),  # three go before the gradients and come back for their update
        (0, 0),
        (4, 6),  # all go; four come, and two go again since there is room for two
        (2, 0),
    ]


def test_a_step_needs_room_for_a_page(moved):
    with pytest.raises(ValueError, match="room for a page"):
        moved(ZIGZAG, 4, 0, 1)


@pytest.mark.parametrize("rooms", [[2] * 6, [1] * 6, [4, 4, 1, 3, 2, 4, 1, 1, 4], [3, 1, 4, 2, 2, 4]])
def test_the_pager_moves_what_the_simulation_says(rooms):
    """Also with room that changes between steps."""
    size, run = page_size(ARGS), Run(ARGS)
    found = []
    for room in rooms:
        run.state, sent = evict_to_budget(run.state, MEMORY, room * size)
        run.go(room * size, steps=1)
        found.append((run.moves[-1].pages_in, sent.pages_out + run.moves[-1].pages_out))
    assert found == study.simulate(study.POLICIES[study.OURS], PAGES, [study.Room(room, room) for room in rooms])
