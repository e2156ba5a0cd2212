"""Device memory for optimizer pages: a fixed number of bytes, or what the compiled gradients leave free.

On a mesh, all bytes are those of one device.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

from qlora_jax.config.sizes import format_bytes
from qlora_jax.optim.page_layout import Layout
from qlora_jax.optim.page_pool import Memory
from qlora_jax.optim.pager import check_budget
from qlora_jax.sharding import part_bytes
from qlora_jax.training.compiled_step import CompiledGradients, Shape

KIB = 1024
RESERVE = 0.03  # share of the device for its driver, libraries and fragmentation


class Room(NamedTuple):
    """Bytes on the device that pages may take while gradients are computed, and during the update."""

    gradients: int
    update: int


# Gradients for a batch shape, or an evaluation that takes this many bytes next to the model.
Workload = Shape | int
# (workload, bytes of pages on the device now) -> room
Budget = Callable[[Workload, int], Room]


def fixed_budget(budget_bytes: int, layout: Layout, memory: Memory) -> tuple[Budget, str]:
    """Returns (a budget that is the same for every workload, its description).

    Raises:
      ValueError: the budget is smaller than a page, or larger than the device.
    """
    check_budget(budget_bytes, layout, device_bytes(memory)[0])
    room = Room(budget_bytes, budget_bytes)
    return lambda work, resident: room, f"at most {format_bytes(budget_bytes)} on the device"


def measured_budget(gradients: CompiledGradients, memory: Memory) -> tuple[Budget, str]:
    """Returns (device memory - reserve - what the workload requires, its description).

    The requirement comes from the compiled gradients of a batch shape. Memory that the device reports in use, other
    than pages, counts if it is more than the program's arguments.
    """
    total, text = device_bytes(memory)

    def budget(work: Workload, resident: int) -> Room:
        arguments, outputs, scratch = _required_bytes(gradients, work)
        statistics = memory.statistics() or {}
        in_use = max(arguments, statistics.get("bytes_in_use", 0) - resident)
        free = int(total * (1 - RESERVE)) - in_use - outputs
        return Room(max(0, free - scratch), max(0, free))

    return budget, f"as many on the device as the next batch leaves room for, of {text}"


def agreed_budget(budget: Budget, least: Callable[[int, int], tuple[int, ...]]) -> Budget:
    """Returns the least of the budgets of all processes, in whole KiB, so that all keep the same pages.

    Args:
      least: returns the least of each of two numbers of 32 bits in all processes.
    """

    def agreed(work: Workload, resident: int) -> Room:
        gradients, update = (room // KIB for room in budget(work, resident))
        return Room(*(room * KIB for room in least(gradients, update)))

    return agreed


def _required_bytes(gradients: CompiledGradients, work: Workload) -> tuple[int, int, int]:
    """Returns the bytes of (arguments, outputs, scratch)."""
    if isinstance(work, int):
        return part_bytes(gradients.parts), 0, work
    program = gradients.compiled(work).memory_analysis()
    assert program is not None  # every backend we run on reports it
    outputs = program.output_size_in_bytes - program.alias_size_in_bytes
    return program.argument_size_in_bytes, outputs, program.temp_size_in_bytes


def device_bytes(memory: Memory) -> tuple[int, str]:
    """Returns (bytes of one device, a description); the machine's memory if the backend reports none, as on a CPU."""
    statistics = memory.statistics() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"], format_bytes(statistics["bytes_limit"])
    devices = len(memory.devices)
    share = physical_memory() // devices
    whose = "the machine's memory" if devices == 1 else f"the machine's memory, shared by {devices} devices"
    return share, f"{format_bytes(share)} ({whose}, because this backend reports no limit)"


def physical_memory() -> int:
    """Returns the bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
