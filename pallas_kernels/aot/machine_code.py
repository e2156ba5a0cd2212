"""Reads each kernel's machine code: registers, spills, shared memory, instructions, and tensor-core loops.

The sources are NVIDIA's tools: `cuobjdump -res-usage` for resources, `nvdisasm -c` for the listing (SASS).
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pallas_kernels.aot import toolchain
from pallas_kernels.aot.cubins import Cubin

TENSOR_CORE = "MMA"  # in the name of every tensor-core instruction: HMMA, HGMMA, IMMA, UTCHMMA

_RESOURCES = re.compile(r"Function (\S+?):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_ARCHITECTURE = re.compile(r"^\s*\.target\s+(\w+)", re.MULTILINE)
_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)")
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_TARGET = re.compile(r"\(?(\.L_\w+)")
_UNCONDITIONAL = re.compile(r"^(BRA(\.\w+)*\s+`?\(?\.L_|EXIT|RET|BRX|JMX)")


class Loop(NamedTuple):
    """One loop: its instructions from the first to the branch back, each counted once, inner loops included."""

    instructions: int
    opcodes: Counter[str]


class Kernel(NamedTuple):
    """One kernel's machine code.

    Attributes:
      architecture: ptxas's name (sm_90a).
      stack_bytes: per thread: spilled registers, and arrays that a thread indexes; 0 in a good kernel.
      shared_bytes: per block: static, dynamic, and the 1024 bytes that the driver reserves.
      opcodes: counts of instructions in the code by name without suffixes (HMMA, LDS).
      loops: loops with tensor-core instructions, in order of their end, so inner loops precede outer ones.
    """

    name: str
    architecture: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    opcodes: Counter[str]
    loops: tuple[Loop, ...]

    @property
    def tensor_core_instructions(self) -> int:
        """The number of tensor-core instructions in the kernel's code."""
        return tensor_core_instructions(self.opcodes)


def tensor_core_instructions(opcodes: Counter[str]) -> int:
    """Returns the number of tensor-core instructions among those counted."""
    return sum(count for opcode, count in opcodes.items() if TENSOR_CORE in opcode)


def read_kernels(cubins: list[Cubin]) -> list[Kernel]:
    """Returns the kernels of all cubins, in order.

    Raises:
      CompilerUnavailableError: NVIDIA's tools are not installed.
      subprocess.CalledProcessError: one of them cannot read a cubin.
    """
    with tempfile.TemporaryDirectory() as folder:
        return [kernel for cubin in cubins for kernel in _read_cubin(cubin, Path(folder) / "kernel.cubin")]


def _read_cubin(cubin: Cubin, path: Path) -> Iterator[Kernel]:
    path.write_bytes(cubin.image)
    usage = _output("cuobjdump", "-res-usage", str(path))
    listing = _output("nvdisasm", "-c", str(path))
    (architecture,) = _ARCHITECTURE.findall(listing)
    listings = split_listing(listing)
    for name, registers, stack, shared in _RESOURCES.findall(usage):
        shared_bytes = int(shared) + cubin.dynamic_shared_bytes
        opcodes, loops = read_listing(listings[name])
        yield Kernel(name, architecture, int(registers), int(stack), shared_bytes, opcodes, loops)


def _output(tool: str, *arguments: str) -> str:
    command = [str(toolchain.tool(f"nvidia-cuda-{tool}", tool)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def split_listing(listing: str) -> dict[str, list[str]]:
    """Splits the output of `nvdisasm -c` for a cubin into {function: the lines of its code}."""
    functions: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in listing.splitlines():
        if section := _SECTION.match(line):
            lines = functions.setdefault(section[1], [])
        lines.append(line)
    return functions


def read_listing(lines: list[str]) -> tuple[Counter[str], tuple[Loop, ...]]:
    """Returns (opcodes, tensor-core loops) of one function's code."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in lines:
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(instruction[1])
    bodies = (instructions[start : end + 1] for start, end in _find_loops(instructions, labels))
    loops = (Loop(len(body), _count(body)) for body in bodies)
    return _count(instructions), tuple(loop for loop in loops if tensor_core_instructions(loop.opcodes))


def _count(instructions: list[str]) -> Counter[str]:
    bare = (_PREDICATE.sub("", text) for text in instructions)
    return Counter(re.split(r"[\s.]", text, maxsplit=1)[0] for text in bare)


def _find_loops(instructions: list[str], labels: dict[str, int]) -> Iterator[tuple[int, int]]:
    """Yields (first, last) of each loop: a branch back to an instruction that every path to the branch passes.

    This excludes slow paths (a barrier that has not completed), which follow the code and branch back into it.
    """
    targets = {}
    for at, text in enumerate(instructions):
        if _PREDICATE.sub("", text).startswith("BRA") and (label := _TARGET.search(text)):
            targets[at] = labels[label[1]]
    for branch, target in targets.items():
        if target <= branch and not _reaches(branch, target, instructions, targets):
            yield target, branch


def _reaches(goal: int, avoid: int, instructions: list[str], targets: dict[int, int]) -> bool:
    """True if the function's start reaches the instruction `goal` without passing `avoid`."""
    seen, waiting = {avoid}, [0]
    while waiting:
        at = waiting.pop()
        if at in seen or at >= len(instructions):
            continue
        if at == goal:
            return True
        seen.add(at)
        if at in targets:
            waiting.append(targets[at])
        if not _UNCONDITIONAL.match(instructions[at]):
            waiting.append(at + 1)
    return False
