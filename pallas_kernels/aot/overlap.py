"""The gathers of a compiled program that run while products do, by XLA's schedule.

The order of instructions in an optimized HLO text is the order in which a card starts them. A gather runs between its
start and its end; if a product is started in between, it hides the gather, or a part of it. Times are not known.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from pallas_kernels.aot.collectives import ALL_GATHER, read_collectives
from pallas_kernels.aot.hlo import Instruction, parse

_START, _DONE = f"{ALL_GATHER}-start", f"{ALL_GATHER}-done"
_LIBRARY = re.compile(r"mosaic_gpu|__cublas|__cudnn")
BACKWARD = "transpose("  # in the scopes of everything that the backward pass runs, recomputation included


class Gather(NamedTuple):
    """One all-gather of packed bytes in a program's schedule.

    Fields:
      nbytes: of the whole arrays, times the trips of the loops around.
      products: how many products are started while it runs.
      backward: True in the backward pass.
    """

    nbytes: int
    products: int
    backward: bool


class Share(NamedTuple):
    """Bytes gathered, and the bytes of gathers during which a product runs."""

    hidden: int
    nbytes: int

    @property
    def percent(self) -> float:
        """100 * hidden / nbytes."""
        return 100 * self.hidden / self.nbytes


def read_gathers(text: str) -> list[Gather]:
    """Returns the all-gathers of u8 arrays of an optimized, scheduled HLO text."""
    sizes: dict[str, int] = {}
    for one in read_collectives(text):
        if one.operation == ALL_GATHER and one.dtype == "u8" and one.times is not None:
            sizes[one.instruction] = sizes.get(one.instruction, 0) + one.times * one.array.nbytes
    computations, _ = parse(text)
    schedules = (list(inside.values()) for inside in computations.values())
    return [gather for schedule in schedules for gather in _gathers_of(schedule, sizes, computations)]


def _gathers_of(
    schedule: list[Instruction], sizes: Mapping[str, int], computations: Mapping[str, Mapping[str, Instruction]]
) -> Iterator[Gather]:
    """Yields the gathers that one computation starts; one without an end there runs into the next iteration."""
    for at, instruction in enumerate(schedule):
        if instruction.name in sizes:
            products = sum(is_product(one, computations) for one in _between(schedule, at))
            yield Gather(sizes[instruction.name], products, BACKWARD in instruction.op_name)


def _between(schedule: list[Instruction], start: int) -> Sequence[Instruction]:
    """Returns the instructions between the start of a gather and its end; none if both are one instruction."""
    begun = schedule[start]
    if begun.op != _START:
        return []
    ends = (at for at, one in enumerate(schedule) if at > start and one.op == _DONE and begun.name in _names(one))
    return schedule[start + 1 : next(ends, len(schedule))]


def _names(instruction: Instruction) -> list[str]:
    return [operand.split("%")[-1] for operand in instruction.operands]


def is_product(instruction: Instruction, computations: Mapping[str, Mapping[str, Instruction]]) -> bool:
    """Returns True for a matrix product, alone or in a fusion or loop: of a fused kernel, a library, or Triton."""
    if instruction.op == "dot" or (instruction.op == "custom-call" and _LIBRARY.search(instruction.rest)):
        return True
    inside = (one for called in instruction.called for one in computations.get(called, {}).values())
    return any(is_product(one, computations) for one in inside)


def hidden_share(gathers: Iterable[Gather], *, backward: bool) -> Share:
    """Sums the gathers of one direction."""
    own = [gather for gather in gathers if gather.backward is backward]
    return Share(sum(gather.nbytes for gather in own if gather.products), sum(gather.nbytes for gather in own))
