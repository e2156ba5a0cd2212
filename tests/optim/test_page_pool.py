"""Pages on a simulated device: full hosts, copies that fail, a device that shrinks. No state is lost."""

import dataclasses

import jax
import numpy as np
import pytest

from qlora_jax.optim.page_pool import Memory, PagingError, host_kind, on_device
from qlora_jax.optim.pager import evict_to_budget, resident_bytes
from tests.optim.memory_pressure import SimulatedMemory
from tests.optim.test_pager import (
    ARGS,
    PAGES,
    Run,
    assert_equal_runs,
    make_elementwise_state,
    page_size,
    plain_run,
    tree,
)

SIZE = page_size(ARGS)
STEPS = 8


def simulated(pages: float = 100, **changes) -> SimulatedMemory:
    """A simulated device with room for so many pages."""
    return SimulatedMemory(jax.devices()[0], "pinned_host", total_bytes=int(pages * SIZE), **changes)


def test_a_device_as_large_as_the_budget_is_enough():
    memory = simulated(2)
    run = Run(ARGS, memory).go(2 * SIZE, steps=STEPS)
    assert_equal_runs(run, plain_run(ARGS, steps=STEPS))
    assert memory.ledger.peak_bytes == 2 * SIZE
    assert memory.ledger.device_bytes == resident_bytes(run.state)
    assert memory.ledger.device_bytes + memory.ledger.host_bytes == run.layout.total_bytes


def test_a_device_that_shrinks_between_steps_and_grows_again():
    memory = simulated(4, others=[0, 0, SIZE, 3 * SIZE, 2 * SIZE, 0])
    run, resident = Run(ARGS, memory), []
    for _ in range(STEPS):
        reported = memory.statistics()
        free = reported["bytes_limit"] - reported["bytes_in_use"] + resident_bytes(run.state)
        run.state, _ = evict_to_budget(run.state, memory, free)
        run.go(free, steps=1)
        resident.append(resident_bytes(run.state))
        memory.advance()
    assert_equal_runs(run, plain_run(ARGS, steps=STEPS))
    bound = [4, 4, 3, 1, 2, 4, 4, 4]
    assert all(here <= pages * SIZE for here, pages in zip(resident, bound, strict=True))
    assert resident[-1] == run.layout.total_bytes
    assert not any(moved.problems for moved in run.moves)


def test_without_room_on_the_host_pages_stay_and_the_run_goes_on():
    memory = simulated()
    run = Run(ARGS, memory)
    run.go(PAGES * SIZE, steps=1)
    full = dataclasses.replace(memory, host_bytes=0)
    run.memory = run.update._memory = full
    run.go(SIZE, steps=STEPS - 1)
    assert resident_bytes(run.state) == run.layout.total_bytes
    assert len(run.moves[-1].problems) == PAGES
    for words in ("page 0 of 4 (", "stays on the device, beyond its budget", "RESOURCE_EXHAUSTED"):
        assert words in run.moves[-1].problems[0]
    run.memory = memory
    assert_equal_runs(run, plain_run(ARGS, steps=STEPS))


@pytest.mark.parametrize("outcome", ["fails", "fails late"])
@pytest.mark.parametrize("direction", ["to_host", "to_device"])
def test_every_third_copy_fails_and_no_bit_changes(outcome, direction):
    def faults(way, number):
        return outcome if way == direction and number >= PAGES and number % 3 == 0 else "works"

    memory = simulated(faults=faults)
    run = Run(ARGS, memory).go(SIZE, steps=STEPS)
    assert memory.ledger.copies[direction] > PAGES + 3
    assert (direction == "to_host") == any(moved.problems for moved in run.moves)
    assert_equal_runs(run, plain_run(ARGS, steps=STEPS))
    held = memory.ledger.device_bytes + memory.ledger.host_bytes
    assert held == run.layout.total_bytes


def test_a_page_that_can_be_placed_nowhere_is_one_clear_error():
    memory = simulated(others=[0, 100 * SIZE])
    run = Run(ARGS, memory).go(0, steps=2)
    memory.advance()
    state = run.state
    with pytest.raises(
        PagingError, match=r"page 0 of 4 .* the device has no room for it.*start again, with --resume if"
    ):
        run.go(0, steps=1)
    assert not any(leaf.is_deleted() for page in state.pages for leaf in page)
    assert all(np.isfinite(np.asarray(leaf)).all() for page in state.pages for leaf in page)


def test_a_host_without_room_for_the_state_is_one_clear_error_before_the_first_step():
    words = (
        r"page 2 of 4 of the optimizer's state \(.*\): host memory has no room for it \(RESOURCE_EXHAUSTED.*paging=off"
    )
    with pytest.raises(PagingError, match=words):
        Run(ARGS, simulated(host_bytes=2 * SIZE))
    _, state, _ = plain_run(ARGS, steps=1)
    with pytest.raises(PagingError, match=words):
        Run(ARGS, simulated(host_bytes=2 * SIZE), start=(tree(0), make_elementwise_state(state), 1))


@pytest.mark.parametrize("outcome", ["fails", "fails late"])
def test_a_checkpoint_is_whole_where_its_copies_fail(outcome):
    saving = []
    memory = simulated(faults=lambda way, number: outcome if saving and way == "to_host" else "works")
    run = Run(ARGS, memory).go(2 * SIZE, steps=STEPS)
    saving.append(True)
    assert_equal_runs(run, plain_run(ARGS, steps=STEPS))  # reads the state as a checkpoint does
    assert sum(map(on_device, run.state.pages)) == 2
    assert memory.ledger.device_bytes + memory.ledger.host_bytes == run.layout.total_bytes


def test_the_probe_takes_what_works():
    class Broken:
        def __init__(self, kinds):
            self.kinds = kinds

        def addressable_memories(self):
            return [dataclasses.make_dataclass("Kind", ["kind"])(kind) for kind in self.kinds]

        def default_memory(self):
            raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: memories")

    assert host_kind(jax.devices()[0]) == Memory.of(jax.devices()[0]).kind == "pinned_host"
    assert host_kind(Broken(["device"])) == "numpy"
    assert host_kind(Broken(["device", "pinned_host"])) == "numpy"
