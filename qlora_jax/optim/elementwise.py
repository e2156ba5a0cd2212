"""Checks that an optimizer is elementwise, so that it can be updated page by page."""

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from qlora_jax.optim.apply_updates import apply_updates, in_f32
from qlora_jax.optim.optax_state import to_optax
from qlora_jax.optim.page_layout import Layout, layer_pages
from qlora_jax.optim.page_pool import Memory
from qlora_jax.optim.pager import PagedUpdate, paged_init

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
