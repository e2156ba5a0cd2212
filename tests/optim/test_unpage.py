"""A paged state that is unpaged while there is room: its transfers, and copies that fail."""

import dataclasses

import jax
import pytest

from qlora_jax.config import OptimArgs
from qlora_jax.optim.pager import PagedState, resident_bytes
from qlora_jax.training.optimizer_state import PagedStateManager, Room, make_state_manager
from tests.optim.memory_pressure import SimulatedMemory
from tests.optim.test_pager import assert_same, gradients, plain_run, tree
from tests.training.test_optimizer_state import Given, state_bytes

ARGS = OptimArgs(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.3, paging="auto")
SIZE = state_bytes(ARGS)
STEPS = 50
LITTLE, ALL = 0.3, 1.0


class Run:
    """Steps with a given budget, as the training loop makes them."""

    def __init__(self, monkeypatch, **changes):
        monkeypatch.setattr("qlora_jax.training.optimizer_state.PAGE_BYTES", 1)  # one page per layer
        self.memory = SimulatedMemory(jax.devices()[0], "pinned_host", total_bytes=10 * SIZE, **changes)
        updates = make_state_manager(ARGS, STEPS, Given(SIZE), self.memory)
        assert isinstance(updates, PagedStateManager)
        self.updates, self.lora, self.step = updates, tree(0), 0
        self.state = updates.init(self.lora)

    def go(self, share: float):
        """Makes one step, and returns its transfers."""
        room = Room(int(share * SIZE), int(share * SIZE))
        updates = dataclasses.replace(self.updates, budget=lambda shape, resident: room)
        self.state, update_room, moved = updates.make_room(self.state, (1, 1, 64))
        grads = gradients(self.lora, float(self.step))
        self.lora, self.state, _, more = updates.update(self.lora, self.state, grads, update_room)
        self.step += 1
        return moved + more

    @property
    def is_whole(self) -> bool:
        return not isinstance(self.state, PagedState)

    def check(self) -> None:
        """Checks that the run equals the unpaged one, and that every byte is in one place."""
        lora, state, _ = plain_run(ARGS, self.step)
        assert_same((self.lora, self.updates.to_checkpoint(self.state)), (lora, state))
        assert self.memory.ledger.device_bytes + self.memory.ledger.host_bytes == SIZE
        resident = SIZE if self.is_whole else resident_bytes(self.state)
        assert self.memory.ledger.device_bytes == resident


def test_a_state_with_room_is_the_plain_optimizers_and_moves_once(monkeypatch):
    run = Run(monkeypatch)
    first, second = run.go(ALL), run.go(ALL)
    assert run.is_whole and (first.bytes_in, first.bytes_out) == (SIZE, 0) and not second.bytes_in + second.bytes_out
    assert run.updates.metrics(run.state, second)["resident_bytes"] == SIZE
    run.check()
    assert len(run.updates.step) == 0  # no page's program was compiled


def test_it_is_cut_when_room_gets_less_and_whole_again_when_all_of_it_was_away(monkeypatch):
    run = Run(monkeypatch)
    run.go(ALL)
    assert run.go(LITTLE).bytes_out >= SIZE and not run.is_whole
    run.check()
    run.go(ALL)
    assert not run.is_whole  # resident pages move less if they stay pages
    run.check()
    run.go(0), run.go(ALL)
    assert run.is_whole
    run.check()


def test_no_step_holds_more_than_the_state_on_the_device(monkeypatch):
    run = Run(monkeypatch)
    for share in (ALL, LITTLE, 0, ALL, LITTLE):
        run.go(share)
    assert run.memory.ledger.peak_bytes == SIZE


def test_without_room_on_the_host_it_stays_and_the_problem_is_told(monkeypatch):
    run = Run(monkeypatch)
    run.go(ALL)
    run.updates = dataclasses.replace(run.updates, memory=dataclasses.replace(run.memory, host_bytes=SIZE // 2))
    (problem,) = run.go(LITTLE).problems
    assert run.is_whole and "stays on the device, beyond its budget" in problem and "RESOURCE_EXHAUSTED" in problem
    run.check()


@pytest.mark.parametrize("outcome", ["fails", "fails late"])
def test_a_copy_to_the_device_that_fails_leaves_pages(monkeypatch, outcome):
    failing = []
    run = Run(monkeypatch, faults=lambda way, number: outcome if failing and way == "to_device" else "works")
    failing.append(True)
    room = Room(SIZE, SIZE)
    updates = dataclasses.replace(run.updates, budget=lambda shape, resident: room)  # enough for the whole state
    run.state, _, moved = updates.make_room(run.state, (1, 1, 64))
    assert not run.is_whole and moved.bytes_in == 0
    failing.clear()
    run.go(LITTLE)
    run.check()
