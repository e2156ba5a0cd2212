"""Where an optimizer's state is cut: a page has some layers of every stacked leaf, and the state that belongs to them.

Knows shapes alone. A tree's leaves are stacked along axis 0, most often layers; of P pages, page p has rows
[p k, p k + k) of each leaf, k = ceil(L / P), and the last page what is left.

Dimension key: L rows of a leaf (layers), P pages, k rows of a page.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import optax

PAGE_BYTES = 32 * 2**20  # of m and v: below 16 MiB the calls cost, above 64 MiB little is won

Structure = Any  # jax's PyTreeDef
Tree = Any  # parameters, gradients, or an optimizer's state
Leaves = list[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The pages of one optimizer's state over one tree of parameters.

    Attributes:
      params: structure of the parameters.
      lengths: L of each parameter leaf.
      rows: k of each parameter leaf.
      state: structure of the state of all parameters.
      leaves: of that state, shapes and dtypes.
      owners: of each state leaf, which parameter leaf's rows it has; None for what all pages share, such as a count.
    """

    params: Structure
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    state: Structure
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    owners: tuple[int | None, ...]

    @property
    def count(self) -> int:
        """P."""
        return max(_page_counts(self.lengths, self.rows))

    def page_rows(self, page: int) -> tuple[int, ...]:
        """Of each parameter leaf, the rows in a page; 0 where a shorter leaf has ended."""
        pairs = zip(self.lengths, self.rows, strict=True)
        return tuple(max(0, min(k, length - page * k)) for length, k in pairs)

    def page_leaves(self, page: int) -> list[tuple[int, int, int]]:
        """(index in `leaves`, first row, rows) of a page's state leaves, in the order that the page has them."""
        rows = self.page_rows(page)
        owned = [(index, owner) for index, owner in enumerate(self.owners) if owner is not None and rows[owner]]
        return [(index, page * self.rows[owner], rows[owner]) for index, owner in owned]

    def page_bytes(self, page: int) -> int:
        """Bytes of a page's state."""
        return sum(rows * _row_bytes(self.leaves[index]) for index, _, rows in self.page_leaves(page))

    @property
    def largest_page(self) -> int:
        """Bytes of the first page; no page has more."""
        return self.page_bytes(0)

    @property
    def total_bytes(self) -> int:
        """Bytes of all pages."""
        return sum(self.page_bytes(page) for page in range(self.count))

    def paged_tree(self, leaves: Sequence[Any], rows: tuple[int, ...]) -> Tree:
        """The parameters' tree with these leaves, None where a leaf has no rows in the page."""
        present = [leaf if k else None for leaf, k in zip(leaves, rows, strict=True)]
        return jax.tree.unflatten(self.params, present)


def layer_pages(transform: optax.GradientTransformation, params: Tree, page_bytes: int = PAGE_BYTES) -> Layout:
    """The fewest pages of at most `page_bytes` each, or pages of one layer where a layer is larger than that.

    In a tree of several leaves every page has two or more: with a single one XLA turns the division by Adam's bias
    correction into a product with its reciprocal, and the last bits differ from those of the whole tree's update.

    Args:
      params: arrays or ShapeDtypeStructs.

    Raises:
      ValueError: a parameter without an axis, or a state that does not follow the parameters' rows.
    """
    leaves, structure = jax.tree.flatten(params)
    if not leaves or any(leaf.ndim == 0 for leaf in leaves):
        raise ValueError("paging cuts parameters along their first axis; found a parameter without one, or none at all")
    lengths = tuple(leaf.shape[0] for leaf in leaves)
    state, abstract, owners = _owners(transform, leaves, structure)
    made = [
        Layout(params=structure, lengths=lengths, rows=rows, state=state, leaves=abstract, owners=owners)
        for rows in _even_rows(lengths)
    ]
    return next((layout for layout in made if layout.largest_page <= page_bytes), made[-1])


def _even_rows(lengths: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every way to cut all leaves into equally many pages, fewest pages first, two leaves or more in each page."""
    cuts = dict.fromkeys(tuple(-(-n // count) for n in lengths) for count in range(1, max(lengths) + 1))
    return [rows for rows in cuts if len(lengths) == 1 or _two_reach_the_end(_page_counts(lengths, rows))]


def _two_reach_the_end(counts: list[int]) -> bool:
    return counts.count(max(counts)) >= 2


def _page_counts(lengths: tuple[int, ...], rows: tuple[int, ...]) -> list[int]:
    return [-(-n // k) for n, k in zip(lengths, rows, strict=True)]


def _row_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape[1:]) * leaf.dtype.itemsize


def _owners(
    transform: optax.GradientTransformation, leaves: Leaves, structure: Structure
) -> tuple[Structure, tuple[jax.ShapeDtypeStruct, ...], tuple[int | None, ...]]:
    """(structure, leaves, owners) of a state: parameter j is made 1 + j rows longer, and what grows by as much is its.

    So it is seen what `init` does, whatever the optimizer names its fields.
    """

    def state_of(growth: Sequence[int]) -> tuple[Leaves, Structure]:
        grown = [
            jax.ShapeDtypeStruct((leaf.shape[0] + more, *leaf.shape[1:]), leaf.dtype)
            for leaf, more in zip(leaves, growth, strict=True)
        ]
        return jax.tree.flatten(jax.eval_shape(transform.init, jax.tree.unflatten(structure, grown)))

    found, state = state_of([0] * len(leaves))
    grown, grown_state = state_of(range(1, len(leaves) + 1))
    if state != grown_state:
        raise ValueError("this optimizer's state cannot be paged: its structure depends on the parameters' shapes")
    owners = tuple(_owner(a, b, leaves) for a, b in zip(found, grown, strict=True))
    return state, tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in found), owners


def _owner(leaf: Any, grown: Any, parameters: Leaves) -> int | None:
    if leaf.shape == grown.shape:
        return None
    owner = grown.shape[0] - leaf.shape[0] - 1
    same_rest = leaf.shape[1:] == grown.shape[1:]
    if not (same_rest and 0 <= owner < len(parameters) and leaf.shape[0] == parameters[owner].shape[0]):
        raise ValueError(
            f"this optimizer's state cannot be paged: a leaf of shape {leaf.shape} does not have the rows of a "
            "parameter; set optim.paging=off"
        )
    return owner
