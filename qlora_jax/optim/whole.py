"""A paged state as the plain optimizer's own, uncut on the device, for as long as there is room for all of it.

Pages that all stay cost more than no pages: each is cut from the parameters and put back, in a program of its own. So
the whole state goes to the device at once where all of it was away and has room, and is cut again, all of it by way of
the host, when a batch leaves less. Pages that are partly there are left as they are: they move less.
"""

import jax

from qlora_jax.optim.pager import PagedState, from_optax, to_optax
from qlora_jax.optim.pages import Layout, Structure, Tree
from qlora_jax.optim.residency import COPY_ERRORS, Memory, Moved, Page, PagingError, on_device


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
