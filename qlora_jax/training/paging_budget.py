"""Bytes of device memory for optimizer pages: declared, or what the compiled gradients of a batch shape leave."""

import os
from collections.abc import Callable
from typing import NamedTuple

from qlora_jax.config.sizes import format_bytes
from qlora_jax.inference.lowering import bytes_of
from qlora_jax.optim.page_layout import Layout
from qlora_jax.optim.page_pool import Memory
from qlora_jax.optim.pager import check_budget
from qlora_jax.training.compiled_step import CompiledGradients, Shape

RESERVE = 0.03  # of the device: what its driver, its libraries and fragmentation take beside the compiled programs


class Room(NamedTuple):
    """Device bytes that pages may take while gradients are computed, and while they are updated."""

    gradients: int
    update: int


# What is computed: gradients of a batch's shape; or an evaluation, which takes so many bytes beside the model.
Workload = Shape | int
# (what is computed, bytes of pages on the device now) -> room
Budget = Callable[[Workload, int], Room]


def fixed_budget(budget_bytes: int, layout: Layout, memory: Memory) -> tuple[Budget, str]:
    """(the same room for every shape, in words).

    Raises:
      ValueError: it holds no page, or is more than the device has.
    """
    check_budget(budget_bytes, layout, device_bytes(memory)[0])
    room = Room(budget_bytes, budget_bytes)
    return lambda work, resident: room, f"{format_bytes(budget_bytes)} of them on the device"


def measured_budget(gradients: CompiledGradients, memory: Memory) -> tuple[Budget, str]:
    """(device - reserve - what the work needs, by the compiled gradients of a shape, in words).

    What the device says is held by others than pages counts where it is more than the program knows of.
    """
    total, words = device_bytes(memory)

    def budget(work: Workload, resident: int) -> Room:
        held, made, scratch = _taken(gradients, work)
        statistics = memory.statistics() or {}
        held = max(held, statistics.get("bytes_in_use", 0) - resident)
        free = int(total * (1 - RESERVE)) - held - made
        return Room(max(0, free - scratch), max(0, free))

    return budget, f"as many on the device as the next batch leaves room for on {words}"


def _taken(gradients: CompiledGradients, work: Workload) -> tuple[int, int, int]:
    """Bytes of (what is there before, what is made and stays, what is there meanwhile)."""
    if isinstance(work, int):
        return bytes_of(gradients.parts), 0, work
    program = gradients.compiled(work).memory_analysis()
    made = program.output_size_in_bytes - program.alias_size_in_bytes
    return program.argument_size_in_bytes, made, program.temp_size_in_bytes


def device_bytes(memory: Memory) -> tuple[int, str]:
    """(bytes of the device, in words). Where it does not tell, it is taken to have the machine's memory: a CPU has."""
    statistics = memory.statistics() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"], f"its {format_bytes(statistics['bytes_limit'])}"
    physical = physical_memory()
    return physical, f"{format_bytes(physical)} (this backend reports no memory: the machine's is assumed)"


def physical_memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
