"""Rows with branches, such as two answers to one prompt: the positions that each query sees, and their mask by tiles.

A row is a sequence of trunks and branches. A branch continues a trunk that lies earlier in the row, after a number of
its positions. It sees these and itself, so its hidden states are those of the same text in a row that has it alone.

Dimension key: B batch, T positions, S padded positions, C positions of a chunk, I chunks of queries and of keys.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.attention.tile_mask import KeyTile, Tiling, hide


class Branching(NamedTuple):
    """The trunk of each position's segment, for rows whose segments have ascending ids.

    Attributes:
      parents_BT: id of the segment that this segment continues; its own id if it continues none.
      depths_BT: number of the parent's positions that the segment sees; 0 without a parent.
    """

    parents_BT: Int[Array, "B T"]
    depths_BT: Int[Array, "B T"]

    def spans(self, segments_BT: Int[Array, "B T"]) -> "Spans":
        """Returns the positions of the row that each query sees."""
        first = jax.vmap(lambda ids, wanted: jnp.searchsorted(ids, wanted).astype(jnp.int32))
        begin_BT, trunk_BT = first(segments_BT, segments_BT), first(segments_BT, self.parents_BT)
        gap_BT = begin_BT - trunk_BT - self.depths_BT.astype(jnp.int32)
        # A branch that directly follows what it continues is one text with it.
        return Spans(jnp.where(gap_BT == 0, trunk_BT, begin_BT), trunk_BT, gap_BT)


class Spans(NamedTuple):
    """The two spans of a row that each query sees: [begin, query] and [trunk, begin - gap).

    The second is empty for a text without a trunk. In the text, a key of the trunk is `gap` positions closer to the
    query than in the row. So a query sees keys of the first span with query - key < window, and keys of the second
    with query - key - gap < window.
    """

    begin_BT: Int[Array, "B T"]
    trunk_BT: Int[Array, "B T"]
    gap_BT: Int[Array, "B T"]

    def padded(self, length: int) -> "Spans":
        """Returns the spans of rows of `length` positions; those at the end belong to the last text."""
        more = length - self.begin_BT.shape[1]
        return Spans(*(jnp.pad(x_BT, ((0, 0), (0, more)), mode="edge") for x_BT in self))


@dataclasses.dataclass(frozen=True)
class BranchingMask:
    """The mask of rows with branches; chunks of keys that no query of a chunk sees are skipped.

    Attributes:
      spans: of whole rows, padded to whole chunks.
      visited_II: for each chunk of queries, the chunks of keys before its own that it sees, and then the others.
      counts_I: the number of chunks of keys that each chunk of queries sees before its own.
    """

    tiling: Tiling
    window: int | Int[Array, ""] | None
    spans: Spans
    visited_II: Int[Array, "I I"]
    counts_I: Int[Array, " I"]

    @classmethod
    def of(cls, tiling: Tiling, window: int | Int[Array, ""] | None, spans: Spans) -> "BranchingMask":
        """Creates the mask of whole rows for a tiling."""
        if isinstance(window, int) and window >= tiling.length:
            window = None
        spans = spans.padded(tiling.chunks * tiling.chunk)
        seen_II = jnp.tril(_seen_chunks(tiling, window, spans), -1)
        visited_II = jnp.argsort(~seen_II, axis=1, stable=True).astype(jnp.int32)
        return cls(tiling, window, spans, visited_II, jnp.sum(seen_II, axis=1, dtype=jnp.int32))

    def fold_tiles[Carry](self, tile: Callable[[KeyTile, Carry], Carry], carry: Carry, i: jax.Array | int) -> Carry:
        """Folds carry = tile(keys, carry) over all keys that queries of chunk i may see; their own chunk comes last."""
        chunk = self.tiling.chunk
        if isinstance(i, int):
            return tile(KeyTile(0, (i + 1) * chunk, True), carry)
        visited_I = jax.lax.dynamic_index_in_dim(self.visited_II, i, keepdims=False)
        count = jax.lax.dynamic_index_in_dim(self.counts_I, i, keepdims=False)

        def visit(n, carry):
            return tile(KeyTile(jax.lax.dynamic_index_in_dim(visited_I, n, keepdims=False), chunk, True), carry)

        return tile(KeyTile(i, chunk, True), jax.lax.fori_loop(0, count, visit, carry))

    def mask(self, scores_ZMC: jax.Array, i: jax.Array | int, keys: KeyTile, hidden: float) -> jax.Array:
        """Returns the scores of the queries of chunk i, with `hidden` in place of masked ones."""
        chunk = self.tiling.chunk
        queries_1C1 = i * chunk + jnp.arange(chunk, dtype=jnp.int32)[None, :, None]
        keys_11S = keys.j * self.tiling.key_tiling.chunk + jnp.arange(keys.count, dtype=jnp.int32)[None, None]
        of_chunk = Spans(*(jax.lax.dynamic_slice_in_dim(x_BS, i * chunk, chunk, axis=1) for x_BS in self.spans))
        return hide(scores_ZMC, _visible(queries_1C1, keys_11S, of_chunk, self.window), hidden)


def _visible(queries_1C1, keys_11S, spans: Spans, window) -> Bool[Array, "B C S"]:
    begin_BC1, trunk_BC1, gap_BC1 = spans.begin_BT[..., None], spans.trunk_BT[..., None], spans.gap_BT[..., None]
    own = (keys_11S >= begin_BC1) & (keys_11S <= queries_1C1)
    of_trunk = (keys_11S >= trunk_BC1) & (keys_11S < begin_BC1 - gap_BC1)
    if window is not None:
        own &= keys_11S > queries_1C1 - window
        of_trunk &= keys_11S > queries_1C1 - gap_BC1 - window
    return own | of_trunk


def _seen_chunks(tiling: Tiling, window, spans: Spans) -> Bool[Array, "I I"]:
    """Returns True where a query of chunk i sees a key of chunk j, in any row."""
    chunk, chunks = tiling.chunk, tiling.chunks
    queries_1S = jnp.arange(chunks * chunk, dtype=jnp.int32)[None]
    begin_BS, trunk_BS, trunk_end_BS = spans.begin_BT, spans.trunk_BT, spans.begin_BT - spans.gap_BT
    if window is not None:
        begin_BS = jnp.maximum(begin_BS, queries_1S - window + 1)
        trunk_BS = jnp.maximum(trunk_BS, queries_1S - spans.gap_BT - window + 1)
    starts_11I = chunk * jnp.arange(chunks, dtype=jnp.int32)[None, None]

    def meets(first_BS, end_BS):
        first_BS1, end_BS1 = first_BS[..., None], end_BS[..., None]
        return (first_BS1 < end_BS1) & (first_BS1 < starts_11I + chunk) & (end_BS1 > starts_11I)

    seen_BSI = meets(begin_BS, queries_1S + 1) | meets(trunk_BS, trunk_end_BS)
    return jnp.any(seen_BSI.reshape(-1, chunks, chunk, chunks), axis=(0, 2))
