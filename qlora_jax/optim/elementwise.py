"""Which optimizers may be updated in pages: those where an element depends on nothing but itself."""

import jax
import numpy as np
import optax

from qlora_jax.optim.apply_updates import apply_updates
from qlora_jax.optim.page_layout import Layout, Tree, layer_pages
from qlora_jax.optim.page_pool import Memory
from qlora_jax.optim.pager import PagedUpdate, paged_init, to_optax

# Names in optim.chain's table that tests/optim/test_pager.py finds equal to the bit; `check_elementwise` asks others.
ELEMENTWISE = frozenset({"adamw_32bit", "adamw_8bit", "lion_32bit", "lion_8bit"})


def check_elementwise(transform: optax.GradientTransformation, params: Tree, layout: Layout, memory: Memory) -> None:
    """Passes a transform that gives the same bits in pages as at once, over the rows of two pages, in two steps.

    Two steps, for the first starts from a state of zeros. Gradients are random numbers.

    Args:
      params: arrays or ShapeDtypeStructs; their shapes count.

    Raises:
      ValueError: the bits differ.
    """
    short = [
        jax.ShapeDtypeStruct((min(2 * k, leaf.shape[0]), *leaf.shape[1:]), leaf.dtype)
        for leaf, k in zip(jax.tree.leaves(params), layout.rows, strict=True)
    ]
    pair = layer_pages(transform, jax.tree.unflatten(layout.params, short), layout.largest_page)
    if pair.count > 1 and not _same_in_pages(transform, short, pair, memory):
        raise ValueError(
            "this optimizer is not elementwise: updated in pages, its parameters or its state differ from those "
            "updated at once; set optim.paging=off"
        )


def _same_in_pages(
    transform: optax.GradientTransformation, shapes: list[jax.ShapeDtypeStruct], layout: Layout, memory: Memory
) -> bool:
    def numbers(seed: int) -> Tree:
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        drawn = [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, shapes, strict=True)]
        return jax.tree.unflatten(layout.params, drawn)

    @jax.jit
    def plain(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
        updates, state = transform.update(grads, state, params)
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
