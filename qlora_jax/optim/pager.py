"""An optax update in pages: state that does not fit the device waits in host memory, and no bit of a result changes.

Any transform is paged whose update of an element depends on that element, its gradient and its state alone. Parameters
and gradients stay whole on the device; state is held as pages (see pages.py), which go through the device one after
another, forward in one step and backward in the next: with room for C of P pages, P - C move in and out each step.

    layout = layer_pages(transform, params)
    state = paged_init(transform, params, layout, memory)
    update = PagedUpdate(transform, layout, memory, max_grad_norm)
    params, state, norm, moved = update(params, state, grads, budget_bytes)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Float

from qlora_jax.config.sizes import format_bytes
from qlora_jax.optim.apply_updates import apply_updates, in_f32
from qlora_jax.optim.page_layout import Layout, Structure, Tree
from qlora_jax.optim.page_pool import (
    COPY_ERRORS,
    Memory,
    Moved,
    Page,
    PagingError,
    Pool,
    first_line,
    on_device,
    page_bytes,
)

AHEAD = 2  # pages whose copy to the device is under way while one is updated, where the budget has room

Shared = tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedState:
    """An optimizer's state as pages, wherever each is now, and what they share (counts).

    Used once: an update donates the pages on the device, and the copies on the host are freed as pages move.
    """

    pages: tuple[Page, ...]
    shared: Shared


def paged_init(transform: optax.GradientTransformation, params: Tree, layout: Layout, memory: Memory) -> PagedState:
    """`transform.init(params)`, all pages on the host; no more than one at a time is on the device.

    Raises:
      PagingError: the host has no room for a page.
    """
    leaves = jax.tree.leaves(params)
    pages, shared = [], ()
    for index in range(layout.count):
        rows = layout.page_rows(index)
        first = [index * k for k in layout.rows]
        cut = [jax.lax.dynamic_slice_in_dim(leaf, i, k) for leaf, i, k in zip(leaves, first, rows, strict=True)]
        page, shared = _split(layout, rows, jax.tree.leaves(jax.jit(transform.init)(layout.paged_tree(cut, rows))))
        pages.append(_on_host(page, memory, index, layout))
    return PagedState(tuple(pages), jax.device_put(shared, memory.device_sharding))


def _on_host(page: Page, memory: Memory, index: int, layout: Layout) -> Page:
    """A copy on the host, which is there."""
    try:
        copy = memory.to_host(page)
        memory.wait(copy)
    except COPY_ERRORS as error:
        raise PagingError(
            f"page {index} of {layout.count} of the optimizer's state ({format_bytes(page_bytes(page))}; "
            f"{format_bytes(layout.total_bytes)} in all) can't be placed in host memory ({first_line(error)}); make "
            "room there, or set optim.paging=off"
        ) from error
    return copy


def resident_bytes(state: PagedState) -> int:
    """Device bytes of the pages, as their arrays tell it."""
    return sum(page_bytes(page) for page in state.pages if on_device(page))


class PagedUpdate:
    """`params, state, norm, moved = update(params, state, grads, budget_bytes)`: one optimizer step, in pages.

    Equal to the bit to a jitted `optax.chain(clip_by_global_norm(max_grad_norm), transform)` with apply_updates.
    Donates `params` and `state`. One program is compiled for each shape of page: two, where the last is smaller.

    Args:
      transform: elementwise; see qlora_jax.optim.elementwise.
      max_grad_norm: gradients are scaled down to this global norm, over all pages; 0: as they are.
    """

    def __init__(self, transform: optax.GradientTransformation, layout: Layout, memory: Memory, max_grad_norm: float):
        self._transform, self._layout, self._memory = transform, layout, memory
        self._max_grad_norm = max_grad_norm
        self._norm = jax.jit(lambda grads: optax.tree.norm(in_f32(grads)))
        self._programs: dict[tuple[int, ...], Any] = {}

    def __len__(self) -> int:
        """How many programs were compiled."""
        return len(self._programs)

    def __call__(
        self, params: Tree, state: PagedState, grads: Tree, budget_bytes: int
    ) -> tuple[Tree, PagedState, Float[Array, ""], Moved]:
        """(parameters, state, global norm before clipping, what was moved).

        Args:
          budget_bytes: device memory that pages may take, those being copied included; 0 or more. A page can only be
            updated on the device, so while it is, that one page may be more; afterwards it is not.

        Raises:
          ValueError: a negative budget.
          PagingError: a page can't be placed on the device; the step is not complete.
        """
        if budget_bytes < 0:
            raise ValueError(f"budget_bytes: found {budget_bytes}, expected 0 or more")
        # Before any page, for it is over all of them; when it is there, so is the scratch of what computed `grads`.
        norm = jax.block_until_ready(self._norm(grads))
        order = sweep_order(state)
        pool = Pool(state.pages, self._memory, order, max(budget_bytes, self._layout.largest_page))
        leaves, gradients, shared = jax.tree.leaves(params), jax.tree.leaves(grads), state.shared
        for turn, index in enumerate(order):
            page = pool.take(index)
            program = self._program(index, leaves, gradients, state.shared, page, norm)
            leaves, page, shared = program(leaves, gradients, state.shared, page, np.int32(index), norm)
            pool.give(index, page)
            for ahead in order[turn + 1 : turn + 1 + AHEAD]:
                pool.prefetch(ahead)
        pool.shrink(budget_bytes)
        params = jax.tree.unflatten(self._layout.params, leaves)
        return params, PagedState(tuple(pool.pages), shared), norm, pool.moved

    def _program(self, index: int, *args: Any) -> Any:
        rows = self._layout.page_rows(index)
        if rows not in self._programs:
            update = _page_update(self._transform, self._layout, rows, self._max_grad_norm)
            leaves, gradients, shared, page, norm = args
            lowered = jax.jit(update, donate_argnums=(0, 3)).lower(
                leaves, gradients, shared, page, np.int32(index), norm
            )
            self._programs[rows] = lowered.compile()
        return self._programs[rows]


def sweep_order(state: PagedState) -> list[int]:
    """The order of the next update: from the end whose pages are on the device, which is where the last one ended."""
    first, last = on_device(state.pages[0]), on_device(state.pages[-1])
    order = range(len(state.pages))
    return [*reversed(order)] if last and not first else [*order]


def fit(state: PagedState, memory: Memory, budget_bytes: int) -> tuple[PagedState, Moved]:
    """The state with pages of `budget_bytes` at most on the device; the others are on the host when it returns."""
    pool = Pool(state.pages, memory, sweep_order(state), budget_bytes)
    pool.shrink(budget_bytes)
    return PagedState(tuple(pool.pages), state.shared), pool.moved


def _page_update(
    transform: optax.GradientTransformation, layout: Layout, rows: tuple[int, ...], max_grad_norm: float
) -> Callable[..., Any]:
    """`update(params, grads, shared, page, index, norm) -> (params, page, shared)` for such a page, in lists."""

    def cut(leaves: list[jax.Array], index: jax.Array) -> Tree:
        slices = [
            jax.lax.dynamic_slice_in_dim(leaf, index * step, k, 0) if k else None
            for leaf, step, k in zip(leaves, layout.rows, rows, strict=True)
        ]
        return layout.paged_tree(slices, rows)

    def put(leaves: list[jax.Array], tree: Tree, index: jax.Array) -> list[jax.Array]:
        new = iter(jax.tree.leaves(tree))
        return [
            jax.lax.dynamic_update_slice_in_dim(leaf, next(new), index * step, 0) if k else leaf
            for leaf, step, k in zip(leaves, layout.rows, rows, strict=True)
        ]

    def update(params, grads, shared, page, index, norm):
        own = cut(params, index)
        structure = jax.tree.structure(jax.eval_shape(transform.init, own))
        state = jax.tree.unflatten(structure, _joined(layout, rows, page, shared))
        updates, state = transform.update(_clipped(in_f32(cut(grads, index)), norm, max_grad_norm), state, own)
        page, shared = _split(layout, rows, jax.tree.leaves(state))
        return put(params, apply_updates(own, updates), index), page, shared

    return update


def _clipped(grads: Tree, norm: jax.Array, max_norm: float) -> Tree:
    """As optax.clip_by_global_norm, to the bit, with a norm that is known."""
    if max_norm == 0:
        return grads
    small = norm < max_norm
    return jax.tree.map(lambda g: jax.lax.select(small, g, (g / norm.astype(g.dtype)) * max_norm), grads)


def _split(layout: Layout, rows: tuple[int, ...], leaves: list[Any]) -> tuple[Page, Shared]:
    """A page's state leaves as (those that are its own, those that all pages share)."""
    pairs = list(zip(_owners_in(layout, rows), leaves, strict=True))
    own = tuple(leaf for owner, leaf in pairs if owner is not None)
    return own, tuple(leaf for owner, leaf in pairs if owner is None)


def _joined(layout: Layout, rows: tuple[int, ...], page: Page, shared: Shared) -> list[Any]:
    """The inverse of `_split`."""
    own, rest = iter(page), iter(shared)
    return [next(rest) if owner is None else next(own) for owner in _owners_in(layout, rows)]


def _owners_in(layout: Layout, rows: tuple[int, ...]) -> list[int | None]:
    return [owner for owner in layout.owners if owner is None or rows[owner]]


def to_optax(state: PagedState, layout: Layout, memory: Memory) -> Tree:
    """The state that the plain optimizer would have, its leaves whole NumPy arrays on the host: what is saved.

    Pages on the device are copied one at a time; none changes its place.
    """
    leaves = [np.empty(leaf.shape, leaf.dtype) for leaf in layout.leaves]
    for index, page in enumerate(state.pages):
        for (leaf, first, rows), values in zip(layout.page_leaves(index), _values(page, memory), strict=True):
            leaves[leaf][first : first + rows] = values
    counts = iter(state.shared)
    whole = [np.array(next(counts)) if owner is None else leaves[i] for i, owner in enumerate(layout.owners)]
    return jax.tree.unflatten(layout.state, whole)


def _values(page: Page, memory: Memory) -> list[np.ndarray]:
    """A page's arrays; one on the device goes through the host's pinned memory, or straight where that is full."""
    try:
        copy = memory.to_host(page) if on_device(page) else page
        memory.wait(copy)
    except COPY_ERRORS:
        copy = page
    values = [np.array(leaf) for leaf in copy]
    if copy is not page:
        memory.free(copy)
    return values


def from_optax(tree: Tree, layout: Layout, memory: Memory) -> PagedState:
    """Pages of a plain optimizer's state, all on the host; of a tree on the host, nothing is staged on the device.

    Raises:
      PagingError: the host has no room for a page; it holds none then.
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    pages: list[Page] = []
    for index in range(layout.count):
        cut = tuple(leaves[leaf][first : first + rows] for leaf, first, rows in layout.page_leaves(index))
        try:
            pages.append(_on_host(cut, memory, index, layout))
        except PagingError:
            for page in pages:
                memory.free(page)
            raise
    shared = [leaf for leaf, owner in zip(leaves, layout.owners, strict=True) if owner is None]
    return PagedState(tuple(pages), tuple(jax.device_put(leaf, memory.device_sharding) for leaf in shared))


def check_budget(budget_bytes: int, layout: Layout, device_bytes: int | None) -> None:
    """Passes a budget that holds a page and that the device has; `device_bytes` None: not known.

    Raises:
      ValueError: what was found, and the bounds.
    """
    bounds = [(budget_bytes < layout.largest_page, f"at least {layout.largest_page:,} bytes, one page")]
    if device_bytes is not None:
        bounds.append((budget_bytes > device_bytes, f"at most {device_bytes:,} bytes, what the device has"))
    for broken, words in bounds:
        if broken:
            raise ValueError(f"optim.paging_budget: found {budget_bytes:,} bytes, expected {words}")


def joined(state: PagedState, structure: Structure, layout: Layout, memory: Memory) -> tuple[Tree | PagedState, Moved]:
    """(the plain optimizer's state on the device, what moved); as it is where a page is there, or the copy fails.

    Args:
      structure: of the result.
    """
    if any(on_device(page) for page in state.pages):
        return state, Moved()
    leaves = jax.tree.leaves(to_optax(state, layout, memory))
    try:
        copies = memory.to_device(_owned(leaves, layout))
        memory.wait(copies)
    except COPY_ERRORS:  # one page after another may still have room
        return state, Moved()
    for page in state.pages:
        memory.free(page)
    own, shared = iter(copies), iter(state.shared)
    whole = [next(shared) if owner is None else next(own) for owner in layout.owners]
    return jax.tree.unflatten(structure, whole), Moved(bytes_in=layout.total_bytes, pages_in=layout.count)


def cut(whole: Tree, layout: Layout, memory: Memory) -> tuple[Tree | PagedState, Moved]:
    """(pages, all on the host, what moved); the state as it is, and the problem, where the host has no room."""
    try:
        state = from_optax(whole, layout, memory)
    except PagingError as error:
        return whole, Moved(problems=(f"the whole state stays on the device, beyond its budget: {error}",))
    memory.free(_owned(jax.tree.leaves(whole), layout))
    return state, Moved(bytes_out=layout.total_bytes, pages_out=layout.count)


def _owned(leaves: list, layout: Layout) -> Page:
    """The leaves that pages are cut from."""
    return tuple(leaf for leaf, owner in zip(leaves, layout.owners, strict=True) if owner is not None)
