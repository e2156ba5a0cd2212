"""Pages of optimizer state to one optax state and back, for checkpoints and for steps that have room."""

import functools

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from qlora_jax.optim.page_layout import Layout, PyTreeDef
from qlora_jax.optim.page_pool import COPY_ERRORS, Memory, Page, PagingError, Parts, Transfers, on_device
from qlora_jax.optim.pager import PagedState, on_host


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
