"""The optimizer pager: state that does not fit the device waits in host memory, and results stay bit-identical.

A transform can be paged if its update of an element depends only on that element, its gradient and its state.
Parameters and gradients stay whole on the device. The state is cut into pages (page_layout.py), and an update sweeps
them through the device: forward in one step, backward in the next. With room for C of P pages, P - C move in and out
per step. Page copies and evictions are in page_pool.py.

    layout = layer_pages(transform, params)
    state = paged_init(transform, params, layout, memory)
    update = PagedUpdate(transform, layout, memory, max_grad_norm)
    params, state, norm, transfers = update(params, state, grads, budget_bytes)

`qlora_jax.optim.paged_transform` wraps this as an optax transformation.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from qlora_jax.config.sizes import format_bytes
from qlora_jax.optim.page_layout import Layout, PyTreeDef
from qlora_jax.optim.page_pool import (
    COPY_ERRORS,
    Memory,
    Page,
    PagingError,
    Pool,
    Transfers,
    first_line,
    on_device,
    page_bytes,
)
from qlora_jax.optim.updates import apply_updates, clipped, global_norm, in_f32
from qlora_jax.sharding import named

PREFETCHED_PAGES = 2  # copied to the device while one is updated, as far as the budget has room

Shared = tuple[jax.Array, ...]


class PagedState(NamedTuple):
    """An optimizer's state in pages, each on the device or on the host, and the leaves that all pages share (counts).

    `PagedUpdate` consumes it: device pages are donated, and host pages are freed as they move.
    """

    pages: tuple[Page, ...]
    shared: Shared


def paged_init(transform: optax.GradientTransformation, params: PyTree, layout: Layout, memory: Memory) -> PagedState:
    """Computes `transform.init(params)` page by page. At most one page is on the device; all end on the host.

    Raises:
      PagingError: the host has no room for a page.
    """
    leaves = jax.tree.leaves(params)
    pages, shared = [], ()
    for index in range(layout.count):
        rows = layout.page_rows(index)
        first = [index * k for k in layout.rows]
        cut = [jax.lax.dynamic_slice_in_dim(leaf, i, k) for leaf, i, k in zip(leaves, first, rows, strict=True)]
        page, shared = _split(layout, rows, _init_page(transform, layout, rows, layout.paged_tree(cut, rows)))
        pages.append(on_host(lambda page=page: page, memory, index, layout))
    return PagedState(tuple(pages), jax.device_put(shared, memory.device_sharding(P())))


def _init_page(
    transform: optax.GradientTransformation, layout: Layout, rows: tuple[int, ...], params: PyTree
) -> list[jax.Array]:
    """Returns the leaves of a page's state, and the shared ones."""
    if layout.mesh is None:
        return jax.tree.leaves(jax.jit(transform.init)(params))
    shardings = [named(layout.mesh, layout.owner_spec(owner)) for owner in _owners_in(layout, rows)]
    return jax.jit(lambda params: jax.tree.leaves(transform.init(params)), out_shardings=shardings)(params)


def on_host(make: Callable[[], Page], memory: Memory, index: int, layout: Layout) -> Page:
    """Returns a complete copy on the host of page `index`, which `make` returns.

    Raises:
      PagingError: the host has no room for it.
    """
    try:
        copy = memory.to_host(make())
        memory.wait(copy)
    except COPY_ERRORS as error:
        raise PagingError(
            f"page {index} of {layout.count} of the optimizer's state ({format_bytes(layout.page_bytes(index))}; "
            f"{format_bytes(layout.total_bytes)} in all): host memory has no room for it ({first_line(error)}). Free "
            "host memory, or set optim.paging=off."
        ) from error
    return copy


def resident_bytes(state: PagedState) -> int:
    """Returns the device bytes of the pages."""
    return sum(page_bytes(page) for page in state.pages if on_device(page))


class PagedUpdate:
    """`params, state, norm, transfers = update(params, state, grads, budget_bytes)`: one optimizer step, in pages.

    Bit-identical to a jitted `optax.chain(clip_by_global_norm(max_grad_norm), transform)` with apply_updates. Donates
    `params` and `state`. Compiles one program per page shape: two, where the last page is smaller.

    Args:
      transform: elementwise; see qlora_jax.optim.optax_chain.
      max_grad_norm: the global norm to which gradients are clipped, over all pages; 0 turns clipping off.
    """

    def __init__(self, transform: optax.GradientTransformation, layout: Layout, memory: Memory, max_grad_norm: float):
        self._transform, self._layout, self._memory = transform, layout, memory
        self._max_grad_norm = max_grad_norm
        self._norm = jax.jit(_norm_program(layout))
        self._programs: dict[tuple[int, ...], jax.stages.Compiled] = {}

    def __len__(self) -> int:
        """The number of compiled programs."""
        return len(self._programs)

    def __call__(
        self,
        params: PyTree,
        state: PagedState,
        grads: PyTree,
        budget_bytes: int,
        norm: Float[Array, ""] | None = None,
    ) -> tuple[PyTree, PagedState, Float[Array, ""], Transfers]:
        """Returns (parameters, state, global norm before clipping, transfers).

        Args:
          budget_bytes: device memory that pages may take, copies under way included; 0 or more. The page being updated
            is on the device whatever the budget; afterwards it counts.
          norm: the global norm, if `grads` were changed after it was computed.

        Raises:
          ValueError: a negative budget.
          PagingError: a page cannot be placed on the device; the step is not complete.
        """
        # Before the first page, because the norm spans all pages. Once it is ready, the program that computed `grads`
        # has ended, and its scratch memory is free.
        total = jax.block_until_ready(self._norm(grads) if norm is None else norm)
        leaves, gradients, shared = jax.tree.leaves(params), jax.tree.leaves(grads), state.shared

        def update_page(index: int, page: Page) -> Page:
            nonlocal leaves, shared
            args = leaves, gradients, state.shared, page, np.int32(index), total
            leaves, page, shared = self._program(index, *args)(*args)
            return page

        pages, transfers = sweep(state, self._layout, self._memory, budget_bytes, update_page)
        return jax.tree.unflatten(self._layout.params, leaves), PagedState(pages, shared), total, transfers

    def _program(self, index: int, params: list[jax.Array], *rest: object) -> jax.stages.Compiled:
        rows = self._layout.page_rows(index)
        if rows not in self._programs:
            structure = page_structure(self._transform, self._layout, rows, params)
            update = _page_update(self._transform, self._layout, rows, structure, self._max_grad_norm)
            on_devices = _on_devices(update, self._layout, rows)
            self._programs[rows] = jax.jit(on_devices, donate_argnums=(0, 3)).lower(params, *rest).compile()
        return self._programs[rows]


def _norm_program(layout: Layout) -> Callable[[PyTree], jax.Array]:
    """Returns `norm(grads)`, on a mesh of the parts of all devices."""
    if layout.mesh is None:
        return lambda grads: global_norm(in_f32(grads))
    specs = jax.tree.unflatten(layout.params, layout.specs)
    return jax.shard_map(
        lambda grads: global_norm(in_f32(grads), specs),
        mesh=layout.mesh,
        in_specs=(specs,),
        out_specs=P(),
        check_vma=False,
    )


def _on_devices(update: Callable[..., tuple], layout: Layout, rows: tuple[int, ...]) -> Callable[..., tuple]:
    """Returns the update of a page, in which each device of a mesh updates its own parts."""
    if layout.mesh is None:
        return update
    params = list(layout.specs)
    page = tuple(layout.owner_spec(owner) for owner in _owners_in(layout, rows) if owner is not None)
    return jax.shard_map(
        update,
        mesh=layout.mesh,
        in_specs=(params, params, P(), page, P(), P()),
        out_specs=(params, page, P()),
        check_vma=False,
    )


def sweep(
    state: PagedState, layout: Layout, memory: Memory, budget_bytes: int, update_page: Callable[[int, Page], Page]
) -> tuple[tuple[Page, ...], Transfers]:
    """Passes every page through the device once, and returns (the updated pages, transfers).

    The next pages are prefetched while one is updated. Updated pages are evicted as the budget requires.

    Args:
      budget_bytes: device bytes that pages may take; at least the page being updated is on the device.
      update_page: (page number, page on the device) -> the updated page on the device; may donate the page.

    Raises:
      ValueError: a negative budget.
      PagingError: a page cannot be placed on the device.
    """
    if budget_bytes < 0:
        raise ValueError(f"budget_bytes: found {budget_bytes}, expected 0 or more")
    order = sweep_order(state)
    pool = Pool(state.pages, memory, order, max(budget_bytes, layout.largest_page))
    for turn, index in enumerate(order):
        pool.put(index, update_page(index, pool.fetch(index)))
        for following in order[turn + 1 : turn + 1 + PREFETCHED_PAGES]:
            pool.prefetch(following)
    pool.evict_to(budget_bytes)
    return tuple(pool.pages), pool.transfers


def sweep_order(state: PagedState) -> list[int]:
    """Returns the page order of the next update: it starts where the last one ended, at resident pages."""
    first, last = on_device(state.pages[0]), on_device(state.pages[-1])
    order = range(len(state.pages))
    return [*reversed(order)] if last and not first else [*order]


def evict_to_budget(state: PagedState, memory: Memory, budget_bytes: int) -> tuple[PagedState, Transfers]:
    """Evicts pages until at most `budget_bytes` are on the device; returns (state, transfers) when that is complete."""
    pool = Pool(state.pages, memory, sweep_order(state), budget_bytes)
    pool.evict_to(budget_bytes)
    return PagedState(tuple(pool.pages), state.shared), pool.transfers


def _page_update(
    transform: optax.GradientTransformation,
    layout: Layout,
    rows: tuple[int, ...],
    structure: PyTreeDef,
    max_grad_norm: float,
) -> Callable[..., tuple[list[jax.Array], Page, Shared]]:
    """`update(params, grads, shared, page, index, norm) -> (params, page, shared)` for such a page, in lists."""

    def update(params, grads, shared, page, index, norm):
        own, own_grads = (slice_page(layout, rows, leaves, index) for leaves in (params, grads))
        args = clipped(in_f32(own_grads), norm, max_grad_norm), page, shared, own
        updates, page, shared = update_page_state(
            optax.with_extra_args_support(transform), layout, rows, structure, args
        )
        return write_page(layout, rows, params, apply_updates(own, updates), index), page, shared

    return update


def update_page_state(
    transform: optax.GradientTransformationExtraArgs,
    layout: Layout,
    rows: tuple[int, ...],
    structure: PyTreeDef,
    args: tuple[PyTree, Page, Shared, PyTree | None],
    **extra_args: object,
) -> tuple[PyTree, Page, Shared]:
    """Applies a transform to one page: (updates of the page's rows, the new page, the new shared leaves).

    Args:
      structure: that of the page's state, from `page_structure`.
      args: (gradients of the page's rows, page, shared leaves, parameters of the page's rows).
    """
    grads, page, shared, params = args
    state = jax.tree.unflatten(structure, _joined(layout, rows, page, shared))
    updates, state = transform.update(grads, state, params, **extra_args)
    return updates, *_split(layout, rows, jax.tree.leaves(state))


def page_structure(
    transform: optax.GradientTransformation, layout: Layout, rows: tuple[int, ...], params: list[jax.Array]
) -> PyTreeDef:
    """Returns the structure of a page's state.

    Args:
      params: whole parameters. A device's part of one would not do: state is in 8 bits if the whole is large.
    """
    shapes = [jax.ShapeDtypeStruct((k, *leaf.shape[1:]), leaf.dtype) for leaf, k in zip(params, rows, strict=True)]
    return jax.tree.structure(jax.eval_shape(transform.init, layout.paged_tree(shapes, rows)))


def slice_page(layout: Layout, rows: tuple[int, ...], leaves: list[jax.Array], index: ArrayLike) -> PyTree:
    """Slices the rows of page `index` from whole leaves."""
    slices = [
        jax.lax.dynamic_slice_in_dim(leaf, index * step, k, 0) if k else None
        for leaf, step, k in zip(leaves, layout.rows, rows, strict=True)
    ]
    return layout.paged_tree(slices, rows)


def write_page(
    layout: Layout, rows: tuple[int, ...], leaves: list[jax.Array], tree: PyTree, index: ArrayLike
) -> list[jax.Array]:
    """Writes the rows of page `index`, the inverse of `slice_page`."""
    new = iter(jax.tree.leaves(tree))
    return [
        jax.lax.dynamic_update_slice_in_dim(leaf, next(new), index * step, 0) if k else leaf
        for leaf, step, k in zip(leaves, layout.rows, rows, strict=True)
    ]


def _split(layout: Layout, rows: tuple[int, ...], leaves: list[jax.Array]) -> tuple[Page, Shared]:
    """Splits a page's state leaves into (the page, the leaves that all pages share)."""
    pairs = list(zip(_owners_in(layout, rows), leaves, strict=True))
    own = tuple(leaf for owner, leaf in pairs if owner is not None)
    return own, tuple(leaf for owner, leaf in pairs if owner is None)


def _joined(layout: Layout, rows: tuple[int, ...], page: Page, shared: Shared) -> list[jax.Array | np.ndarray]:
    """The inverse of `_split`."""
    own, rest = iter(page), iter(shared)
    return [next(rest) if owner is None else next(own) for owner in _owners_in(layout, rows)]


def _owners_in(layout: Layout, rows: tuple[int, ...]) -> list[int | None]:
    return [owner for owner in layout.owners if owner is None or rows[owner]]


def check_budget(budget_bytes: int, layout: Layout, device_bytes: int | None) -> None:
    """Checks that a budget holds a page and does not exceed the device's memory (None: unknown).

    Raises:
      ValueError: it does not; names the bounds.
    """
    bounds = [(budget_bytes < layout.largest_page, f"at least {layout.largest_page:,} bytes, one page")]
    if device_bytes is not None:
        bounds.append((budget_bytes > device_bytes, f"at most {device_bytes:,} bytes, the device's memory"))
    for broken, words in bounds:
        if broken:
            raise ValueError(f"optim.paging_budget: found {budget_bytes:,} bytes, expected {words}.")
