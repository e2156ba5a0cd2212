"""The cut of an optimizer's state into pages: a page has some layers of every stacked leaf, and their state.

Works on shapes alone. Leaves are stacked along axis 0, usually by layer. Of P pages, page p has rows [p k, p k + k) of
each leaf, with k = ceil(L / P); the last page has the remaining rows. Shapes are those of whole arrays; on a mesh each
device has its part of every page, and bytes are those of one device.

Dimension key: L rows of a leaf (layers), P pages, k rows of a page.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from qlora_jax.sharding import FSDP, axis_size, cut_axis

PAGE_BYTES = 32 * 2**20  # smaller than 16 MiB, calls dominate; larger than 64 MiB, little is gained
PAGES_PER_BUDGET = 4  # at least, if layers are small enough: one in update, one prefetched, one evicted, one waiting

PyTreeDef = Any  # jax.tree_util.PyTreeDef, which JAX does not export as a type
ShapedArray = jax.Array | np.ndarray | jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The pages of one optimizer's state over one tree of parameters.

    Attributes:
      params: the structure of the parameters.
      lengths: L of each parameter leaf.
      rows: k of each parameter leaf.
      state: the structure of the whole state.
      leaves: the shapes and dtypes of the whole state's leaves.
      owners: for each state leaf, the parameter leaf whose rows it has; None for a leaf that all pages share, such as
        a count.
      specs: how each parameter leaf is cut over `mesh`, along another axis than the first; not at all without one.
    """

    params: PyTreeDef
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    state: PyTreeDef
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    owners: tuple[int | None, ...]
    specs: tuple[P, ...]
    mesh: Mesh | None

    @property
    def count(self) -> int:
        """The number of pages, P."""
        return max(_page_counts(self.lengths, self.rows))

    def page_rows(self, page: int) -> tuple[int, ...]:
        """Returns the number of rows that a page has of each parameter leaf; 0 if a shorter leaf has ended."""
        pairs = zip(self.lengths, self.rows, strict=True)
        return tuple(max(0, min(k, length - page * k)) for length, k in pairs)

    def page_leaves(self, page: int) -> list[tuple[int, int, int]]:
        """Returns (index in `leaves`, first row, rows) of each of a page's arrays, in order."""
        rows = self.page_rows(page)
        owned = [(index, owner) for index, owner in enumerate(self.owners) if owner is not None and rows[owner]]
        return [(index, page * self.rows[owner], rows[owner]) for index, owner in owned]

    def page_bytes(self, page: int) -> int:
        """Returns the bytes of a page."""
        return sum(rows * self._row_bytes(index) for index, _, rows in self.page_leaves(page))

    def _row_bytes(self, index: int) -> int:
        leaf, is_cut = self.leaves[index], cut_axis(self.spec(index)) is not None
        return math.prod(leaf.shape[1:]) * leaf.dtype.itemsize // (axis_size(self.mesh, FSDP) if is_cut else 1)

    def spec(self, index: int) -> P:
        """Returns how a state leaf, or a page's rows of it, are cut."""
        return self.owner_spec(self.owners[index])

    def owner_spec(self, owner: int | None) -> P:
        """Returns the cut of a parameter's state, which is the parameter's. State that all pages share is not cut."""
        return P() if owner is None else self.specs[owner]

    @property
    def largest_page(self) -> int:
        """The bytes of the first page; no page has more."""
        return self.page_bytes(0)

    @property
    def total_bytes(self) -> int:
        """The bytes of all pages."""
        return sum(self.page_bytes(page) for page in range(self.count))

    def paged_tree(self, leaves: Sequence[jax.Array | jax.ShapeDtypeStruct | None], rows: tuple[int, ...]) -> PyTree:
        """Builds the parameters' tree from a page's leaves, with None for a leaf without rows in the page."""
        present = [leaf if k else None for leaf, k in zip(leaves, rows, strict=True)]
        return jax.tree.unflatten(self.params, present)


def layer_pages(
    transform: optax.GradientTransformation,
    params: PyTree,
    page_bytes: int = PAGE_BYTES,
    *,
    specs: PyTree | None = None,
    mesh: Mesh | None = None,
) -> Layout:
    """Cuts the state into the fewest pages of at most `page_bytes`, or into pages of one layer if layers are larger.

    In a tree of several leaves, every page has two or more. With a single leaf, XLA turns the division by Adam's bias
    correction into a product with its reciprocal, whose last bits differ from those of the whole tree's update.

    Args:
      params: arrays or ShapeDtypeStructs.
      specs: on a mesh, the PartitionSpecs of the parameters.
      mesh: the mesh; None: one device.

    Raises:
      ValueError: a parameter is a scalar, or the state does not have the parameters' rows.
    """
    leaves, structure = jax.tree.flatten(params)
    if not leaves or any(leaf.ndim == 0 for leaf in leaves):
        raise ValueError(
            "optim.paging: pages are cut along the first axis of parameters (found a scalar or no parameters). Use the "
            "optimizer without paging (optim.paging=off in a run)."
        )
    lengths = tuple(leaf.shape[0] for leaf in leaves)
    state, abstract, owners = state_owners(transform, params)
    cuts = [P()] * len(leaves) if specs is None else jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, P))
    layout = Layout(
        params=structure,
        lengths=lengths,
        rows=lengths,
        state=state,
        leaves=abstract,
        owners=owners,
        specs=tuple(cuts),
        mesh=mesh,
    )
    made = [dataclasses.replace(layout, rows=rows) for rows in _even_rows(lengths)]
    return next((layout for layout in made if layout.largest_page <= page_bytes), made[-1])


def _even_rows(lengths: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every cut of all leaves into equally many pages with two or more leaves each, fewest pages first."""
    cuts = dict.fromkeys(tuple(-(-n // count) for n in lengths) for count in range(1, max(lengths) + 1))
    return [rows for rows in cuts if len(lengths) == 1 or _two_reach_the_end(_page_counts(lengths, rows))]


def _two_reach_the_end(counts: list[int]) -> bool:
    return counts.count(max(counts)) >= 2


def _page_counts(lengths: tuple[int, ...], rows: tuple[int, ...]) -> list[int]:
    return [-(-n // k) for n, k in zip(lengths, rows, strict=True)]


def state_owners(
    transform: optax.GradientTransformation, params: PyTree
) -> tuple[PyTreeDef, tuple[jax.ShapeDtypeStruct, ...], tuple[int | None, ...]]:
    """Returns (structure, leaves, owners) of a state; an owner is the index of the parameter whose rows a leaf has.

    When parameter j grows by 1 + j rows, the leaves that it owns do too. This works whatever the optimizer names its
    fields.

    Args:
      params: arrays, tracers or ShapeDtypeStructs.

    Raises:
      ValueError: the state does not have the parameters' rows.
    """
    leaves, structure = jax.tree.flatten(params)

    def state_of(growth: Sequence[int]) -> tuple[list[jax.ShapeDtypeStruct], PyTreeDef]:
        grown = [
            jax.ShapeDtypeStruct((leaf.shape[0] + more, *leaf.shape[1:]), leaf.dtype)
            for leaf, more in zip(leaves, growth, strict=True)
        ]
        return jax.tree.flatten(jax.eval_shape(transform.init, jax.tree.unflatten(structure, grown)))

    found, state = state_of([0] * len(leaves))
    grown, grown_state = state_of(range(1, len(leaves) + 1))
    if state != grown_state:
        raise ValueError(
            "optim.paging: this optimizer cannot be paged, because its state's structure depends on parameter shapes. "
            "Use it without paging (optim.paging=off in a run)."
        )
    owners = tuple(_owner(a, b, leaves) for a, b in zip(found, grown, strict=True))
    return state, tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in found), owners


def _owner(leaf: jax.ShapeDtypeStruct, grown: jax.ShapeDtypeStruct, parameters: list[ShapedArray]) -> int | None:
    if leaf.shape == grown.shape:
        return None
    owner = grown.shape[0] - leaf.shape[0] - 1
    same_rest = leaf.shape[1:] == grown.shape[1:]
    if not (same_rest and 0 <= owner < len(parameters) and leaf.shape[0] == parameters[owner].shape[0]):
        raise ValueError(
            "optim.paging: this optimizer cannot be paged, because a state leaf does not have the rows of a parameter "
            f"(found shape {leaf.shape}). Use it without paging (optim.paging=off in a run)."
        )
    return owner
