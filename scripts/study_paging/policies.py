"""What a paging policy moves, counted exactly: P pages of one size, and a device with room for some of them.

A step touches every page once (a sweep), and changes it. A page is updated on the device alone, so it is fetched where
it is away; where the room is full another is written out before. At the start of a step pages may be sent away first,
to make room for a long batch. A policy says in which order a sweep goes and which page leaves.

No policy moves fewer than P - C pages each way in a step that starts and ends with C of them on the device: the others
are touched as well, so they come in, and as many go. Zigzag with Belady's rule, which is what qlora_jax.optim.page_pool
does, moves just that.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Room(NamedTuple):
    """Pages that the device has room for: while gradients are computed, and while pages are updated (1 or more)."""

    gradients: int
    update: int


class Moves(NamedTuple):
    """Pages moved in one step."""

    into: int
    out: int


@dataclasses.dataclass
class Residents:
    """Pages on the device, least recently used first, and which pages will be used, soonest first."""

    pages: list[int]
    future: Sequence[int]


def least_recently_used(residents: Residents) -> int:
    """What an operating system, or CUDA's managed memory, sends away."""
    return residents.pages[0]


def most_recently_used(residents: Residents) -> int:
    """The page that was just updated."""
    return residents.pages[-1]


def farthest_next_use(residents: Residents) -> int:
    """Belady's rule: the page that is wanted last; no rule moves less in a given order."""
    return max(residents.pages, key=residents.future.index)


class Policy(NamedTuple):
    """The order of step s, and the page that leaves."""

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
    """The moves of each step; all pages start away. Nothing leaves unless its room is wanted.

    Raises:
      ValueError: a step has no room to update one page.
    """
    if any(room.update < 1 for room in rooms):
        raise ValueError("a page is updated on the device: every step needs room for one page at least")
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
    """Sends pages away until `room` of them are left; how many went."""
    gone = 0
    while len(resident) > room:
        resident.remove(policy.victim(Residents(resident, future)))
        gone += 1
    return gone


def steady_moves(policy: Policy, pages: int, room: int, cycles: int = 64) -> float:
    """Pages moved in a step each way, in the mean over many steps at one room, the first few left out."""
    steps = 2 * cycles
    moves = simulate(policy, pages, [Room(room, room)] * (steps + 2 * pages))[-steps:]
    return sum(move.into for move in moves) / steps
