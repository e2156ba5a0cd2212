"""Stores and updates a run's optimizer state: on the device, or in pages under a byte budget.

The pager receives budgets in bytes (`Budget`), never a memory plan.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import optax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from qlora_jax.config import OptimArgs, paging_of, plain_name
from qlora_jax.config.sizes import format_bytes, parse_bytes
from qlora_jax.hosts.group import AgreedMinimum
from qlora_jax.methods.method import Correction
from qlora_jax.models.partition import Lora, join_leaves, lora_specs, split_leaves
from qlora_jax.optim import make_elementwise, make_optimizer
from qlora_jax.optim.optax_chain import (
    ELEMENTWISE,
    check_elementwise,
    from_optax,
    init_state,
    page_out_all,
    state_specs,
    to_optax,
    unpage,
)
from qlora_jax.optim.page_layout import PAGE_BYTES, PAGES_PER_BUDGET, Layout, PyTreeDef, layer_pages
from qlora_jax.optim.page_pool import Memory, PagingError, Transfers, memory_of
from qlora_jax.optim.pager import (
    PagedState,
    PagedUpdate,
    check_budget,
    evict_to_budget,
    paged_init,
    resident_bytes,
)
from qlora_jax.optim.updates import global_norm, in_f32
from qlora_jax.sharding import named, part_bytes, placed_shapes
from qlora_jax.training.compiled_programs import CompiledGradients, Shape
from qlora_jax.training.metrics.metrics_file import Record
from qlora_jax.training.step import update

# Device memory for optimizer pages: a fixed number of bytes, or what the compiled gradients leave free.
#
# On a mesh, all bytes are those of one device.

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


OptimizerState = optax.OptState | PagedState
UpdateResult = tuple[Lora, OptimizerState, jax.Array, Transfers]


@runtime_checkable
class OptimizerStateManager(Protocol):
    """The operations that the training loop needs on an optimizer's state, whose type the loop does not know."""

    def init(self, lora: Lora) -> OptimizerState:
        """Returns the state at step 0."""
        ...

    def make_room(self, state: OptimizerState, work: Workload) -> tuple[OptimizerState, int, Transfers]:
        """Evicts pages until the workload fits; returns (state, bytes that its update may use, transfers).

        Call it before the gradients: while they are computed, the device also reports their scratch as in use.
        """
        ...

    def update(
        self, lora: Lora, state: OptimizerState, grads: Lora, room: int, norm: jax.Array | None = None
    ) -> UpdateResult:
        """Returns (LoRA parameters, state, gradient norm before clipping, transfers); donates `lora` and `state`.

        Args:
          norm: the global norm, if `grads` were changed after it was computed.
        """
        ...

    def metrics(self, state: OptimizerState, moved: Transfers) -> Record:
        """Returns the entries of a step's record."""
        ...

    def to_checkpoint(self, state: OptimizerState) -> optax.OptState:
        """Returns the state as an optax state, for a checkpoint."""
        ...

    def checkpoint_template(self, lora: Lora) -> optax.OptState:
        """Returns the tree of arrays or ShapeDtypeStructs that a checkpoint's state is restored into."""
        ...

    def from_checkpoint(self, tree: optax.OptState) -> OptimizerState:
        """Returns the state from a restored optax state."""
        ...

    def describe(self) -> str:
        """Returns the state's placement for the start banner; empty if it is on the device."""
        ...


@dataclasses.dataclass(frozen=True)
class DeviceStateManager(OptimizerStateManager):
    """Stores the state on the device, or on those of a mesh, and updates it in one program."""

    optimizer: optax.GradientTransformation
    mesh: Mesh | None

    def init(self, lora: Lora) -> OptimizerState:
        if self.mesh is None:
            return self.optimizer.init(lora)
        return init_state(self.optimizer, lora, lora_specs(lora, self.mesh), self.mesh)

    def make_room(self, state: OptimizerState, work: Workload) -> tuple[OptimizerState, int, Transfers]:
        return state, 0, Transfers()

    def update(
        self, lora: Lora, state: OptimizerState, grads: Lora, room: int, norm: jax.Array | None = None
    ) -> UpdateResult:
        return *update(self.optimizer, lora, state, grads, norm, mesh=self.mesh), Transfers()

    def metrics(self, state: OptimizerState, moved: Transfers) -> Record:
        return {}

    def to_checkpoint(self, state: OptimizerState) -> optax.OptState:
        return state

    def checkpoint_template(self, lora: Lora) -> optax.OptState:
        if self.mesh is None:
            return self.init(lora)
        specs = state_specs(self.optimizer, lora, lora_specs(lora, self.mesh))
        return placed_shapes(jax.eval_shape(self.optimizer.init, lora), specs, self.mesh)

    def from_checkpoint(self, tree: optax.OptState) -> OptimizerState:
        return tree

    def describe(self) -> str:
        return ""


def _placed(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedStateManager(OptimizerStateManager):
    """Stores the state in pages, or whole on the device while it fits; see qlora_jax.optim.pager.

    Attributes:
      structure: the tree structure of a checkpoint's state; it equals that of a run without paging, so that either can
        resume from the other's checkpoint.
      optimizer: updates a whole state.
      transform: the same optimizer without clipping; updates one page.
      budget_text: the budget, for the start banner.
      least: returns the least of each of two numbers in all processes; None for one process.
    """

    structure: PyTreeDef
    optimizer: optax.GradientTransformation
    transform: optax.GradientTransformation
    layout: Layout
    memory: Memory
    step: PagedUpdate
    budget: Budget
    budget_text: str
    least: Callable[[int, int], tuple[int, ...]] | None

    def init(self, lora: Lora) -> PagedState:
        return paged_init(self.transform, lora, self.layout, self.memory)

    def make_room(self, state: OptimizerState, work: Workload) -> tuple[OptimizerState, int, Transfers]:
        room = self.budget(work, self._resident_bytes(state))
        moved, is_room = Transfers(), min(room) >= self.layout.total_bytes
        if is_room and isinstance(state, PagedState):
            state, moved = unpage(state, self.structure, self.layout, self.memory)
        if not is_room and not isinstance(state, PagedState):
            state, moved = page_out_all(state, self.layout, self.memory)
        if isinstance(state, PagedState):
            state, sent = evict_to_budget(state, self.memory, room.gradients)
            moved += sent
        self._check_alike(state, moved)
        return state, room.update, moved

    def _check_alike(self, state: OptimizerState, moved: Transfers) -> None:
        """Raises PagingError if some processes have pages and others the whole state, because copies failed."""
        if self.least is None:
            return
        is_paged = isinstance(state, PagedState)
        all_paged, none_paged = self.least(is_paged, not is_paged)
        if not all_paged and not none_paged:
            raise PagingError(
                f"optim.paging: this process has its state {'in pages' if is_paged else 'whole on the device'}, others "
                f"do not, because a copy between device and host failed in some. {' '.join(moved.problems)}. Free "
                "memory, or set a smaller optim.paging_budget, then start all processes again, with --resume if there "
                "is a checkpoint."
            )

    def update(
        self, lora: Lora, state: OptimizerState, grads: Lora, room: int, norm: jax.Array | None = None
    ) -> UpdateResult:
        if isinstance(state, PagedState):
            return self.step(lora, state, grads, room, norm)
        return *update(self.optimizer, lora, state, grads, norm, mesh=self.layout.mesh), Transfers()

    def _resident_bytes(self, state: OptimizerState) -> int:
        return resident_bytes(state) if isinstance(state, PagedState) else self.layout.total_bytes

    def metrics(self, state: OptimizerState, moved: Transfers) -> Record:
        numbers = {
            "paged_in_bytes": moved.bytes_in,
            "paged_out_bytes": moved.bytes_out,
            "resident_bytes": self._resident_bytes(state),
        }
        return numbers | ({"paging_problems": list(moved.problems)} if moved.problems else {})

    def to_checkpoint(self, state: OptimizerState) -> optax.OptState:
        if not isinstance(state, PagedState):
            return state
        tree = to_optax(state, self.layout, self.memory)
        return jax.tree.unflatten(self.structure, jax.tree.leaves(tree))  # clipping adds no leaves

    def checkpoint_template(self, lora: Lora) -> optax.OptState:
        # In host memory if the backend has it: a paged state may not fit on the device, even for a moment.
        specs = [self.layout.spec(index) for index in range(len(self.layout.leaves))]
        shardings = [self.memory.host_sharding(spec) or self.memory.device_sharding(spec) for spec in specs]
        return jax.tree.unflatten(self.structure, map(_placed, self.layout.leaves, shardings))

    def from_checkpoint(self, tree: optax.OptState) -> PagedState:
        return from_optax(tree, self.layout, self.memory)

    def describe(self) -> str:
        where = {"pinned_host": "pinned host memory", "numpy": "host memory (this backend has no pinned memory)"}
        pages, total = self.layout.count, format_bytes(self.layout.total_bytes)
        size, each = format_bytes(self.layout.largest_page), "" if self.layout.mesh is None else " per device"
        return f"{total}{each} in {pages} pages of {size}, {self.budget_text}; the rest in {where[self.memory.kind]}"


def make_state_manager(
    args: OptimArgs, total_steps: int, gradients: CompiledGradients, memory: Memory | None = None
) -> OptimizerStateManager:
    """Returns the state manager of a run with these settings; allocates nothing yet.

    Args:
      total_steps: the length of the learning-rate schedule.
      gradients: the run's gradient programs, whose shapes, memory and mesh determine pages and budget.
      memory: the devices' memory; None: that of the mesh, or of the first device without one.

    Raises:
      ValueError: optim.paging_budget is smaller than a page or larger than the device; an optimizer that cannot be
        paged.
    """
    optimizer, mesh = make_optimizer(args, total_steps), gradients.mesh
    assert not isinstance(mesh, AbstractMesh)  # the devices of a run are present
    if paging_of(args) == "off":
        return DeviceStateManager(optimizer, mesh)
    memory = memory or memory_of(mesh)
    transform = make_elementwise(args, total_steps)
    given = None if args.paging_budget is None else parse_bytes(args.paging_budget)
    page_bytes = PAGE_BYTES if given is None else min(PAGE_BYTES, given // PAGES_PER_BUDGET)
    specs = None if mesh is None else lora_specs(gradients.trained, mesh)
    layout = layer_pages(transform, gradients.trained, page_bytes, specs=specs, mesh=mesh)
    if plain_name(args.name) not in ELEMENTWISE:
        check_elementwise(transform, gradients.trained, layout, memory)
    budget, text = measured_budget(gradients, memory) if given is None else fixed_budget(given, layout, memory)
    least = None if mesh is None or len(mesh.local_devices) == mesh.size else AgreedMinimum(mesh, 2)
    if least is not None and given is None:
        budget = agreed_budget(budget, least)
    return PagedStateManager(
        structure=jax.tree.structure(jax.eval_shape(optimizer.init, gradients.trained)),
        optimizer=optimizer,
        transform=transform,
        layout=layout,
        memory=memory,
        step=PagedUpdate(transform, layout, memory, args.max_grad_norm),
        budget=budget,
        budget_text=text,
        least=least,
    )


class CorrectedStateManager(OptimizerStateManager):
    """Updates the trained leaves through another manager, which does not know those that stay fixed.

    The norm, by which gradients are clipped, is that of the gradients before the correction. So it is as if the
    method's optimizer followed PyTorch's `clip_grad_norm_`.

    Args:
      inner: the manager of the trained leaves.
      gradients: the run's gradients, by whose shapes and mesh the results are placed.
    """

    def __init__(self, inner: OptimizerStateManager, correction: Correction, gradients: CompiledGradients):
        self._inner, self._untrained, mesh = inner, gradients.parts.untrained, gradients.mesh
        whole = None if mesh is None else named(mesh, P())
        cut = None if mesh is None else (named(mesh, lora_specs(gradients.trained, mesh)), whole)

        def norm_and_correct(grads: Lora, computed: dict[str, jax.Array]) -> tuple[Lora, jax.Array]:
            return correction.apply(grads, computed), global_norm(in_f32(grads))

        self._compute = jax.jit(correction.compute, out_shardings=whole)
        self._correct = jax.jit(norm_and_correct, donate_argnums=0, out_shardings=cut)
        self._computed: dict[str, jax.Array] | None = None  # once, because fixed leaves never change

    def _split(self, lora: Lora) -> tuple[Lora, Lora]:
        return split_leaves(lora, self._untrained)

    def init(self, lora: Lora) -> OptimizerState:
        return self._inner.init(self._split(lora)[0])

    def make_room(self, state: OptimizerState, work: Workload) -> tuple[OptimizerState, int, Transfers]:
        return self._inner.make_room(state, work)

    def update(
        self, lora: Lora, state: OptimizerState, grads: Lora, room: int, norm: jax.Array | None = None
    ) -> UpdateResult:
        trained, fixed = self._split(lora)
        if self._computed is None:
            self._computed = self._compute(fixed)
        grads, own_norm = self._correct(grads, self._computed)
        trained, state, norm, moved = self._inner.update(
            trained, state, grads, room, own_norm if norm is None else norm
        )
        return join_leaves(trained, fixed), state, norm, moved

    def metrics(self, state: OptimizerState, moved: Transfers) -> Record:
        return self._inner.metrics(state, moved)

    def to_checkpoint(self, state: OptimizerState) -> optax.OptState:
        return self._inner.to_checkpoint(state)

    def checkpoint_template(self, lora: Lora) -> optax.OptState:
        return self._inner.checkpoint_template(self._split(lora)[0])

    def from_checkpoint(self, tree: optax.OptState) -> OptimizerState:
        return self._inner.from_checkpoint(tree)

    def describe(self) -> str:
        return self._inner.describe()
