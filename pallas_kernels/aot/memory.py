"""A compiled program's bytes by kind, on the card and in host memory, and its largest temporaries.

Schemas: openxla/xla, xla/service/hlo.proto (HloModuleProto, BufferAssignmentProto).
"""

import dataclasses
import re
from collections.abc import Iterator

from pallas_kernels.aot import protobuf

HOST_COLOR = 5  # xla::Layout::kHostMemorySpace, printed as S(5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
    """Bytes in one memory. Aliases are outputs in donated arguments, so they count once in `total`."""

    arguments: int
    outputs: int
    aliases: int
    temporaries: int

    @property
    def total(self) -> int:
        """arguments + outputs - aliases + temporaries."""
        return self.arguments + self.outputs - self.aliases + self.temporaries


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """The bytes of XLA's buffer assignment, without the CUDA context, fragmentation, and scratch of libraries.

    XLA's `peak_memory_in_bytes` is omitted, because it adds host bytes to those of the card.
    """

    device: Bytes
    host: Bytes

    @property
    def device_total(self) -> int:
        """Bytes on the card: arguments + outputs - aliases + temporaries."""
        return self.device.total

    @property
    def host_total(self) -> int:
        """Bytes in host memory, of arrays that are there or are moved there: the same sum."""
        return self.host.total


@dataclasses.dataclass(frozen=True)
class Temporary:
    """One temporary buffer. Buffers that are not live together share bytes, so sizes do not add up to the total.

    Attributes:
      memory: "device" or "host".
      instruction: its name in the optimized HLO.
      shape: the instruction's shape, which is that of a whole tuple if the buffer is part of one.
      operation: its path in the JAX program (`jit(step)/dot_general`), or "".
    """

    bytes: int
    memory: str
    instruction: str
    shape: str
    operation: str


def read_memory(analysis: object) -> MemoryUse:
    """Reads `jax.stages.Compiled.memory_analysis()`."""

    def one(prefix: str) -> Bytes:
        kinds = {"arguments": "argument", "outputs": "output", "aliases": "alias", "temporaries": "temp"}
        return Bytes(**{name: getattr(analysis, f"{prefix}{kind}_size_in_bytes") for name, kind in kinds.items()})

    return MemoryUse(device=one(""), host=one("host_"))


def read_temporaries(executable: bytes, text: str) -> list[Temporary]:
    """Returns all temporary buffers of a GpuExecutableProto, largest first; `text` is the program's optimized HLO."""
    module = protobuf.submessage(protobuf.submessage(executable, 1), 1)
    assignment = protobuf.submessage(executable, 2)
    names = dict(_instruction_names(module))
    buffers = {protobuf.integer(buffer, 1): buffer for buffer in protobuf.submessages(assignment, 1)}
    found = []
    for color, assigned in _assigned_temporaries(assignment):
        place = protobuf.submessage(buffers[protobuf.integer(assigned, 1)], 3)
        name = names[protobuf.integer(place, 4)]
        memory = "host" if color == HOST_COLOR else "device"
        found.append(Temporary(protobuf.integer(assigned, 3), memory, name, *_describe(name, text)))
    return sorted(found, key=lambda temporary: -temporary.bytes)


def _instruction_names(module: bytes) -> Iterator[tuple[int, str]]:
    """Yields (id, name) of every instruction: HloModuleProto.computations, .instructions, .id and .name."""
    for computation in protobuf.submessages(module, 3):
        for instruction in protobuf.submessages(computation, 2):
            yield protobuf.integer(instruction, 35), protobuf.submessage(instruction, 1).decode()


def _assigned_temporaries(assignment: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields (color, BufferAllocationProto.Assigned) of each buffer in an allocation of temporaries."""
    for allocation in protobuf.submessages(assignment, 3):
        # Thread-local (scalars inside of kernels), entry parameter, may be live out, constant.
        if not any(protobuf.integer(allocation, number) for number in (3, 5, 7, 12)):
            for assigned in protobuf.submessages(allocation, 9):
                yield protobuf.integer(allocation, 8), assigned


def _describe(instruction: str, text: str) -> tuple[str, str]:
    line = re.search(rf"^\s*(?:ROOT )?%?{re.escape(instruction)} = (.*)$", text, re.MULTILINE)
    if line is None:
        return "", ""
    shape = re.match(r"\(.*?\) (?=[a-z-]+\()|\S+", line[1])
    operation = re.search(r'op_name="([^"]*)"', line[1])
    return shape[0].strip() if shape else "", operation[1] if operation else ""
