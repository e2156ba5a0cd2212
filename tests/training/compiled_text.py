"""Reads a compiled program's text: the FLOP of its products, the types its loops carry, and the arrays it computes.

A product is a `dot` instruction, alone or inside a fusion, or a call of cuBLAS. FLOP = 2 * elements of the result *
contracted length, and each loop around it multiplies by its trip count.
"""

import json
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w-]+)\((?P<rest>.*)$")
HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
PASSES_ON = {"parameter", "tuple", "get-tuple-element", "while", "bitcast", "conditional", "call"}
# For compile(): the same text and memory in half the time, of machine code that nobody runs.
TO_READ = {"xla_backend_optimization_level": 0}
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str
    op: str
    rest: str

    @property
    def op_name(self) -> str:
        """The path of scopes that it was traced in."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


class Loop(NamedTuple):
    """A `while`: how often it runs, and the types that it carries from one iteration to the next."""

    trips: int
    carried: list[str]
    op_name: str


class Dot(NamedTuple):
    """One product, and how often it runs; `batched`: it has batch dimensions."""

    flops: int
    times: Fraction
    op_name: str
    batched: bool = False


def dots(text: str) -> list[Dot]:
    """Every product that a program runs; both branches of a conditional."""
    computations, entry = parse(text)
    return list(_dots(computations, entry, Fraction(1), 1))


def loops(text: str) -> list[Loop]:
    """Every loop with a known trip count."""
    instructions = [i for computation in parse(text)[0].values() for i in computation.values() if i.op == "while"]
    known = [(trips, i) for i in instructions if (trips := TRIPS.search(i.rest))]
    return [Loop(int(trips[1]), re.findall(r"\w+\[[\d,]*\]", i.type), i.op_name) for trips, i in known]


def computed(text: str) -> set[str]:
    """Returns the types of computed arrays, also inside fusions; omits operations that only pass arrays on."""
    instructions = [i for computation in parse(text)[0].values() for i in computation.values()]
    return {kind for i in instructions if i.op not in PASSES_ON for kind in re.findall(r"\w+\[[\d,]*\]", i.type)}


def nbytes(kind: str) -> int:
    """Bytes of a type such as `bf16[8,16]`."""
    bits = re.search(r"\d+", kind.split("[")[0])
    return math.prod(shape_of(kind)) * (int(bits[0]) // 8 if bits else 1)


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """({computation: {name: instruction}}, the entry's name)."""
    computations, entry, inside = {}, "", {}
    for line in text.splitlines():
        if header := HEADER.match(line):
            inside = computations.setdefault(header["name"], {})
            entry = header["name"] if header["entry"] else entry
        elif found := INSTRUCTION.match(line):
            inside[found["name"]] = Instruction(found["name"], found["type"], found["op"], found["rest"])
    return computations, entry


def _dots(computations, name: str, times: Fraction, enclosing: int) -> Iterator[Dot]:
    """The products of one computation that runs `times` times; `enclosing`: trips of the loop around it."""
    instructions = computations[name]
    for instruction in instructions.values():
        if instruction.op == "dot":
            batched = "lhs_batch_dims" in instruction.rest
            yield Dot(_dot_flops(instruction, instructions), times, instruction.op_name, batched)
        elif '"__cublas$' in instruction.rest:
            yield Dot(_cublas_flops(instruction, instructions), times, instruction.op_name)
        trips = _trips(instruction, enclosing)
        for called in _called(instruction):
            inner = int(trips) if instruction.op == "while" else enclosing
            yield from _dots(computations, called, times * trips, inner)


def _trips(instruction: Instruction, enclosing: int) -> Fraction:
    """A loop's trips. Those that the compiler does not know are causal attention's loops over the key chunks before
    chunk i of the queries, in a loop over i from 0 to n - 1: (n - 1) / 2 in the mean."""
    if instruction.op != "while":
        return Fraction(1)
    known = TRIPS.search(instruction.rest)
    return Fraction(int(known[1])) if known else Fraction(enclosing - 1, 2)


def _called(instruction: Instruction) -> list[str]:
    branches = BRANCHES.search(instruction.rest)
    listed = re.findall(r"%?([\w.-]+)", branches[1]) if branches else []
    return CALLED.findall(instruction.rest) + listed


def shape_of(kind: str) -> list[int]:
    """The dimensions of a type such as `bf16[8,16]{1,0}`; of a tuple its first element's."""
    return [int(size) for size in re.search(r"\[([\d,]*)\]", kind)[1].split(",") if size]


def _dot_flops(dot: Instruction, instructions: dict[str, Instruction]) -> int:
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.rest)[1]
    return _flops(dot, instructions, [int(axis) for axis in axes.split(",")])


def _cublas_flops(call: Instruction, instructions: dict[str, Instruction]) -> int:
    config = json.loads(re.search(r"backend_config=(\{.*\})", call.rest)[1])
    numbers = config["gemm_backend_config"]["dot_dimension_numbers"]
    return _flops(call, instructions, [int(axis) for axis in numbers["lhs_contracting_dimensions"]])


def _flops(dot: Instruction, instructions: dict[str, Instruction], axes: list[int]) -> int:
    left = instructions[re.match(r"%?([\w.-]+)", dot.rest)[1]]
    sizes = shape_of(left.type)
    return 2 * math.prod(shape_of(dot.type)) * math.prod(sizes[axis] for axis in axes)
