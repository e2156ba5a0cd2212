"""The keys that each query sees, as intervals, and the blocks that kernels visit.

A query sees the keys [start, query], if there are ids only those of its segment, and in rows with branches also those
of its trunk [trunk, trunk_end). Blocks that no query of a block sees are not visited, and blocks that all of its
queries see whole are not masked. Where ids do not ascend, or the queries of one block belong to branches of different
trunks, a block that is between two visited ones is visited, too, and wholly masked.

Dimension key: B batch, T positions, I blocks of queries, J blocks of keys.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.attention.branching import Spans


class Block(NamedTuple):
    """The sizes of a tile."""

    queries: int
    keys: int


Kernels = Literal["mma", "wgmma"]


class Blocks(NamedTuple):
    """The tiles of the three kernels: of queries and their step of keys; in dk and dv the other way round.

    Attributes:
      backward: the kernels whose instructions dq, dk and dv have.
    """

    forward: Block
    dq: Block
    dkv: Block
    backward: Kernels

    @property
    def longest(self) -> int:
        """Returns the number of positions that all sizes divide."""
        return max(*self.forward, *self.dq, *self.dkv)


IN_REGISTERS = 128  # up to this head_dim, tiles of queries stay in registers


def mma_blocks(head_dim: int, *, capped: bool) -> Blocks:
    """Returns the tiles of `mma`; larger steps would spill."""
    wide = head_dim > IN_REGISTERS
    dkv = Block(16 if wide or (capped and head_dim == IN_REGISTERS) else 32, 64)
    return Blocks(Block(64, 16 if wide else 64), Block(64, 32), dkv, "mma")


def wgmma_blocks(head_dim: int, *, capped: bool) -> Blocks:
    """Returns the tiles of `wgmma`: forward has two warpgroups; backward is by `mma` where its sums would spill."""
    forward = Block(128, 64 if head_dim > IN_REGISTERS else 128)
    if head_dim > IN_REGISTERS or (capped and head_dim == IN_REGISTERS):
        return mma_blocks(head_dim, capped=capped)._replace(forward=forward)
    return Blocks(forward, Block(64, 64), Block(64, 64), "wgmma")


BLOCKS = {"mma": mma_blocks, "wgmma": wgmma_blocks}


class Visible(NamedTuple):
    """The keys that each query sees.

    Attributes:
      start_BT: first key of the interval that ends with the query.
      masked_start_BT: `start_BT`, which masks compare with keys; None: every start is 0.
      id_BT: segment, of which keys in this interval must be; None: any.
      trunk_BT, trunk_end_BT: the second interval, empty for texts without a trunk; None: no query has one.
    """

    start_BT: Int[Array, "B T"]
    masked_start_BT: Int[Array, "B T"] | None = None
    id_BT: Int[Array, "B T"] | None = None
    trunk_BT: Int[Array, "B T"] | None = None
    trunk_end_BT: Int[Array, "B T"] | None = None

    @classmethod
    def of(
        cls, batch: int, length: int, texts: Int[Array, "B T"] | Spans | None, window: int | Int[Array, ""] | None
    ) -> "Visible":
        """Returns the keys that queries of rows of `length` positions see; arguments as in `causal_attention`."""
        at_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        start_BT = jnp.zeros_like(at_BT) if window is None else jnp.maximum(at_BT - window + 1, 0)
        if not isinstance(texts, Spans):
            id_BT = None if texts is None else texts.astype(jnp.int32)
            return cls(start_BT, None if window is None else start_BT, id_BT)
        start_BT, trunk_BT = jnp.maximum(texts.begin_BT, start_BT), texts.trunk_BT
        if window is not None:
            trunk_BT = jnp.maximum(trunk_BT, at_BT - texts.gap_BT - window + 1)
        return cls(start_BT, start_BT, None, trunk_BT, texts.begin_BT - texts.gap_BT)

    def padded(self, length: int) -> "Visible":
        """Returns the intervals of rows of `length` positions; those at the end see what the last one does."""

        def longer(x_BT):
            return jnp.pad(x_BT, ((0, 0), (0, length - x_BT.shape[1])), mode="edge")

        return jax.tree.map(longer, self)


class _Seen(NamedTuple):
    """The union and the intersection of the intervals of each block of queries, in positions [B, I]."""

    first: jax.Array
    latest: jax.Array
    trunk_first: jax.Array
    trunk_end: jax.Array
    trunk_latest: jax.Array
    trunk_earliest_end: jax.Array

    @classmethod
    def of(cls, visible: Visible, queries: int) -> "_Seen":
        def blocks(x_BT):
            return x_BT.reshape(x_BT.shape[0], -1, queries)

        start = blocks(visible.start_BT)
        first, latest = jnp.min(start, axis=2), jnp.max(start, axis=2)
        if visible.id_BT is not None:
            latest = jnp.maximum(latest, jnp.max(blocks(_run_starts(visible.id_BT)), axis=2))
        if visible.trunk_BT is None:
            never = jnp.full_like(first, visible.start_BT.shape[1])
            return cls(first, latest, never, jnp.zeros_like(first), never, jnp.zeros_like(first))
        trunk, end = blocks(visible.trunk_BT), blocks(visible.trunk_end_BT)
        some = trunk < end
        return cls(
            first,
            latest,
            jnp.min(jnp.where(some, trunk, visible.start_BT.shape[1]), axis=2),
            jnp.max(jnp.where(some, end, 0), axis=2),
            jnp.max(trunk, axis=2),
            jnp.min(end, axis=2),
        )


def _run_starts(id_BT: jax.Array) -> jax.Array:
    """Returns the start of the run of equal ids that each position is in."""
    is_new_BT = jnp.pad(id_BT[:, 1:] != id_BT[:, :-1], ((0, 0), (1, 0)))
    return jax.lax.cummax(jnp.where(is_new_BT, jnp.arange(id_BT.shape[1], dtype=jnp.int32), 0), axis=1)


def whole_from(visible: Visible, queries: int) -> Int[Array, "B I 3"]:
    """Returns, for each block of queries, which keys all of them see: those from [0] on, and those in [[1], [2])."""
    seen = _Seen.of(visible, queries)
    return jnp.stack([seen.latest, seen.trunk_latest, seen.trunk_earliest_end], axis=2)


def key_visits(visible: Visible, block: Block) -> Int[Array, "B I 4"]:
    """Returns the blocks of keys that each block of queries visits, as `_two_ranges`: its own, and the trunk's."""
    seen = _Seen.of(visible, block.queries)
    first = seen.first // block.keys
    if visible.id_BT is not None:
        first = jnp.maximum(first, jnp.argmax(_ids_meet(visible.id_BT, block), axis=2).astype(jnp.int32))
    after = (jax.lax.broadcasted_iota(jnp.int32, first.shape, 1) + 1) * block.queries
    trunk = seen.trunk_first // block.keys, jnp.minimum(-(-seen.trunk_end // block.keys), first)
    return _two_ranges((first, -(-after // block.keys)), trunk)


def query_visits(visible: Visible, block: Block) -> Int[Array, "B J 4"]:
    """Returns the blocks of queries that each block of keys visits, as `_two_ranges`: of the same text, of branches."""
    seen = _Seen(*(x_BI[..., None] for x_BI in _Seen.of(visible, block.queries)))
    shape = (*seen.first.shape[:2], visible.start_BT.shape[1] // block.keys)
    i_BIJ, j_BIJ = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 2))
    starts_BIJ, ends_BIJ = j_BIJ * block.keys, (j_BIJ + 1) * block.keys
    sees_BIJ = seen.first < ends_BIJ
    if visible.id_BT is not None:
        sees_BIJ &= _ids_meet(visible.id_BT, block)
    own_end_BJ = jnp.max(jnp.where(sees_BIJ, i_BIJ + 1, 0), axis=1)
    of_trunk_BIJ = (seen.trunk_first < ends_BIJ) & (seen.trunk_end > starts_BIJ) & (i_BIJ >= own_end_BJ[:, None])
    from_trunk_BJ = jnp.min(jnp.where(of_trunk_BIJ, i_BIJ, shape[1]), axis=1)
    to_trunk_BJ = jnp.max(jnp.where(of_trunk_BIJ, i_BIJ + 1, 0), axis=1)
    return _two_ranges((starts_BIJ[:, 0] // block.queries, own_end_BJ), (from_trunk_BJ, to_trunk_BJ))


def _ids_meet(id_BT: jax.Array, block: Block) -> jax.Array:
    """Returns True where the range of ids of a block of queries meets that of a block of keys, [B, I, J]."""

    def ranges(size):
        blocks = id_BT.reshape(id_BT.shape[0], -1, size)
        return jnp.min(blocks, axis=2), jnp.max(blocks, axis=2)

    (low_BI, high_BI), (low_BJ, high_BJ) = ranges(block.queries), ranges(block.keys)
    return (low_BI[..., None] <= high_BJ[:, None]) & (low_BJ[:, None] <= high_BI[..., None])


def _two_ranges(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Returns [..., 4]: the visits of both ranges (first, end), of the first, and shifts from a visit to its block."""
    count = jnp.maximum(one[1] - one[0], 0)
    more = jnp.maximum(other[1] - other[0], 0)
    return jnp.stack([count + more, count, one[0], other[0] - count], axis=-1).astype(jnp.int32)


class Bounds(NamedTuple):
    """Visible keys and visits of rows of whole blocks, for Mosaic's kernels; layers of equal windows share them.

    Attributes:
      visible: the keys that each query sees.
      forward, forward_whole: `key_visits` of this kernel, and `whole_from` of its tiles.
      dq, dq_whole: the same of dq.
      dkv, dkv_whole: `query_visits` of dk and dv, and `whole_from` of their steps.
    """

    visible: Visible
    forward: Int[Array, "B I 4"]
    forward_whole: Int[Array, "B I 3"]
    dq: Int[Array, "B P 4"]
    dq_whole: Int[Array, "B P 3"]
    dkv: Int[Array, "B J 4"]
    dkv_whole: Int[Array, "B Q 3"]

    @classmethod
    def of(cls, visible: Visible, blocks: Blocks) -> "Bounds":
        """Returns the bounds of queries that see these keys."""
        return cls(
            visible,
            key_visits(visible, blocks.forward),
            whole_from(visible, blocks.forward.queries),
            key_visits(visible, blocks.dq),
            whole_from(visible, blocks.dq.queries),
            query_visits(visible, blocks.dkv),
            whole_from(visible, blocks.dkv.queries),
        )
