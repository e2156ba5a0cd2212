"""Simulates paging policies: counts exactly the moves of P pages of one size, with room for some on the device.

A step updates every page once (a sweep). A page is updated on the device, so an evicted page is fetched; if there is no
room, another page is evicted first. At the start of a step, pages may be evicted to make room for a long batch. A
policy defines the order of a sweep and the page to evict.

No policy moves fewer than P - C pages each way in a step that starts and ends with C pages on the device: the others
are updated too, so they come in, and as many are evicted. Zigzag with Belady's rule, the policy of
qlora_jax.optim.page_pool, moves exactly that.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Room(NamedTuple):
    """Number of pages for which the device has room: during gradients, and during updates (1 or more)."""

    gradients: int
    update: int


class Moves(NamedTuple):
    """Numbers of pages moved in one step."""

    into: int
    out: int


@dataclasses.dataclass
class Residents:
    """Pages on the device, least recently used first, and future uses, soonest first."""

    pages: list[int]
    future: Sequence[int]


def least_recently_used(residents: Residents) -> int:
    """Returns the page that an operating system, or CUDA's managed memory, evicts."""
    return residents.pages[0]


def most_recently_used(residents: Residents) -> int:
    """Returns the page that was just updated."""
    return residents.pages[-1]


def farthest_next_use(residents: Residents) -> int:
    """Returns the page whose next use is last: Belady's rule, which is optimal for a given order."""
    return max(residents.pages, key=residents.future.index)


class Policy(NamedTuple):
    """The order of a sweep, and the choice of the page to evict."""

    order: Callable[[int, int], Sequence[int]]  # (step, P)
    victim: Callable[[Residents], int]


def _forward(step: int, pages: int) -> Sequence[int]:
    return range(pages)


def _back_and_forth(step: int, pages: int) -> Sequence[int]:
    return range(pages) if step % 2 == 0 else range(pages - 1, -1, -1)


POLICIES = {
    "LRU, same order each step": Policy(_forward, least_recently_used),
    "MRU, same order each step": Policy(_forward, most_recently_used),
    "optimal for the same order (Belady)": Policy(_forward, farthest_next_use),
    "LRU, zigzag": Policy(_back_and_forth, least_recently_used),
    "zigzag with Belady's rule (this project)": Policy(_back_and_forth, farthest_next_use),
}
OURS = "zigzag with Belady's rule (this project)"


def simulate(policy: Policy, pages: int, rooms: Sequence[Room]) -> list[Moves]:
    """Returns the moves of each step. All pages start on the host, and pages are evicted only if their room is needed.

    Raises:
      ValueError: a step has no room for a page during updates.
    """
    if any(room.update < 1 for room in rooms):
        raise ValueError(
            "rooms: a step has no room for a page. Updates run on the device, so it needs room for one page."
        )
    resident: list[int] = []
    moves = []
    for step, room in enumerate(rooms):
        order, after = policy.order(step, pages), list(policy.order(step + 1, pages))
        out = _shrink(policy, resident, room.gradients, [*order, *after])
        into = 0
        for turn, page in enumerate(order):
            if page in resident:
                resident.remove(page)
            else:
                future = [*order[turn:], *after]
                out += _shrink(policy, resident, room.update - 1, future)
                into += 1
            resident.append(page)
        moves.append(Moves(into, out))
    return moves


def _shrink(policy: Policy, resident: list[int], room: int, future: Sequence[int]) -> int:
    """Evicts pages until `room` of them are left; returns the number of evicted pages."""
    evicted = 0
    while len(resident) > room:
        resident.remove(policy.victim(Residents(resident, future)))
        evicted += 1
    return evicted


def steady_moves(policy: Policy, pages: int, room: int, cycles: int = 64) -> float:
    """Returns the mean pages moved each way per step, over many steps at a constant room, without the first steps."""
    steps = 2 * cycles
    moves = simulate(policy, pages, [Room(room, room)] * (steps + 2 * pages))[-steps:]
    return sum(move.into for move in moves) / steps
