"""Optimizer state in every mode: 50 bit-identical steps, and batches that leave less room."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.config import OptimArgs
from qlora_jax.optim import make_elementwise
from qlora_jax.optim.optax_chain import OPTIMIZERS
from qlora_jax.optim.page_pool import Memory
from qlora_jax.training.compiled_programs import CompiledGradients
from qlora_jax.training.optimizer_state import make_state_manager
from tests.optim.memory_pressure import SimulatedMemory
from tests.optim.test_pager import assert_same, gradients, tree

STEPS = 50
ARGS = OptimArgs(
    learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.3, warmup_ratio=0.1, schedule="cosine", paging="off"
)
SHORT, LONG = (1, 1, 64), (1, 1, 256)


class Given(CompiledGradients):
    """Gradients whose scratch a test says: none for short batches, most of the state's size for long ones."""

    def __init__(self, state_bytes: int):
        self._state_bytes = state_bytes

    @property
    def mesh(self):
        return None

    @property
    def trained(self):
        return jax.eval_shape(lambda: tree(0))

    def compiled(self, shape):
        sizes = dict.fromkeys(("argument", "output", "alias"), 0) | {
            "temp": int(0.6 * self._state_bytes) * (shape == LONG)
        }
        analysis = SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
        return SimpleNamespace(memory_analysis=lambda: analysis)


def state_bytes(args: OptimArgs) -> int:
    """Returns the bytes of all pages."""
    leaves = jax.tree.leaves(jax.eval_shape(make_elementwise(args, STEPS).init, tree(0)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.ndim)


def train(args: OptimArgs, memory: Memory | None = None):
    """(parameters, state, norms, bytes resident after each step) of 50 steps, every fifth batch a long one."""
    updates = make_state_manager(args, STEPS, Given(state_bytes(args)), memory)
    lora, state, norms, resident = tree(0), updates.init(tree(0)), [], []
    for step in range(STEPS):
        state, room, _ = updates.make_room(state, LONG if step % 5 == 4 else SHORT)
        lora, state, norm, moved = updates.update(lora, state, gradients(lora, float(step)), room)
        norms.append(norm)
        resident.append(updates.metrics(state, moved).get("resident_bytes"))
    return lora, updates.to_checkpoint(state), norms, resident


def device(state: int, share: float) -> SimulatedMemory:
    """A device with room for this share of the state next to a short batch; 3% of memory is reserved."""
    return SimulatedMemory(jax.devices()[0], "pinned_host", total_bytes=int(share * state / 0.97) + 64)


def real(state: int) -> Memory:
    """Returns the memory of this CPU."""
    return Memory.of(jax.devices()[0])


# Mode -> (budget as a share of the state, None: auto; the memory; shares of the state that are resident after a step).
MODES = {
    "on": (1 / 3, real, {0.3}),
    "on, in NumPy's memory": (1 / 3, lambda state: Memory(jax.devices()[0], "numpy"), {0.3}),
    "on, all stay": (2.0, real, {1.0}),
    "auto, all stay": (None, real, {1.0}),
    "auto, long batches page": (None, lambda state: device(state, 1.0), {1.0}),
    "auto, always pages": (None, lambda state: device(state, 0.65), {0.6}),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("mode", MODES)
def test_fifty_steps_of_every_mode_equal_the_plain_run(name, mode, monkeypatch):
    monkeypatch.setattr("qlora_jax.training.optimizer_state.PAGE_BYTES", 1)  # a page a layer
    share, memory, expected = MODES[mode]
    args = dataclasses.replace(ARGS, name=name)
    state = state_bytes(args)
    budget = {} if share is None else {"paging_budget": f"{int(share * state)}B"}
    *plain, _ = train(args)
    paging = dict(paging="auto" if share is None else "on", **budget)
    *paged, resident = train(dataclasses.replace(args, **paging), memory(state))
    assert jax.tree.structure(paged[1]) == jax.tree.structure(plain[1])
    assert_same(paged, plain)
    assert jnp.isfinite(jnp.array(paged[2])).all()
    assert {round(size / state, 2) for size in resident[1:]} == expected
