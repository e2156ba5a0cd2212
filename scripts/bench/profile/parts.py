"""Assigns operations of a compiled training step to parts of the model, and sums their times.

An operation is an instruction of a compiled program that runs as one unit. A fusion is one operation, and belongs to
the part that its metadata names, even if XLA fused a neighbour's addition or conversion into it.
"""

import dataclasses
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

PARTS = (
    "dequantize",
    "dora",
    "frozen",
    "lora",
    "attention",
    "rope",
    "swiglu",
    "norm",
    "head",
    "whole_head",
    "whole_linear",
    "new_tokens",
    "bottleneck",
    "cayley",
    "rotation",
    "experts",
    "router",
    "shared_gate",
)  # named scopes of the model
OPTIMIZER, UPDATE, OTHER = "optimizer", "update", "other"
DIRECTIONS = ("forward", "backward", "recomputed")
COUNTED = {"again": "recomputed", "rebuild": "backward"}  # names of directions in training/cost/flops.py
CONTAINERS = {"while", "conditional", "call"}  # they run other operations, which are counted
KINDS = {
    "dynamic_update_slice": "writes into stacks",  # a layer's saved activations and gradients
    "dynamic_slice": "reads of stacks",
    "broadcast": "fills",
    "broadcast_in_dim": "fills",
    "add": "adds",
    "add_any": "adds",
    "copy": "copies",
    "convert": "conversions",
    "convert_element_type": "conversions",
    "reduce_precision": "conversions",
    "gather": "embedding",
}
COMPUTATION = re.compile(r"(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[\w-]+)\((?P<rest>.*)$")


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction of the optimized HLO.

    Attributes:
      source: `op_name` of its metadata, its path in the JAX program; "" if XLA added it.
      loop: `source` of the enclosing loop; "" outside of loops.
    """

    name: str
    shape: str
    opcode: str
    source: str
    loop: str = ""

    @property
    def direction(self) -> str:
        """Returns one of DIRECTIONS; an operation without a source has that of its loop."""
        return direction_of(self.source or self.loop)


class Event(NamedTuple):
    """One run of an operation. Times are in nanoseconds."""

    program: str
    name: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """The time of one operation in a step, median over steps.

    Attributes:
      calls: number of runs.
      thunk_ms: milliseconds from start to end, summed over calls.
      ms: milliseconds with each instant shared evenly among the running operations.
    """

    operation: Operation
    part: str
    direction: str
    calls: int
    thunk_ms: float
    ms: float


@dataclasses.dataclass
class PartTime:
    """Milliseconds of one part in a step, by direction; `thunk_ms` is defined in Measured."""

    directions: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    thunk_ms: float = 0.0

    @property
    def ms(self) -> float:
        """Returns the sum over directions."""
        return sum(self.directions.values())


def part_of(source: str) -> str:
    """Returns the innermost of PARTS among the scopes of an op_name, or OTHER."""
    scopes = [scope for scope in re.split(r"[/()]+", source) if scope in PARTS]
    return scopes[-1] if scopes else OTHER


def direction_of(source: str) -> str:
    """Returns one of DIRECTIONS: autodiff puts backward and recomputed operations into scopes with fixed names."""
    if "rematted_computation" in source:
        return "recomputed"
    return "backward" if "transpose(" in source else "forward"


def kind_of(operation: Operation) -> str:
    """Returns the kind of an operation outside of all parts: a value of KINDS, or "rest".

    The kind follows from the primitive, otherwise from the name of the fusion.
    """
    primitive = operation.source.rsplit("/", 1)[-1]
    names = [primitive] if primitive else re.split(r"[_.]", operation.name)
    kinds = [KINDS[name] for each in names if (name := each.replace("-", "_")) in KINDS]
    return kinds[0] if kinds else "rest"


def short(source: str) -> str:
    """Returns an op_name without the program and the enclosing loops."""
    return re.sub(r"^jit\(\w+\)/|while/body/|(?:closed_call|eval_jaxpr)/", "", source)


def operations_of(text: str) -> dict[str, Operation]:
    """Returns the instructions of a compiled program's text by name."""
    found, inside, loops, computation = {}, {}, {}, ""
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            computation = header["name"]
        elif match := INSTRUCTION.match(line):
            operation, body = _read(match)
            found[operation.name], inside[operation.name] = operation, computation
            loops |= {body: operation.source} if body else {}
    return {name: dataclasses.replace(each, loop=loops.get(inside[name], "")) for name, each in found.items()}


def _read(match: re.Match[str]) -> tuple[Operation, str]:
    """Returns (an instruction, the name of its body if it is a loop, otherwise "")."""
    source, body = (re.search(pattern, match["rest"]) for pattern in (r'op_name="([^"]*)"', r"body=%?([\w.-]+)"))
    operation = Operation(match["name"], without_layout(match["shape"]), match["opcode"], source[1] if source else "")
    return operation, body[1] if body else ""


def without_layout(shape: str) -> str:
    """Returns `bf16[4,8]` for `bf16[4,8]{1,0}`."""
    return re.sub(r"\{[^}]*\}", "", shape)


def shared_time(events: Iterable[Event]) -> dict[tuple[str, str], float]:
    """Returns (program, name) -> nanoseconds, whose sum is the time in which any operation ran.

    Two operations that run in parallel for a second get half a second each, which is roughly how much shorter the step
    would be without one of them.
    """
    listed = list(events)
    edges = [(event.start, False, index) for index, event in enumerate(listed)]
    edges += [(event.end, True, index) for index, event in enumerate(listed)]
    taken, running, before = defaultdict(float), set(), 0.0
    for moment, _, index in sorted(edges):
        for each in running:
            taken[listed[each][:2]] += (moment - before) / len(running)
        before = moment
        running ^= {index}
    return dict(taken)


def measure(steps: Sequence[Sequence[Event]], programs: Mapping[str, Mapping[str, Operation]]) -> list[Measured]:
    """Returns one entry per operation of `programs` that ran, longest first; other events are dropped."""
    known = [[event for event in step if _counts(event, programs)] for step in steps]
    shared = [shared_time(step) for step in known]
    alone = [_thunk_time(step) for step in known]
    calls = Counter(event[:2] for step in known for event in step)
    rows = []
    for (program, name), count in calls.items():
        operation = programs[program][name]
        part, direction = _place(program, operation)
        thunk_ms, ms = (_median_ms(taken, (program, name)) for taken in (alone, shared))
        sizes = {"calls": round(count / len(steps)), "thunk_ms": thunk_ms, "ms": ms}
        rows.append(Measured(operation=operation, part=part, direction=direction, **sizes))
    return sorted(rows, key=lambda row: -row.ms)


def _median_ms(steps: Sequence[Mapping[tuple[str, str], float]], key: tuple[str, str]) -> float:
    return statistics.median(step.get(key, 0.0) for step in steps) / 1e6


def _counts(event: Event, programs: Mapping[str, Mapping[str, Operation]]) -> bool:
    operation = programs.get(event.program, {}).get(event.name)
    return operation is not None and operation.opcode not in CONTAINERS


def _thunk_time(events: Iterable[Event]) -> dict[tuple[str, str], float]:
    taken = defaultdict(float)
    for event in events:
        taken[event[:2]] += event.end - event.start
    return dict(taken)


def _place(program: str, operation: Operation) -> tuple[str, str]:
    """Returns (part, direction) of an operation; outside of all parts, the part is its kind."""
    if program == OPTIMIZER:
        return OPTIMIZER, UPDATE
    part = part_of(operation.source)
    return (part if part != OTHER else f"{OTHER}: {kind_of(operation)}"), operation.direction


def by_part(rows: Iterable[Measured]) -> dict[str, PartTime]:
    """Returns sums over operations, longest part first."""
    parts = defaultdict(PartTime)
    for row in rows:
        parts[row.part].directions[row.direction] += row.ms
        parts[row.part].thunk_ms += row.thunk_ms
    return dict(sorted(parts.items(), key=lambda item: -item[1].ms))


def flop_by_part(counted: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Returns part -> {direction: FLOP} from cost.flops.flops, which has keys such as `frozen again`."""
    parts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name, flop in counted.items():
        part, direction = name.rsplit(" ", 1)
        parts[part][COUNTED.get(direction, direction)] += flop
    return {part: dict(directions) for part, directions in parts.items()}
