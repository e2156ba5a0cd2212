"""Attention of one new token per row over a key-value cache in pages, split over keys (flash-decoding, Dao et al.).

A split is 512 positions from a multiple of 512 on, of one row and key head. `_splits` computes its sums, largest score
and total; `_merge` adds those of a row in their order. So the result of a row depends on that row alone, to the bit,
and no sum is atomic. A program has the query heads of one key head, up to 16 of them (8 at a head_dim of 256), and
reads their keys and values once. It computes every PROGRAMS-th split, so that a cache for long rows launches few
programs when rows are short. Splits that no query sees are neither computed nor read.

Per step of two pages: start loading values; scores; start loading the next keys; softmax; weights times values. At
wide heads, the next keys are loaded last. Pages are looked up two steps ahead, so no load waits for another.

Values that a query does not see are replaced by zeros: they may be another row's, and infinite or NaN.
Weights are up to 2^HEADROOM: times the scale of a code they would otherwise vanish in float16.

Dimension key: R rows, N q-heads, K kv-heads, G = N / K, Z tiles of query heads, H head_dim, P pages, S = 32 positions
of a page, L layers, I pages of a row, C splits, E heads of a tile; _g device memory, _s shared memory.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.bounds import IN_REGISTERS
from pallas_kernels.attention.mosaic.decode_instructions import Instructions
from pallas_kernels.attention.mosaic.decode_registers import COLUMNS, EIGHT, ROWS, WARPS, Tile
from pallas_kernels.attention.mosaic.forward import HIDDEN, LOWEST
from pallas_kernels.attention.mosaic.instructions import rem_div
from pallas_kernels.attention.pages import PAGE, KVPages
from pallas_kernels.attention.tiles import ScoreScaling
from pallas_kernels.mosaic.registers import MosaicValue

STEP = 2 * PAGE
SPLIT = 512  # positions
PROGRAMS = 32  # for the splits of one row and key head: 16,384 positions at once
TOGETHER = 4  # splits that `_merge` loads at once
HEADROOM = 6
SMALLEST = 1e-30  # total of a row that sees nothing, whose sums are 0


class Seen(NamedTuple):
    """The positions that queries see: those up to their own in one row of a layer, within the window."""

    layer_1: Int[Array, " 1"]
    rows_R: Int[Array, " R"]
    positions_R: Int[Array, " R"]
    window_1: Int[Array, " 1"] | None

    def interval(self, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns, inside a kernel, the first and the last position that a query sees."""
        last = self.positions_R[row]
        first = jnp.int32(0) if self.window_1 is None else jnp.maximum(last - self.window_1[0] + 1, 0)
        return first, last

    def splits(self, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns, inside a kernel, the first split of a query, and how many it has; none if its position is -1."""
        first, last = self.interval(row)
        start = _divided(first, SPLIT)
        return start, lax.select(last < 0, jnp.int32(0), _divided(jnp.maximum(last, 0), SPLIT) + 1 - start)


def _divided(x: jax.Array, n: int) -> jax.Array:
    return lax.div(x, jnp.int32(n))


def tile_of(group: int, head_dim: int, dtype: DTypeLike, cache_dtype: DTypeLike) -> Tile:
    """Returns the query heads that a program computes, of so many that share a key head."""
    heads = EIGHT if group <= EIGHT or head_dim > IN_REGISTERS else 2 * EIGHT
    return Tile(head_dim, heads, jnp.dtype(dtype), jnp.dtype(cache_dtype))


def decode(
    q_RNH: Float[Array, "R N H"],
    pages: KVPages,
    layer: Int[Array, ""] | int,
    rows_R: Int[Array, " R"],
    positions_R: Int[Array, " R"],
    window: int | Int[Array, ""] | None,
    scores: ScoreScaling,
    sinks_N: Float[Array, " N"] | None,
    instructions: Callable[[Tile], Instructions],
) -> Float[Array, "R N H"]:
    """Returns softmax(scores, over visible positions) v of a layer in q's dtype; zeros for queries at position -1.

    Args:
      rows_R: the row of the pages' table that each query belongs to.
    """
    (rows, heads, width), kv_heads = q_RNH.shape, pages.k.shape[1]
    group = heads // kv_heads
    do = instructions(tile_of(group, width, q_RNH.dtype, pages.k.dtype))
    of_tile = do.tile.heads
    tiles = -(-group // of_tile)

    def tiled(x, head_axis):
        """Splits heads into tiles: [..., K group, ...] -> [..., K tiles, of_tile, ...]."""
        before, after = x.shape[:head_axis], x.shape[head_axis + 1 :]
        x = x.reshape(*before, kv_heads, group, *after)
        more = [(0, tiles * of_tile - group if at == head_axis + 1 else 0) for at in range(x.ndim)]
        return jnp.pad(x, more).reshape(*before, kv_heads * tiles, of_tile, *after)

    seen = Seen(_one(layer), _whole(rows_R), _whole(positions_R), None if window is None else _one(window))
    sinks_ZE = None if sinks_N is None else tiled(sinks_N.astype(jnp.float32) * math.log2(math.e), 0)
    sums_RZCHE, tops_RZC2E = _splits(tiled(q_RNH, 1), pages, seen, scores, do)
    out_RZHE = _merge(sums_RZCHE, tops_RZC2E, seen, sinks_ZE, do)
    out_RKEH = jnp.swapaxes(out_RZHE, 2, 3).reshape(rows, kv_heads, tiles * of_tile, width)
    return out_RKEH[:, :, :group].reshape(q_RNH.shape)


def _one(number: jax.Array | int) -> Int[Array, " 1"]:
    return jnp.asarray(number, jnp.int32).reshape(1)


def _whole(numbers_R: jax.Array) -> Int[Array, " R"]:
    return numbers_R.astype(jnp.int32)


def _splits(q_RZEH: jax.Array, pages: KVPages, seen: Seen, scores: ScoreScaling, do: Instructions):
    """Returns the sums [R, Z, C, H, E] of splits and [R, Z, C, 2, E]: log2 of their factor, and their total."""
    rows, tiles, heads, width = q_RZEH.shape
    kv_heads, splits = pages.k.shape[1], -(-pages.pages_LRI.shape[2] * PAGE // SPLIT)

    def kernel(q_g, pages_g, seen_g, sums_g, tops_g, sums_s, rows_s):
        program, z, row = (lax.axis_index(name) for name in ("program", "tile", "row"))
        kv, (first, last) = _divided(z, tiles // kv_heads), seen_g.interval(row)
        of_query = _Pages(do, pages_g, seen_g.layer_1[0], seen_g.rows_R[row], kv, first, last)
        q = do.queries(q_g.at[row, z])
        start, count = seen_g.splits(row)

        @pl.loop(0, _divided(count - program + PROGRAMS - 1, PROGRAMS))
        def _(n):
            split = start + program + n * PROGRAMS
            sums, top, total = _sums_of_split(do, q, of_query, split, scores)
            do.show(sums, (top - HEADROOM, total), sums_s, rows_s)
            do.sync()
            part = _Part.none(do)
            for warp in range(WARPS):
                numbers = [rows_s.at[at, pl.ds(warp * ROWS // WARPS, heads)] for at in range(2)]
                part = part.plus(_Part.load(do, sums_s.at[pl.ds(warp * width, width)], *numbers))
            do.store_part(part.sums, sums_g.at[row, z, split])
            do.store_per_head(part.top, tops_g.at[row, z, split, 0])
            do.store_per_head(part.total, tops_g.at[row, z, split, 1])
            do.sync()

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((rows, tiles, splits, width, heads), jnp.float32),
            jax.ShapeDtypeStruct((rows, tiles, splits, 2, heads), jnp.float32),
        ),
        grid=(min(PROGRAMS, splits), tiles, rows),
        grid_names=("program", "tile", "row"),
        scratch_types=[
            plgpu.SMEM((WARPS * width, heads), jnp.float32),
            plgpu.SMEM((2, ROWS), jnp.float32),
        ],
        kernel_name="attention_decode",
        **do.options,
    )(q_RZEH, pages, seen)


class _Pages(NamedTuple):
    """Inside a kernel: the pages of a row's key head in one layer, from its first position to its last."""

    do: Instructions
    pages_g: KVPages
    layer: jax.Array
    row: jax.Array
    kv: jax.Array
    first: jax.Array
    last: jax.Array

    def numbers(self, step: jax.Array) -> list[jax.Array]:
        """Looks up the two pages of a step; those that the row does not see are replaced by one that it sees."""
        low, high = _divided(self.first, PAGE), _divided(self.last, PAGE)
        blocks = [jnp.clip(2 * step + at, low, high) for at in range(2)]
        return [self.pages_g.pages_LRI[self.layer, self.row, block] for block in blocks]

    def keys(self, numbers: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        """Loads (keys, their scales) of two pages."""
        return self._load(self.do.keys, self.pages_g.k, self.pages_g.k_scale, numbers)

    def values(self, numbers: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        """Loads (values, their scales) of two pages."""
        return self._load(self.do.values, self.pages_g.v, self.pages_g.v_scale, numbers)

    def _load(self, load, of_pages, of_scales, numbers):
        scales = [] if of_scales is None else [self.do.scales(of_scales.at[page, self.kv]) for page in numbers]
        return [load(of_pages.at[page, self.kv]) for page in numbers], scales


def _sums_of_split(do: Instructions, q: jax.Array, pages: _Pages, split: jax.Array, scores: ScoreScaling):
    """Returns (sums [4 H, heads], largest score [64], total weight [64]) of a split, for each warp's positions."""
    per_split = SPLIT // STEP
    low = jnp.maximum(_divided(pages.first, STEP), split * per_split)
    high = jnp.minimum(_divided(pages.last, STEP), split * per_split + per_split - 1)

    def later(step):
        return jnp.minimum(step, high)

    def ahead_of(at, then):
        return pages.keys(then), then, pages.numbers(later(at + 2))

    def step(at, carry):
        sums, top, total, (k, k_scales), here, then = carry
        v, v_scales = pages.values(here)
        s = do.scores(q, k)
        s = do.scaled(s, k_scales) if k_scales else s
        ahead = ahead_of(at, then) if do.tile.head_dim <= IN_REGISTERS else ()
        seen = _is_seen(do, at, pages)
        s = jnp.where(seen, scores.capped_by_exp2(s), HIDDEN)
        new = jnp.maximum(top, jnp.max(s, axis=1) * scores.to_log2)
        fade = jnp.exp2(top - new)
        weights = jnp.exp2(s * scores.to_log2 - lax.broadcast_in_dim(new - HEADROOM, s.shape, (0,)))
        total = total * fade + jnp.sum(weights, axis=1)
        weights = jnp.where(seen, do.scaled(weights, v_scales), 0.0) if v_scales else weights
        sums = do.add(sums, fade, weights, v, jnp.where(seen, -1, 0))
        return sums, new, total, *(ahead or ahead_of(at, then))

    here, then = pages.numbers(low), pages.numbers(later(low + 1))
    start = do.zeros(), do.full_rows(LOWEST), do.full_rows(0.0), pages.keys(here), here, then
    return lax.fori_loop(low, high + 1, step, start)[:3]


def _is_seen(do: Instructions, step: jax.Array, pages: _Pages) -> jax.Array:
    """Returns True where a score [64, 16] of a step is of a position that the row sees."""
    (_, warp), (at, page) = rem_div(do.indices(0), ROWS // WARPS), rem_div(do.indices(1), COLUMNS // 2)
    position = step * STEP + page * PAGE + warp * EIGHT + at
    return (position >= pages.first) & (position <= pages.last)


class _Part(NamedTuple):
    """Inside a kernel: sums [H, E] of weights times values, and by head the log2 of their factor and the total."""

    do: Instructions
    sums: jax.Array
    top: jax.Array
    total: jax.Array

    @classmethod
    def none(cls, do: Instructions) -> "_Part":
        """Returns the part of no positions."""
        sums, zeros = do.full_part()
        return cls(do, sums, zeros + LOWEST, zeros)

    @classmethod
    def load(cls, do: Instructions, sums: MosaicValue, top: MosaicValue, total: MosaicValue) -> "_Part":
        """Loads a part from memory."""
        return cls(do, do.part(sums), do.per_head(top), do.per_head(total))

    def plus(self, other: "_Part") -> "_Part":
        """Returns the part of the positions of both."""
        top = jnp.maximum(self.top, other.top)
        factor, its_factor = jnp.exp2(self.top - top), jnp.exp2(other.top - top)
        sums = self.sums * self._spread(factor) + other.sums * self._spread(its_factor)
        return _Part(self.do, sums, top, self.total * factor + other.total * its_factor)

    def mean(self) -> jax.Array:
        """Returns the sums over the total; 0 without positions."""
        return self.sums * self._spread(1 / jnp.maximum(self.total, SMALLEST))

    def _spread(self, numbers: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(numbers, self.sums.shape, (1,))


def _merge(sums_RZCHE: jax.Array, tops_RZC2E: jax.Array, seen: Seen, sinks_ZE: jax.Array | None, do: Instructions):
    """Returns the result [R, Z, H, E] of all splits that each row sees, added in their order."""
    rows, tiles, _, width, heads = sums_RZCHE.shape

    def kernel(sums_g, tops_g, seen_g, sinks_g, out_g):
        z, row = (lax.axis_index(name) for name in ("tile", "row"))
        start, count = seen_g.splits(row)

        def step(n, carry):
            part, parts = _Part(do, *carry), []
            for at in range(TOGETHER):
                split = n * TOGETHER + at
                of_split = start + jnp.minimum(split, count - 1)
                numbers = [tops_g.at[row, z, of_split, which] for which in range(2)]
                more = _Part.load(do, sums_g.at[row, z, of_split], *numbers)
                hidden = lax.select(split < count, jnp.float32(0), jnp.float32(LOWEST))
                parts.append(more._replace(top=more.top + hidden))
            return functools.reduce(_Part.plus, parts, part)[1:]

        part = _Part.none(do)
        if sinks_g is not None:  # a sink is a position that has a score and no value
            part = part._replace(top=do.per_head(sinks_g.at[z]), total=part.total + 1)
        sums = lax.fori_loop(0, _divided(count + TOGETHER - 1, TOGETHER), step, part[1:])
        do.store_part(_Part(do, *sums).mean().astype(out_g.dtype), out_g.at[row, z])

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, tiles, width, heads), do.tile.dtype),
        grid=(tiles, rows),
        grid_names=("tile", "row"),
        kernel_name="attention_decode_merge",
        **do.options,
    )(sums_RZCHE, tops_RZC2E, seen, sinks_ZE)
