"""The collective operations of a compiled program: which arrays devices exchange, how often, and how many bytes.

Sizes follow nccl-tests (doc/PERFORMANCE.md): a collective's size is that of the whole array, which is the result of an
all-gather and the operand of a reduce-scatter. A ring of n devices gives each one (n - 1) / n of it, and twice that in
an all-reduce.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple

from pallas_kernels.aot.hlo import Array, Instruction, Run, arrays, runs

ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER = "all-gather", "all-reduce", "reduce-scatter"
PERMUTE, BROADCAST = "collective-permute", "collective-broadcast"
OPERATIONS = {ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, PERMUTE, BROADCAST, "all-to-all", "ragged-all-to-all"}
# Starts whose type is (operand, result, ...) where XLA does not group the operands: ((operands), results).
_WITH_OPERANDS = {ALL_GATHER, PERMUTE}

_PARTITIONS = re.compile(r"num_partitions=(\d+)")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_COUNTED_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[(?P<sizes>[^]]*)\][^{,]*\{(?P<axes>[^}]*)\}")


class Collective(NamedTuple):
    """One array that devices exchange in one place of a program.

    Fields:
      operation: XLA's name, such as `all-gather`.
      array: dtype and elements of the whole array: that of a device's part, times the group, where it is scattered.
      group: the number of devices that exchange it.
      times: per run of the program, loops multiplied; None if XLA does not know a loop's trip count.
      conditional: True in a branch, which may run less often than `times`.
      instruction: its name in the optimized HLO.
      op_name: the path of scopes that it was traced in.
    """

    operation: str
    array: Array
    group: int
    times: int | None
    conditional: bool
    instruction: str
    op_name: str

    @property
    def dtype(self) -> str:
        """The array's dtype in XLA's spelling."""
        return self.array.dtype

    @property
    def elements(self) -> int:
        """The array's elements."""
        return self.array.elements

    @property
    def rematerialized(self) -> bool:
        """True if XLA's rematerialization pass repeats it to save memory."""
        return ".remat" in self.instruction


class Total(NamedTuple):
    """The collectives of one operation and dtype in a run of the program.

    Fields:
      times: arrays exchanged.
      nbytes: bytes of the whole arrays.
      received: bytes that each device receives, on a ring.
      largest: elements of the largest array.
    """

    times: int
    nbytes: int
    received: int
    largest: int


def read_collectives(text: str) -> list[Collective]:
    """Returns every collective of an optimized HLO text, one per array."""
    devices = _PARTITIONS.search(text)
    count = int(devices[1]) if devices else 1
    return [one for instruction, run in runs(text) for one in _collectives(instruction, run, count)]


def _collectives(instruction: Instruction, run: Run, devices: int) -> Iterator[Collective]:
    operation = instruction.op.removesuffix("-start")
    if operation not in OPERATIONS:
        return
    group = _group(instruction, devices)
    for result in _results(instruction, operation):
        scattered = operation == REDUCE_SCATTER
        whole = result._replace(shape=(group, *result.shape)) if scattered else result
        yield Collective(operation, whole, group, *run, instruction.name, instruction.op_name)


def _results(instruction: Instruction, operation: str) -> list[Array]:
    found, count = arrays(instruction.type), len(instruction.operands)
    starts = instruction.op != operation
    with_operands = instruction.type.startswith("((") or (starts and operation in _WITH_OPERANDS)
    return found[count : 2 * count] if with_operands else found


def _group(instruction: Instruction, devices: int) -> int:
    """Returns the number of devices that exchange one array; XLA prints groups in four ways."""
    if listed := _LISTED_GROUPS.search(instruction.rest):
        return len(listed[1].split(","))
    if counted := _COUNTED_GROUPS.search(instruction.rest):
        return int(counted[1])
    if on_mesh := _MESH_GROUPS.search(instruction.rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", on_mesh["sizes"]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", on_mesh["axes"]))
    return devices


def totals(collectives: Iterable[Collective]) -> dict[tuple[str, str], Total]:
    """Sums collectives by (operation, dtype); those in branches count as if their branch always ran.

    Raises:
      ValueError: the trip count of a loop around one of them is unknown.
    """
    grouped: dict[tuple[str, str], list[Collective]] = defaultdict(list)
    for one in collectives:
        grouped[one.operation, one.dtype].append(one)
    return {kind: _total(grouped[kind]) for kind in sorted(grouped)}


def _total(alike: list[Collective]) -> Total:
    counted = [(one, one.times) for one in alike if one.times is not None]
    if unknown := [one.instruction for one in alike if one.times is None]:
        raise ValueError(f"XLA does not know how often these collectives run, in loops of unknown length: {unknown}.")
    return Total(
        times=sum(times for _, times in counted),
        nbytes=sum(times * one.array.nbytes for one, times in counted),
        received=sum(times * received(one.operation, one.array.nbytes, one.group) for one, times in counted),
        largest=max(one.elements for one in alike),
    )


def received(operation: str, nbytes: int, group: int) -> int:
    """Returns the bytes that each of `group` devices receives in an operation on a whole array of `nbytes`, on a ring.

    That is (n - 1) / n of them, twice that in an all-reduce, and all of them in a permutation or a broadcast.
    """
    if operation in (PERMUTE, BROADCAST):
        return nbytes
    share = Fraction(group - 1, group) * (2 if operation == ALL_REDUCE else 1)
    return math.ceil(share * nbytes)
