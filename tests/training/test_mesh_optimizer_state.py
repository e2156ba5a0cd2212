"""A run's optimizer state on a mesh: in pages or not, the same steps and the same checkpoints."""

import contextlib
import dataclasses
import functools
from pathlib import Path

import jax
import pytest

from qlora_jax.config import OptimArgs
from qlora_jax.io.run_folder.checkpoint import Checkpoints
from qlora_jax.optim.page_pool import PagingError, Transfers
from qlora_jax.optim.pager import PagedState
from qlora_jax.sharding import AnyMesh, make_mesh
from qlora_jax.training.optimizer_state import OptimizerStateManager, Room, make_state_manager
from tests.marks import first_always
from tests.optim.mesh_lora import assert_same_bits, lora_of, on_mesh
from tests.training.test_optimizer_state import Given

STEPS, SHAPE = 3, (1, 8, 64)
ARGS = OptimArgs(name="lion_8bit", max_grad_norm=0.3, weight_decay=0.1, paging="off")


class OnMesh(Given):
    """Gradients of LoRA parameters on a mesh."""

    def __init__(self, mesh: AnyMesh | None):
        super().__init__(state_bytes=0)
        self._mesh = mesh

    @property
    def mesh(self):
        return self._mesh

    @property
    def trained(self):
        return jax.eval_shape(lambda: lora_of(0))


@pytest.fixture(autouse=True, scope="module")
def page_per_layer():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_jax.training.optimizer_state.PAGE_BYTES", 1)
        yield


@functools.cache  # compiles once
def manager(paging: str, mesh) -> OptimizerStateManager:
    return make_state_manager(dataclasses.replace(ARGS, paging=paging), 10, OnMesh(mesh))


def go(updates: OptimizerStateManager, lora, state, mesh, first: int):
    """(parameters, state) after STEPS more steps."""
    for step in range(first, first + STEPS):
        state, room, _ = updates.make_room(state, SHAPE)
        grads = on_mesh(lora_of(100 + step, 0.01), mesh)
        lora, state, _, _ = updates.update(lora, state, grads, room)
    return lora, state


def with_room(updates, share: float):
    """The manager of pages on a device with room for this share of the state."""
    room = Room(*2 * (int(share * updates.layout.total_bytes),))
    return dataclasses.replace(updates, budget=lambda work, resident: room)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, tuple, tuple]:
    """(a checkpoint after STEPS steps without pages on eight devices, what was saved, what follows)."""
    folder, mesh = tmp_path_factory.mktemp("plain"), make_mesh(2, 4)
    updates, lora = manager("off", mesh), on_mesh(lora_of(0), mesh)
    lora, state = go(updates, lora, updates.init(lora), mesh, 0)
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(STEPS, lora, updates.to_checkpoint(state), {"step": STEPS})
    saved = jax.device_get((lora, state))
    return folder, saved, go(updates, lora, state, mesh, STEPS)


def resumed(folder: Path, updates: OptimizerStateManager, mesh):
    lora = on_mesh(lora_of(1), mesh)
    with Checkpoints(folder, keep=1) as checkpoints:
        lora, tree, _ = checkpoints.restore(lora, updates.checkpoint_template(lora))
    return lora, updates.from_checkpoint(tree)


@pytest.mark.slow
def test_pages_read_a_checkpoint_without_pages_and_go_on_to_the_bit(plain):
    folder, _, expected = plain
    mesh = make_mesh(2, 4)
    updates = with_room(manager("auto", mesh), 0.5)
    lora, state = go(updates, *resumed(folder, updates, mesh), mesh, STEPS)
    assert isinstance(state, PagedState)
    assert_same_bits((lora, updates.to_checkpoint(state)), expected)


def test_a_run_without_pages_reads_the_checkpoint_of_pages_and_goes_on_to_the_bit(plain, tmp_path):
    _, saved, expected = plain
    mesh = make_mesh(2, 4)
    updates, lora = with_room(manager("auto", mesh), 0.3), on_mesh(lora_of(0), mesh)
    lora, state = go(updates, lora, updates.init(lora), mesh, 0)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(STEPS, lora, updates.to_checkpoint(state), {"step": STEPS})
    assert_same_bits((lora, updates.to_checkpoint(state)), saved)
    off = manager("off", mesh)
    assert_same_bits(go(off, *resumed(tmp_path, off, mesh), mesh, STEPS), expected)


def test_room_that_comes_and_goes_changes_no_bit_on_a_mesh(plain):
    mesh = make_mesh(2, 4)
    updates, lora = manager("auto", mesh), on_mesh(lora_of(0), mesh)
    state = updates.init(lora)
    for step, share in enumerate((1.0, 0.2, 1.0)):  # whole, as pages, whole again
        at = with_room(updates, share)
        state, room, _ = at.make_room(state, SHAPE)
        assert isinstance(state, PagedState) == (share < 1)
        lora, state, _, _ = at.update(lora, state, on_mesh(lora_of(100 + step, 0.01), mesh), room)
    assert_same_bits((lora, updates.to_checkpoint(state)), plain[1])


@pytest.mark.parametrize(
    ("sizes", "paging"), first_always([(None, "auto"), ((1, 2), "auto"), ((1, 2), "off"), (None, "off")])
)
def test_fewer_devices_read_the_checkpoint(plain, sizes, paging):
    mesh = None if sizes is None else make_mesh(*sizes)
    updates = manager(paging, mesh)
    lora, state = resumed(plain[0], updates, mesh)
    assert_same_bits((lora, updates.to_checkpoint(state)), plain[1])
    go(updates, lora, state, mesh, STEPS)


def test_the_banner_says_that_bytes_are_per_device():
    assert "per device in 4 pages" in manager("auto", make_mesh(1, 8)).describe()


@pytest.mark.parametrize(("least", "differ"), [((0, 0), True), ((1, 0), False)])
def test_processes_that_hold_the_state_differently_are_noticed(least, differ):
    """A copy that fails in one process leaves its state in pages, or whole, while the others go on."""
    mesh = make_mesh(2, 4)
    updates = dataclasses.replace(manager("on", mesh), least=lambda *numbers: least)
    state = updates.init(on_mesh(lora_of(0), mesh))
    with pytest.raises(PagingError, match="in pages, others do not") if differ else contextlib.nullcontext():
        updates._check_alike(state, Transfers())
