"""Which part of a training step an operation belongs to, and how long each took: the arithmetic of train_step.py.

An operation is an instruction of a compiled program that runs as one piece. What XLA fused is one operation, and goes
to the part that its metadata names, even where a neighbour's addition or conversion was fused into it.
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
)  # named scopes of the model
OPTIMIZER, UPDATE, OTHER = "optimizer", "update", "other"
DIRECTIONS = ("forward", "backward", "recomputed")
COUNTED = {"again": "recomputed"}  # a direction as counts.py calls it
CONTAINERS = {"while", "conditional", "call"}  # their time is that of what they run, which is told as well
KINDS = {
    "dynamic_update_slice": "writes into stacks",  # of a layer's activations that are kept, of its gradients
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
      source: `op_name` of its metadata, the path in the JAX program that it comes from; "" for what XLA added.
      loop: `source` of the loop that it is in; "" outside of loops.
    """

    name: str
    shape: str
    opcode: str
    source: str
    loop: str = ""

    @property
    def direction(self) -> str:
        """One of DIRECTIONS; what has no source runs when its loop does."""
        return direction_of(self.source or self.loop)


class Event(NamedTuple):
    """An operation ran, once. Times are in nanoseconds."""

    program: str
    name: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What one operation took in a step, median over steps.

    Attributes:
      calls: how often it ran.
      thunk_ms: from its start to its end, summed over calls.
      ms: the same, with each instant shared out evenly among the operations that ran in it.
    """

    operation: Operation
    part: str
    direction: str
    calls: int
    thunk_ms: float
    ms: float


@dataclasses.dataclass
class PartTime:
    """Milliseconds of one part in a step: its share by direction, and `thunk_ms` as Measured has it."""

    directions: Counter[str] = dataclasses.field(default_factory=Counter)
    thunk_ms: float = 0.0

    @property
    def ms(self) -> float:
        """Over all directions."""
        return sum(self.directions.values())


def part_of(source: str) -> str:
    """The innermost of PARTS among the scopes of an op_name, or OTHER."""
    scopes = [scope for scope in re.split(r"[/()]+", source) if scope in PARTS]
    return scopes[-1] if scopes else OTHER


def direction_of(source: str) -> str:
    """One of DIRECTIONS: autodiff wraps scopes in `transpose(...)`, and what it computes again lies in a scope too."""
    if "rematted_computation" in source:
        return "recomputed"
    return "backward" if "transpose(" in source else "forward"


def kind_of(operation: Operation) -> str:
    """What an operation outside of all parts does: a value of KINDS, by its primitive or else by what XLA fused."""
    primitive = operation.source.rsplit("/", 1)[-1]
    names = [primitive] if primitive else re.split(r"[_.]", operation.name)
    kinds = [KINDS[name] for each in names if (name := each.replace("-", "_")) in KINDS]
    return kinds[0] if kinds else "rest"


def short(source: str) -> str:
    """An op_name without the program, and without the loops that everything is in."""
    return re.sub(r"^jit\(\w+\)/|while/body/|(?:closed_call|eval_jaxpr)/", "", source)


def operations_of(text: str) -> dict[str, Operation]:
    """The instructions of a compiled program's text by name."""
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
    """(an instruction, the computation that is its body where it is a loop, or "")."""
    source, body = (re.search(pattern, match["rest"]) for pattern in (r'op_name="([^"]*)"', r"body=%?([\w.-]+)"))
    operation = Operation(match["name"], without_layout(match["shape"]), match["opcode"], source[1] if source else "")
    return operation, body[1] if body else ""


def without_layout(shape: str) -> str:
    """`bf16[4,8]` of `bf16[4,8]{1,0}`."""
    return re.sub(r"\{[^}]*\}", "", shape)


def shared_time(events: Iterable[Event]) -> dict[tuple[str, str], float]:
    """(program, name) -> nanoseconds; the sum is the time in which anything ran.

    Two operations that run side by side for a second get half a second each: so much less would the step take, roughly,
    without one of them.
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
    """One entry for each operation of `programs` that ran, longest first; events of anything else are dropped."""
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
    """(part, direction) of an operation; what lies outside of all parts is told by its kind."""
    if program == OPTIMIZER:
        return OPTIMIZER, UPDATE
    part = part_of(operation.source)
    return (part if part != OTHER else f"{OTHER}: {kind_of(operation)}"), operation.direction


def by_part(rows: Iterable[Measured]) -> dict[str, PartTime]:
    """Sums over operations, longest part first."""
    parts = defaultdict(PartTime)
    for row in rows:
        parts[row.part].directions[row.direction] += row.ms
        parts[row.part].thunk_ms += row.thunk_ms
    return dict(sorted(parts.items(), key=lambda item: -item[1].ms))


def flop_by_part(counted: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """part -> {direction: FLOP} of counts.flops, whose keys are `frozen again`."""
    parts = defaultdict(dict)
    for name, flop in counted.items():
        part, direction = name.rsplit(" ", 1)
        parts[part][COUNTED.get(direction, direction)] = flop
    return dict(parts)
