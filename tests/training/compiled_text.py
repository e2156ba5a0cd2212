"""Reads a compiled program's text: the FLOP of its products, the types its loops carry, and the arrays it computes.

A product is a `dot` instruction, alone or inside a fusion, or a call of cuBLAS or of our loops for frozen weights.
FLOP = 2 * elements of the result * contracted length, and each loop around it multiplies by its trip count.
"""

import json
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from pallas_kernels.aot.hlo import Instruction, parse

PASSES_ON = {"parameter", "tuple", "get-tuple-element", "while", "bitcast", "conditional", "call"}
# For compile(): the same text and memory in half the time, of machine code that nobody runs.
TO_READ = {"xla_backend_optimization_level": 0}


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
    known = [(i.trips, i) for i in instructions if i.trips is not None]
    return [Loop(trips, re.findall(r"\w+\[[\d,]*\]", i.type), i.op_name) for trips, i in known]


def computed(text: str) -> set[str]:
    """Returns the types of computed arrays, also inside fusions; omits operations that only pass arrays on."""
    instructions = [i for computation in parse(text)[0].values() for i in computation.values()]
    return {kind for i in instructions if i.op not in PASSES_ON for kind in re.findall(r"\w+\[[\d,]*\]", i.type)}


def nbytes(kind: str) -> int:
    """Bytes of a type such as `bf16[8,16]`."""
    bits = re.search(r"\d+", kind.split("[")[0])
    return math.prod(shape_of(kind)) * (int(bits[0]) // 8 if bits else 1)


def operations(text: str) -> int:
    """The number of operations that a program for a GPU runs outside products, each a launch or a copy; all branches of
    a conditional. Products are calls of cuBLAS and of our kernels, and fusions around a `dot`."""
    computations, entry = parse(text)
    return int(_operations(computations, entry, 1))


def _operations(computations, name: str, enclosing: int) -> Fraction:
    """The operations of one computation that runs once; `enclosing`: trips of the loop around it."""
    found = Fraction(0)
    for instruction in computations[name].values():
        is_product = any(word in instruction.rest for word in ("__cublas$", "__triton_nested_gemm", "mosaic_gpu"))
        is_end = instruction.op.endswith("-done")  # its start was counted
        found += instruction.op not in {*PASSES_ON, "constant"} and not is_product and not is_end
        if instruction.op in ("while", "conditional", "call"):
            trips = _trips(instruction, enclosing)
            inner = int(trips) if instruction.op == "while" else enclosing
            found += trips * sum(_operations(computations, called, inner) for called in instruction.called)
    return found


def _dots(computations, name: str, times: Fraction, enclosing: int) -> Iterator[Dot]:
    """The products of one computation that runs `times` times; `enclosing`: trips of the loop around it."""
    instructions = computations[name]
    for instruction in instructions.values():
        if instruction.op == "dot":
            batched = "lhs_batch_dims" in instruction.rest
            yield Dot(_dot_flops(instruction, instructions), times, instruction.op_name, batched)
        elif '"__cublas$' in instruction.rest:
            yield Dot(_cublas_flops(instruction, instructions), times, instruction.op_name)
        elif re.search(r'custom_call_target="(nf4_product|nf4_rows|dense_rows|product_f32)', instruction.rest):
            yield Dot(_flops(instruction, instructions, [1]), times, instruction.op_name)
        trips = _trips(instruction, enclosing)
        for called in instruction.called:
            inner = int(trips) if instruction.op == "while" else enclosing
            yield from _dots(computations, called, times * trips, inner)


def _trips(instruction: Instruction, enclosing: int) -> Fraction:
    """A loop's trips. Those that the compiler does not know are causal attention's loops over the key chunks before
    chunk i of the queries, in a loop over i from 0 to n - 1: (n - 1) / 2 in the mean."""
    if instruction.op != "while":
        return Fraction(1)
    return Fraction(enclosing - 1, 2) if instruction.trips is None else Fraction(instruction.trips)


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
