"""Reads the text of a compiled program: computations, instructions, types, and what a loop or branch calls.

A computation runs as often as the loops around it say. XLA writes a loop's trip count into the text where it knows it.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w-]+)\((?P<rest>.*)$")
_HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+\d\w*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")


class Instruction(NamedTuple):
    """One line of a computation; `rest` is everything after the opening parenthesis of its operands."""

    name: str
    type: str
    op: str
    rest: str

    @property
    def op_name(self) -> str:
        """The path of scopes that it was traced in, or ""."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def trips(self) -> int | None:
        """A loop's trip count; None if XLA does not know it, and for every other instruction."""
        known = _TRIPS.search(self.rest) if self.op == "while" else None
        return int(known[1]) if known else None

    @property
    def called(self) -> list[str]:
        """The names of computations that it runs: a loop's body, a conditional's branches, a fusion's or call's."""
        branches = _BRANCHES.search(self.rest)
        listed = re.findall(r"%?([\w.-]+)", branches[1]) if branches else []
        return _CALLED.findall(self.rest) + listed

    @property
    def operands(self) -> list[str]:
        """Its operands as text: names, with types if XLA prints them."""
        found, depth = [""], 0
        for letter in self.rest:
            depth += (letter in "([{") - (letter in ")]}")
            if depth < 0:  # the parenthesis that closes the operands
                break
            if letter == "," and depth == 0:
                found.append("")
            else:
                found[-1] += letter
        return [operand.strip() for operand in found if operand.strip()]


class Array(NamedTuple):
    """The type of one array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes; 4-bit types are packed, and a pred is a byte."""
        bits = 8 if self.dtype == "pred" else int(_BITS.findall(self.dtype)[0])
        return -(-self.elements * bits // 8)


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Returns ({computation: {name: instruction}}, the entry's name), in the text's order, which is the schedule."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, inside = "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            inside = computations.setdefault(header["name"], {})
            entry = header["name"] if header["entry"] else entry
        elif found := _INSTRUCTION.match(line):
            inside[found["name"]] = Instruction(found["name"], found["type"], found["op"], found["rest"])
    return computations, entry


def arrays(type_text: str) -> list[Array]:
    """Returns the arrays of a type: one, or the members of a tuple and of tuples in it, in order."""
    found = _ARRAY.findall(type_text)
    return [Array(dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in found]


class Run(NamedTuple):
    """The number of times that an instruction runs.

    Fields:
      times: per run of the program; None if XLA does not know the trip count of a loop around it.
      conditional: True in a branch, which may run less often.
    """

    times: int | None
    conditional: bool


def runs(text: str) -> Iterator[tuple[Instruction, Run]]:
    """Yields (instruction, how often it runs) for each path from the entry computation to an instruction."""
    computations, entry = parse(text)
    yield from _runs(computations, entry, Run(1, False))


def _runs(
    computations: Mapping[str, Mapping[str, Instruction]], name: str, run: Run
) -> Iterator[tuple[Instruction, Run]]:
    for instruction in computations.get(name, {}).values():
        yield instruction, run
        if instruction.op not in ("async-update", "async-done"):  # the operation counts where it starts
            for called in instruction.called:
                yield from _runs(computations, called, _within(instruction, run))


def _within(instruction: Instruction, run: Run) -> Run:
    """Returns how often the computations that an instruction calls run."""
    if instruction.op == "while":
        trips = instruction.trips
        return run._replace(times=None if trips is None or run.times is None else run.times * trips)
    return run._replace(conditional=run.conditional or instruction.op == "conditional")
