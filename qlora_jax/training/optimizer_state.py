"""How a run's optimizer state is held and updated: whole on the device, or in pages under a budget of bytes.

The loop hands the pager numbers of bytes (see budgets.py), never a plan.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import optax

from qlora_jax.config import OptimArgs, paging_of, plain_name
from qlora_jax.config.sizes import format_bytes, parse_bytes
from qlora_jax.models.partition import Lora
from qlora_jax.optim import make_elementwise, make_optimizer
from qlora_jax.optim.elementwise import ELEMENTWISE, check_elementwise
from qlora_jax.optim.page_layout import PAGE_BYTES, Layout, PyTreeDef, layer_pages
from qlora_jax.optim.page_pool import Memory, Transfers
from qlora_jax.optim.pager import (
    PagedState,
    PagedUpdate,
    evict_to_budget,
    from_optax,
    page_out_all,
    paged_init,
    resident_bytes,
    to_optax,
    unpage,
)
from qlora_jax.training.compiled_step import CompiledGradients
from qlora_jax.training.paging_budget import Budget, Workload, fixed_budget, measured_budget
from qlora_jax.training.step import update

PAGES_PER_BUDGET = 4  # at least, where layers are small enough: one updated, one coming, one going, one waiting

Stepped = tuple[Lora, Any, jax.Array, Transfers]


@runtime_checkable
class OptimizerStateManager(Protocol):
    """What the loop does with an optimizer's state, of which it knows nothing else."""

    def init(self, lora: Lora) -> Any:
        """The state at step 0."""
        ...

    def make_room(self, state: Any, work: Workload) -> tuple[Any, int, Transfers]:
        """(the state with as much on the device as the work leaves room for, room for its update, moved).

        Room is asked for before the gradients: while they are computed, the device tells of their scratch too.
        """
        ...

    def update(self, lora: Lora, state: Any, grads: Lora, room: int) -> Stepped:
        """(LoRA parameters, state, the gradients' norm before clipping, what was moved); donates the first two."""
        ...

    def metrics(self, state: Any, moved: Transfers) -> dict[str, Any]:
        """What a step's record says of it."""
        ...

    def to_checkpoint(self, state: Any) -> Any:
        """The state as optax has it, for a checkpoint."""
        ...

    def checkpoint_template(self, lora: Lora) -> Any:
        """What a checkpoint's state is read into."""
        ...

    def from_checkpoint(self, tree: Any) -> Any:
        """The state that a checkpoint holds."""
        ...

    def describe(self) -> str:
        """Where the state is, in the words of a banner; empty for: on the device."""
        ...


@dataclasses.dataclass(frozen=True)
class DeviceStateManager(OptimizerStateManager):
    """The state stays on the device, and is updated at once."""

    optimizer: optax.GradientTransformation

    def init(self, lora: Lora) -> Any:
        return self.optimizer.init(lora)

    def make_room(self, state: Any, work: Workload) -> tuple[Any, int, Transfers]:
        return state, 0, Transfers()

    def update(self, lora: Lora, state: Any, grads: Lora, room: int) -> Stepped:
        return *update(self.optimizer, lora, state, grads), Transfers()

    def metrics(self, state: Any, moved: Transfers) -> dict[str, Any]:
        return {}

    def to_checkpoint(self, state: Any) -> Any:
        return state

    def checkpoint_template(self, lora: Lora) -> Any:
        return self.init(lora)

    def from_checkpoint(self, tree: Any) -> Any:
        return tree

    def describe(self) -> str:
        return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedStateManager(OptimizerStateManager):
    """The state is pages, or whole while there is room for all of it; see qlora_jax.optim.pager and .whole.

    Attributes:
      structure: of the state that a checkpoint holds: the plain run's, so that either goes on from the other's.
      optimizer: of a whole state; `transform` is the same without clipping.
      words: the budget, for the banner.
    """

    structure: PyTreeDef
    optimizer: optax.GradientTransformation
    transform: optax.GradientTransformation
    layout: Layout
    memory: Memory
    step: PagedUpdate
    budget: Budget
    words: str

    def init(self, lora: Lora) -> PagedState:
        return paged_init(self.transform, lora, self.layout, self.memory)

    def make_room(self, state: Any, work: Workload) -> tuple[Any, int, Transfers]:
        room = self.budget(work, self._resident_bytes(state))
        moved, is_room = Transfers(), min(room) >= self.layout.total_bytes
        if is_room and isinstance(state, PagedState):
            state, moved = unpage(state, self.structure, self.layout, self.memory)
        if not is_room and not isinstance(state, PagedState):
            state, moved = page_out_all(state, self.layout, self.memory)
        if isinstance(state, PagedState):
            state, sent = evict_to_budget(state, self.memory, room.gradients)
            moved += sent
        return state, room.update, moved

    def update(self, lora: Lora, state: Any, grads: Lora, room: int) -> Stepped:
        if isinstance(state, PagedState):
            return self.step(lora, state, grads, room)
        return *update(self.optimizer, lora, state, grads), Transfers()

    def _resident_bytes(self, state: Any) -> int:
        return resident_bytes(state) if isinstance(state, PagedState) else self.layout.total_bytes

    def metrics(self, state: Any, moved: Transfers) -> dict[str, Any]:
        numbers = {
            "paged_in_bytes": moved.bytes_in,
            "paged_out_bytes": moved.bytes_out,
            "resident_bytes": self._resident_bytes(state),
        }
        return numbers | ({"paging_problems": list(moved.problems)} if moved.problems else {})

    def to_checkpoint(self, state: Any) -> Any:
        if not isinstance(state, PagedState):
            return state
        tree = to_optax(state, self.layout, self.memory)
        return jax.tree.unflatten(self.structure, jax.tree.leaves(tree))  # clipping has no leaves

    def checkpoint_template(self, lora: Lora) -> Any:
        # On the host where the backend can: a state that has to be paged may not fit the device for a moment.
        sharding = self.memory.host_sharding or self.memory.device_sharding
        leaves = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for leaf in self.layout.leaves]
        return jax.tree.unflatten(self.structure, leaves)

    def from_checkpoint(self, tree: Any) -> PagedState:
        return from_optax(tree, self.layout, self.memory)

    def describe(self) -> str:
        where = {"pinned_host": "pinned host memory", "numpy": "host memory (this backend has none that is pinned)"}
        pages, total = self.layout.count, format_bytes(self.layout.total_bytes)
        size = format_bytes(self.layout.largest_page)
        return f"{total} in {pages} pages of {size}, {self.words}; others wait in {where[self.memory.kind]}"


def make_state_manager(
    args: OptimArgs, total_steps: int, gradients: CompiledGradients, memory: Memory | None = None
) -> OptimizerStateManager:
    """The updates of a run with these settings; nothing is on the device yet.

    Args:
      gradients: whose parameters are updated.
      memory: of the first device where it is None.

    Raises:
      ValueError: a budget that holds no page or that the device does not have; an optimizer that can't be paged.
    """
    optimizer = make_optimizer(args, total_steps)
    if paging_of(args) == "off":
        return DeviceStateManager(optimizer)
    memory = memory or Memory.of(jax.devices()[0])
    transform = make_elementwise(args, total_steps)
    given = None if args.paging_budget is None else parse_bytes(args.paging_budget)
    page_bytes = PAGE_BYTES if given is None else min(PAGE_BYTES, given // PAGES_PER_BUDGET)
    layout = layer_pages(transform, gradients.lora, page_bytes)
    if plain_name(args.name) not in ELEMENTWISE:
        check_elementwise(transform, gradients.lora, layout, memory)
    budget, words = measured_budget(gradients, memory) if given is None else fixed_budget(given, layout, memory)
    return PagedStateManager(
        structure=jax.tree.structure(jax.eval_shape(optimizer.init, gradients.lora)),
        optimizer=optimizer,
        transform=transform,
        layout=layout,
        memory=memory,
        step=PagedUpdate(transform, layout, memory, args.max_grad_norm),
        budget=budget,
        words=words,
    )
