"""`paged(transform, budget)`: an optax transformation whose state is paged between device and host memory.

    tx = paged(optax.adamw(2e-4), budget="2GiB")
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)  # not under jax.jit
    params = optax.apply_updates(params, updates)

The same pages, pool and sweeps as in a training run (see pager.py), behind optax's `init` and `update`.
"""

import functools
import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import PyTree

from qlora_jax.config.sizes import parse_bytes
from qlora_jax.optim.optax_chain import check_elementwise
from qlora_jax.optim.page_layout import PAGE_BYTES, PAGES_PER_BUDGET, Layout, layer_pages
from qlora_jax.optim.page_pool import Memory, Page
from qlora_jax.optim.pager import (
    PagedState,
    page_structure,
    paged_init,
    slice_page,
    sweep,
    update_page_state,
    write_page,
)
from qlora_jax.sharding import Device


def paged(
    transform: optax.GradientTransformation,
    budget: int | str,
    *,
    page_size: int | str | None = None,
    donate_state: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Pages a transform's state between device and host; updates are bit-identical to those of jitted `transform`.

    >>> optimizer, params = q.paged(optax.sgd(0.1, momentum=0.9), "1MiB"), {"w": jnp.ones((4, 256))}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)  # the gradients are ones, too
    >>> updates["w"][0, :2]
    Array([-0.1, -0.1], dtype=float32)

    `init` and `update` run on the host: they start copies and call one compiled update per page, so they cannot run
    under `jax.jit`. Jit the function that computes the gradients. `update` works in `optax.chain`, and in an
    `nnx.Optimizer` whose `update` is not jitted.

    Each leaf is cut into pages along its first axis. `init` puts every page on the host. An update passes the pages
    through the device, from the end whose pages are already there, and evicts those beyond the budget.

    Args:
      transform: elementwise, which `init` checks: an element's update depends only on that element, its gradient and
        its state. Adam, Lion and RMSProp are; clipping by a global norm is not, so chain it before: `optax.chain(
        optax.clip_by_global_norm(1.0), paged(optax.adamw(2e-4), budget="2GiB"))`.
      budget: device bytes that the pages of a state may take, as a number or as text such as "2GiB". A page can only
        be updated on the device, so one page is there during an update even if the budget is smaller.
      page_size: bytes of a page, at most. The default is 32 MiB, or a quarter of a smaller budget. A saved state
        has pages of one size: set `page_size` to restore it under another budget.
      donate_state: True: an update consumes the state passed to it, so that no page exists twice. False: that state
        stays valid, and its memory is freed when the caller drops it. Gradients and parameters always stay valid.

    Returns:
      (init, update). The state is a pytree of arrays (`PagedState`). Extra arguments of `update` are passed to each
      page's update whole.

    Raises:
      ValueError: here, if a size is malformed; from `init`, if the transform is not elementwise or its state does not
        follow the parameters' rows; from `update`, if the state was made with another page size.
      TypeError: from `init` and `update`, if they are called under a JAX transformation.
      PagingError: from `init` and `update`, if a page fits neither the device nor the host.
    """
    budget_bytes = _bytes("budget", budget)
    default = min(PAGE_BYTES, budget_bytes // PAGES_PER_BUDGET) if budget_bytes else PAGE_BYTES
    page_bytes = default if page_size is None else _bytes("page_size", page_size)
    pager = _Pager(optax.with_extra_args_support(transform), page_bytes, budget_bytes, donate_state)
    return optax.GradientTransformationExtraArgs(pager.init, pager.update)


class _BorrowedMemory(Memory):
    """Memory whose pages belong to the caller: they are freed when nothing refers to them."""

    def free(self, page: Page) -> None:
        pass


class _Pager:
    """`init` and `update` of one transform, and their compiled programs."""

    def __init__(
        self, transform: optax.GradientTransformationExtraArgs, page_bytes: int, budget_bytes: int, donate_state: bool
    ):
        self._transform, self._budget_bytes = transform, budget_bytes
        self._layout = functools.lru_cache(
            lambda structure, shapes: layer_pages(transform, jax.tree.unflatten(structure, shapes), page_bytes)
        )
        self._memory = functools.lru_cache((Memory if donate_state else _BorrowedMemory).of)
        self._zeros = jax.jit(self._zero_updates)
        donated = ("updates", "page") if donate_state else ("updates",)
        self._program = jax.jit(self._update_page, static_argnames=("layout", "rows"), donate_argnames=donated)

    def init(self, params: PyTree) -> PyTree:
        _check_not_traced(params)
        layout, memory = self._layout_of(params), self._memory(_device(params))
        check_elementwise(self._transform, params, layout, memory)
        return paged_init(self._transform, params, layout, memory)

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: object
    ) -> tuple[PyTree, PyTree]:
        _check_not_traced((updates, state, params, extra_args))
        layout = self._layout_of(updates if params is None else params)
        expected = [
            [(rows, *layout.leaves[leaf].shape[1:]) for leaf, _, rows in layout.page_leaves(page)]
            for page in range(layout.count)
        ]
        if [[leaf.shape for leaf in page] for page in state.pages] != expected:
            raise ValueError(
                f"state: its pages do not fit these parameters (found {len(state.pages)} pages, expected "
                f"{layout.count} of at most {layout.largest_page:,} bytes). Pass a state from this transform's init, "
                "with the page_size that the state was made with, and pass params to update."
            )
        new_updates, structure = jax.tree.flatten(self._zeros(updates, params, extra_args))
        shared = state.shared

        def update_page(index: int, page: Page) -> Page:
            nonlocal new_updates, shared
            new_updates, page, shared = self._program(
                layout=layout,
                rows=layout.page_rows(index),
                index=np.int32(index),
                updates=new_updates,
                grads=jax.tree.leaves(updates),
                params=None if params is None else jax.tree.leaves(params),
                page=page,
                shared=state.shared,
                extra_args=extra_args,
            )
            return page

        pages, transfers = sweep(state, layout, self._memory(_device(updates)), self._budget_bytes, update_page)
        for problem in transfers.problems:
            warnings.warn(problem, RuntimeWarning, stacklevel=2)
        return jax.tree.unflatten(structure, new_updates), PagedState(pages, shared)

    def _layout_of(self, params: PyTree) -> Layout:
        leaves, structure = jax.tree.flatten(params)
        return self._layout(structure, tuple(jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves))

    def _zero_updates(self, grads: PyTree, params: PyTree | None, extra_args: Mapping[str, object]) -> PyTree:
        """Zeros in the shapes and dtypes of the updates: the pages' updates are written into them in place."""

        def whole() -> PyTree:
            state = self._transform.init(grads if params is None else params)
            return self._transform.update(grads, state, params, **extra_args)[0]

        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(whole))

    def _update_page(
        self,
        *,
        layout: Layout,
        rows: tuple[int, ...],
        index: ArrayLike,
        updates: list[jax.Array],
        grads: list[jax.Array],
        params: list[jax.Array] | None,
        page: Page,
        shared: tuple[jax.Array, ...],
        extra_args: Mapping[str, object],
    ) -> tuple[list[jax.Array], Page, tuple[jax.Array, ...]]:
        own_grads = slice_page(layout, rows, grads, index)
        own_params = None if params is None else slice_page(layout, rows, params, index)
        structure = page_structure(self._transform, layout, rows, grads if params is None else params)
        args = own_grads, page, shared, own_params
        own_updates, page, shared = update_page_state(self._transform, layout, rows, structure, args, **extra_args)
        return write_page(layout, rows, updates, own_updates, index), page, shared


def _bytes(name: str, size: int | str) -> int:
    try:
        found = parse_bytes(size) if isinstance(size, str) else int(size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if found < 0:
        raise ValueError(f"{name}: found {found}, expected 0 or more bytes")
    return found


def _check_not_traced(tree: PyTree) -> None:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
        raise TypeError(
            "qlora_jax.paged: init or update was called under jax.jit (or another JAX transformation), but pages can "
            "only be moved from the host. Jit the function that computes the gradients, and call init, update and "
            "nnx.Optimizer.update outside of jit."
        )


def _device(tree: PyTree) -> Device:
    leaves = (leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    devices = {device for leaf in leaves for device in leaf.devices()}
    if len(devices) > 1:
        raise ValueError(
            f"qlora_jax.paged: the parameters lie on several devices (found {len(devices)}, expected 1). Put them on "
            "one device, or use the transform without paging."
        )
    return next(iter(devices), jax.devices()[0])
