"""The optax chain of a run, its state in and out of pages, and the state's cut over a mesh."""

import functools
from collections.abc import Callable

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from qlora_jax.config import OptimArgs, plain_name
from qlora_jax.optim.loraplus import rate_factors, scale_updates
from qlora_jax.optim.optimizers_8bit import adamw_8bit_values, lion_8bit_values
from qlora_jax.optim.page_layout import Layout, PyTreeDef, layer_pages, state_owners
from qlora_jax.optim.page_pool import COPY_ERRORS, Memory, Page, PagingError, Parts, Transfers, on_device
from qlora_jax.optim.pager import PagedState, PagedUpdate, on_host, paged_init
from qlora_jax.optim.schedule import make_schedule
from qlora_jax.optim.updates import apply_updates, clip_by_norm, in_f32
from qlora_jax.sharding import named


def _in_f32(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps state and arithmetic in f32, whatever the parameters' dtype.

    optax computes `decay ** count` with an integer count, which strict dtype promotion forbids.
    """

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        with jax.numpy_dtype_promotion("standard"):
            return transform.update(updates, state, in_f32(params))

    return optax.GradientTransformation(lambda params: transform.init(in_f32(params)), update)


def _adamw_32bit(args: OptimArgs, rate: optax.Schedule) -> optax.GradientTransformation:
    adamw = optax.adamw(rate, args.beta1, args.beta2, args.eps, weight_decay=args.weight_decay)
    return scale_updates(_in_f32(adamw), rate_factors(args.loraplus_lr_ratio))


def _adamw_8bit(args: OptimArgs, rate: optax.Schedule) -> optax.GradientTransformation:
    factors = rate_factors(args.loraplus_lr_ratio)
    return adamw_8bit_values(rate, args.beta1, args.beta2, args.eps, args.weight_decay, factors)


def _lion_32bit(args: OptimArgs, rate: optax.Schedule) -> optax.GradientTransformation:
    lion = optax.lion(rate, args.beta1, args.beta2, weight_decay=args.weight_decay)
    return scale_updates(_in_f32(lion), rate_factors(args.loraplus_lr_ratio))


def _lion_8bit(args: OptimArgs, rate: optax.Schedule) -> optax.GradientTransformation:
    return lion_8bit_values(rate, args.beta1, args.beta2, args.weight_decay, rate_factors(args.loraplus_lr_ratio))


# Elementwise transforms only, because paged state is updated page by page. Names have no `paged_` prefix, which says
# where the state is but does not change the update.
OPTIMIZERS: dict[str, Callable[[OptimArgs, optax.Schedule], optax.GradientTransformation]] = {
    "adamw_32bit": _adamw_32bit,
    "adamw_8bit": _adamw_8bit,
    "lion_32bit": _lion_32bit,
    "lion_8bit": _lion_8bit,
}


def make_elementwise(args: OptimArgs, total_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer without clipping: an element's update depends only on that element or its 8-bit block."""
    return OPTIMIZERS[plain_name(args.name)](args, make_schedule(args, total_steps))


def make_optimizer(args: OptimArgs, total_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of a run: clipping to `max_grad_norm` (0: none), then `args.name` at the schedule's rate.

    Expects f32 gradients. Apply its updates with qlora_jax.optim.updates. The state has leaves for each leaf of
    the pytree passed to `init`, and a step count. `update` takes the global norm as `norm`, if it is known already.
    """
    optimizer = make_elementwise(args, total_steps)
    if args.max_grad_norm == 0:
        return optimizer
    return optax.chain(clip_by_norm(args.max_grad_norm), optimizer)


def to_optax(state: PagedState, layout: Layout, memory: Memory) -> PyTree:
    """Assembles the unpaged state for a checkpoint: NumPy arrays, or on a mesh arrays in pinned host memory.

    Device pages are copied one at a time; every page stays where it is.
    """
    wholes: list[dict[tuple[slice, ...], np.ndarray]] = [{} for _ in layout.leaves]
    for index, page in enumerate(state.pages):
        for (leaf, first, rows), parts in zip(layout.page_leaves(index), _values(page, memory), strict=True):
            length = layout.leaves[leaf].shape[0]
            for place, values in parts.items():
                if place not in wholes[leaf]:
                    wholes[leaf][place] = np.empty((length, *values.shape[1:]), values.dtype)
                wholes[leaf][place][first : first + rows] = values
    counts = (_copied(memory.parts(count)) for count in state.shared)
    whole = [next(counts) if owner is None else wholes[i] for i, owner in enumerate(layout.owners)]
    leaves = [memory.joined(parts, layout.leaves[i].shape, layout.spec(i)) for i, parts in enumerate(whole)]
    return jax.tree.unflatten(layout.state, leaves)


def _values(page: Page, memory: Memory) -> list[Parts]:
    """Reads a page; a device page is copied through pinned host memory, or directly if that is full."""
    try:
        copy = memory.to_host(page) if on_device(page) else page
        memory.wait(copy)
    except COPY_ERRORS:
        copy = page
    values = [_copied(memory.parts(leaf)) for leaf in copy]
    if copy is not page:
        memory.free(copy)
    return values


def _copied(parts: Parts) -> Parts:
    return {place: np.array(values) for place, values in parts.items()}


def from_optax(tree: PyTree, layout: Layout, memory: Memory) -> PagedState:
    """Cuts an unpaged state into pages, all on the host. A state on the host does not pass through the device.

    Raises:
      PagingError: the host has no room for a page; the pages before it are freed.
    """
    leaves = [memory.parts(leaf) for leaf in jax.tree.leaves(tree)]
    pages: list[Page] = []
    for index in range(layout.count):
        cut = functools.partial(_cut_page, leaves, memory, index, layout)
        try:
            pages.append(on_host(cut, memory, index, layout))
        except PagingError:
            for page in pages:
                memory.free(page)
            raise
    pairs = zip(leaves, layout.owners, strict=True)
    counts = tuple(memory.put(memory.joined(parts, (), P())) for parts, owner in pairs if owner is None)
    return PagedState(tuple(pages), counts)


def _cut_page(leaves: list[Parts], memory: Memory, index: int, layout: Layout) -> Page:
    """Cuts one page from whole leaves."""

    def cut(leaf: int, first: int, rows: int) -> jax.Array | np.ndarray:
        parts = {place: values[first : first + rows] for place, values in leaves[leaf].items()}
        return memory.joined(parts, (rows, *layout.leaves[leaf].shape[1:]), layout.spec(leaf))

    return tuple(cut(*where) for where in layout.page_leaves(index))


def unpage(
    state: PagedState, structure: PyTreeDef, layout: Layout, memory: Memory
) -> tuple[PyTree | PagedState, Transfers]:
    """Moves all pages to the device as one unpaged state; returns (that state, transfers).

    Returns the pages unchanged if one of them is already on the device, or if the copy fails.

    Args:
      structure: the structure of the unpaged state.
    """
    if any(on_device(page) for page in state.pages):
        return state, Transfers()
    try:
        leaves = jax.tree.leaves(to_optax(state, layout, memory))
        copies = memory.to_device(_owned(leaves, layout))
        memory.wait(copies)
    except COPY_ERRORS:  # the device may still have room for pages, one at a time
        return state, Transfers()
    for page in state.pages:
        memory.free(page)
    own, shared = iter(copies), iter(state.shared)
    whole = [next(shared) if owner is None else next(own) for owner in layout.owners]
    return jax.tree.unflatten(structure, whole), Transfers(bytes_in=layout.total_bytes, pages_in=layout.count)


def page_out_all(whole: PyTree, layout: Layout, memory: Memory) -> tuple[PyTree | PagedState, Transfers]:
    """Moves an unpaged state to the host as pages; returns (pages, transfers).

    Returns the state unchanged, with the problem in `transfers`, if the host has no room.
    """
    try:
        state = from_optax(whole, layout, memory)
    except PagingError as error:
        return whole, Transfers(problems=(f"the whole state stays on the device, beyond its budget: {error}",))
    memory.free(_owned(jax.tree.leaves(whole), layout))
    return state, Transfers(bytes_out=layout.total_bytes, pages_out=layout.count)


def _owned(leaves: list, layout: Layout) -> Page:
    """The leaves that pages are cut from: not those that all pages share."""
    return tuple(leaf for leaf, owner in zip(leaves, layout.owners, strict=True) if owner is not None)


def state_specs(optimizer: optax.GradientTransformation, params: PyTree, specs: PyTree) -> PyTree:
    """Returns the PartitionSpec of every leaf of the state.

    Args:
      params: arrays, tracers or ShapeDtypeStructs, in whole shapes.
      specs: the PartitionSpecs of the parameters.
    """
    structure, _, owners = state_owners(optimizer, params)
    by_parameter = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, P))
    return jax.tree.unflatten(structure, [P() if owner is None else by_parameter[owner] for owner in owners])


def init_state(optimizer: optax.GradientTransformation, params: PyTree, specs: PyTree, mesh: Mesh) -> PyTree:
    """Computes `optimizer.init(params)` on the mesh.

    The sharding of every leaf is given: a count does not depend on parameters, so JAX would place it on one device.
    """
    shardings = named(mesh, state_specs(optimizer, params, specs))
    return jax.jit(optimizer.init, out_shardings=shardings)(params)


# Optimizers that tests/optim/test_pager.py proves elementwise; `check_elementwise` checks others when a run starts.
ELEMENTWISE = frozenset({"adamw_32bit", "adamw_8bit", "lion_32bit", "lion_8bit"})


def check_elementwise(transform: optax.GradientTransformation, params: PyTree, layout: Layout, memory: Memory) -> None:
    """Checks that a transform gives the same bits in pages as on whole leaves.

    Updates random parameters of two pages by random gradients in two steps, because the first starts from zeros.

    Args:
      params: arrays or ShapeDtypeStructs; only their shapes and dtypes are used.

    Raises:
      ValueError: the bits differ.
    """
    short = [
        jax.ShapeDtypeStruct((min(2 * k, leaf.shape[0]), *leaf.shape[1:]), leaf.dtype)
        for leaf, k in zip(jax.tree.leaves(params), layout.rows, strict=True)
    ]
    specs = jax.tree.unflatten(layout.params, layout.specs)
    pair = layer_pages(
        transform, jax.tree.unflatten(layout.params, short), layout.largest_page, specs=specs, mesh=layout.mesh
    )
    if pair.count > 1 and not _is_equal_in_pages(transform, short, pair, memory):
        raise ValueError(
            "optim.paging: this optimizer is not elementwise: its parameters or its state differ if updated in "
            "pages. Use it without paging (optim.paging=off in a run)."
        )


def _is_equal_in_pages(
    transform: optax.GradientTransformation, shapes: list[jax.ShapeDtypeStruct], layout: Layout, memory: Memory
) -> bool:
    def numbers(seed: int) -> PyTree:
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        drawn = [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, shapes, strict=True)]
        return jax.tree.unflatten(layout.params, drawn)

    @jax.jit
    def plain(params: PyTree, state: PyTree, grads: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = transform.update(in_f32(grads), state, params)
        return apply_updates(params, updates), state

    update = PagedUpdate(transform, layout, memory, max_grad_norm=0.0)
    whole, state = numbers(0), jax.jit(transform.init)(numbers(0))
    params, paged = numbers(0), paged_init(transform, numbers(0), layout, memory)
    for seed in (1, 2):
        whole, state = plain(whole, state, numbers(seed))
        params, paged, *_ = update(params, paged, numbers(seed), 0)
    pairs = zip(
        jax.tree.leaves((whole, state)), jax.tree.leaves((params, to_optax(paged, layout, memory))), strict=True
    )
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)
