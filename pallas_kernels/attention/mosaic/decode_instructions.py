"""Loads, products and stores of the decoding kernel, for NVIDIA cards and for the interpreted twin.

Warps share nothing until their sums meet in shared memory: `decode_registers` says which thread has what. Scores are
[64, 16]: row 16 w + head, column 8 page + position of warp w. Sums are [4 H, heads]: row H w + feature.

Dimension key: H head_dim; _g device memory, _s shared memory.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import TiledLayout
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.mosaic.decode_registers import (
    COLUMNS,
    EIGHT,
    OF_POSITIONS,
    OF_SCORES,
    ROWS,
    WARPS,
    Layouts,
    Tile,
    machine,
    scaled_scores,
    scores_of,
    sums_of,
)
from pallas_kernels.mosaic.registers import MosaicValue, fragmented, tiled

_SCORES = tiled(OF_SCORES)


class Machine:
    """The kernel's instructions on a card."""

    def __init__(self, tile: Tile) -> None:
        self.tile = tile
        params = plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True, reduction_scratch_bytes=0)
        self.options: dict[str, MosaicValue] = {"compiler_params": params}
        self.of = Layouts.of(tile)

    def _load(self, source_g, layout: TiledLayout) -> jax.Array:
        return plgpu.load(source_g, layout=tiled(layout), optimized=False)

    def queries(self, source_g: MosaicValue) -> jax.Array:
        """Loads queries [heads, H]; every warp has all."""
        return self._load(source_g, self.of.queries)

    def keys(self, source_g: MosaicValue) -> jax.Array:
        """Loads a page of keys [32, H]."""
        return self._load(source_g, self.of.keys)

    def values(self, source_g: MosaicValue) -> jax.Array:
        """Loads a page of values [32, H]."""
        return self._load(source_g, self.of.values)

    def scales(self, source_g: MosaicValue) -> jax.Array:
        """Loads a page of scales [32]."""
        return self._load(source_g, OF_POSITIONS)

    def indices(self, axis: int) -> jax.Array:
        """Returns the index of each score along an axis."""
        return plgpu.broadcasted_iota(jnp.int32, (ROWS, COLUMNS), axis, layout=_SCORES)

    def full_rows(self, number: float) -> jax.Array:
        """Returns [64], one number for each row of scores."""
        return plgpu.layout_cast(jnp.full((ROWS,), number, jnp.float32), _SCORES.reduce(1))

    def zeros(self) -> jax.Array:
        """Returns sums [4 H, heads] of zeros."""
        return plgpu.layout_cast(jnp.zeros((WARPS * self.tile.head_dim, self.tile.heads)), tiled(self.of.sums))

    def scores(self, q: jax.Array, pages: Sequence[jax.Array]) -> jax.Array:
        """Returns q k^T [64, 16] for two pages of keys."""
        types = (tiled(self.of.queries), [tiled(self.of.keys)] * 2)
        result = plgpu.ShapeDtypeStruct((ROWS, COLUMNS), jnp.dtype(jnp.float32), layout=_SCORES)
        emit = functools.partial(_emit_scores, self.tile)
        return plgpu.inline_mgpu(arg_types=types, return_type=result)(emit)(q, list(pages))

    def scaled(self, tile: jax.Array, scales: Sequence[jax.Array]) -> jax.Array:
        """Multiplies [64, 16] by one number for each position of two pages."""
        types = (_SCORES, [tiled(OF_POSITIONS)] * 2)
        result = plgpu.ShapeDtypeStruct((ROWS, COLUMNS), jnp.dtype(jnp.float32), layout=_SCORES)
        return plgpu.inline_mgpu(arg_types=types, return_type=result)(_emit_scaled)(tile, list(scales))

    def add(
        self, sums: jax.Array, fade: jax.Array, weights: jax.Array, pages: Sequence[jax.Array], seen: jax.Array
    ) -> jax.Array:
        """Returns fade * sums + v^T weights^T [4 H, heads] for two pages of values; weights are rounded to 16 bits.

        Args:
          seen: [64, 16], -1 for values that are seen; 0 for others, which count as zeros.
        """
        of_sums, rows = tiled(self.of.sums), _SCORES.reduce(1)
        types = (of_sums, rows, _SCORES, [tiled(self.of.values)] * 2, _SCORES)
        result = plgpu.ShapeDtypeStruct(sums.shape, jnp.dtype(jnp.float32), layout=of_sums)
        emit = functools.partial(_emit_sums, self.tile)
        call = plgpu.inline_mgpu(arg_types=types, return_type=result)(emit)
        return call(sums, fade, weights.astype(self.tile.dtype), list(pages), seen)

    def show(self, sums: jax.Array, rows: Sequence[jax.Array], sums_s: MosaicValue, rows_s: MosaicValue) -> None:
        """Writes the sums of all warps, and numbers of their rows, to shared memory."""
        _store(sums, tiled(self.of.sums), sums_s)
        for at, numbers in enumerate(rows):
            _store(numbers, _SCORES.reduce(1), rows_s.at[at])

    def sync(self) -> None:
        """Waits for all warps."""
        plgpu.inline_mgpu()(lambda ctx: mgpu.utils.warpgroup_barrier())()

    def part(self, source: MosaicValue) -> jax.Array:
        """Loads sums [H, heads], spread over the warps."""
        return self._load(source, self.of.part)

    def per_head(self, source: MosaicValue) -> jax.Array:
        """Loads one number for each head of a part."""
        return plgpu.load(source, layout=tiled(self.of.part).reduce(0), optimized=False)

    def full_part(self) -> tuple[jax.Array, jax.Array]:
        """Returns a part [H, heads] and numbers [heads] of zeros."""
        of_part = tiled(self.of.part)
        part = jnp.zeros((self.tile.head_dim, self.tile.heads), jnp.float32)
        numbers = jnp.zeros((self.tile.heads,), jnp.float32)
        return plgpu.layout_cast(part, of_part), plgpu.layout_cast(numbers, of_part.reduce(0))

    def store_part(self, part: jax.Array, target_g: MosaicValue) -> None:
        """Stores a part to device memory."""
        _store(part, tiled(self.of.part), target_g)

    def store_per_head(self, numbers: jax.Array, target_g: MosaicValue) -> None:
        """Stores one number for each head to device memory."""
        _store(numbers, tiled(self.of.part).reduce(0), target_g)


class Interpreted:
    """The twin's instructions, which Pallas can interpret; it takes f32, too."""

    def __init__(self, tile: Tile, params: plgpu.InterpretGPUParams) -> None:
        self.tile = tile
        self.options: dict[str, MosaicValue] = {"interpret": params}

    def queries(self, source: MosaicValue) -> jax.Array:
        """Loads an array."""
        return source[...]

    keys = values = scales = part = per_head = queries

    def indices(self, axis: int) -> jax.Array:
        """Returns the index of each score along an axis."""
        return lax.broadcasted_iota(jnp.int32, (ROWS, COLUMNS), axis)

    def full_rows(self, number: float) -> jax.Array:
        """Returns [64], one number for each row of scores."""
        return jnp.full((ROWS,), number, jnp.float32)

    def zeros(self) -> jax.Array:
        """Returns sums [4 H, heads] of zeros."""
        return jnp.zeros((WARPS * self.tile.head_dim, self.tile.heads), jnp.float32)

    def _of_warps(self, pages: Sequence[jax.Array]) -> jax.Array:
        """Returns [warps, 16 positions, H] of two pages, in the dtype of products."""
        of_pages = [page.astype(self.tile.dtype).reshape(WARPS, EIGHT, -1) for page in pages]
        return jnp.concatenate(of_pages, axis=1)

    def scores(self, q: jax.Array, pages: Sequence[jax.Array]) -> jax.Array:
        """Returns q k^T [64, 16] for two pages of keys."""
        rows = jnp.pad(q, ((0, ROWS // WARPS - q.shape[0]), (0, 0)))
        found = jnp.einsum("nh,wsh->wns", rows, self._of_warps(pages), preferred_element_type=jnp.float32)
        return found.reshape(ROWS, COLUMNS)

    def scaled(self, tile: jax.Array, scales: Sequence[jax.Array]) -> jax.Array:
        """Multiplies [64, 16] by one number for each position of two pages."""
        factors = jnp.concatenate([one.reshape(WARPS, 1, EIGHT) for one in scales], axis=2)
        return (tile.reshape(WARPS, -1, COLUMNS) * factors).reshape(ROWS, COLUMNS)

    def add(
        self, sums: jax.Array, fade: jax.Array, weights: jax.Array, pages: Sequence[jax.Array], seen: jax.Array
    ) -> jax.Array:
        """Returns fade * sums + v^T weights^T [4 H, heads] for two pages of values; weights are rounded to 16 bits.

        Args:
          seen: [64, 16], -1 for values that are seen; 0 for others, which count as zeros.
        """
        of_heads = weights.astype(self.tile.dtype).reshape(WARPS, -1, COLUMNS)[:, : self.tile.heads]
        is_seen = seen.reshape(WARPS, -1, COLUMNS)[:, 0, :, None] != 0
        values = jnp.where(is_seen, self._of_warps(pages), 0)
        more = jnp.einsum("wsh,wns->whn", values, of_heads, preferred_element_type=jnp.float32)
        factors = fade.reshape(WARPS, 1, -1)[..., : self.tile.heads]
        return (sums.reshape(more.shape) * factors + more).reshape(sums.shape)

    def show(self, sums: jax.Array, rows: Sequence[jax.Array], sums_s: MosaicValue, rows_s: MosaicValue) -> None:
        """Writes the sums of all warps, and numbers of their rows, to shared memory."""
        sums_s[...] = sums
        for at, numbers in enumerate(rows):
            rows_s[at] = numbers

    def sync(self) -> None:
        """Waits for all warps."""
        plgpu.commit_smem()

    def full_part(self) -> tuple[jax.Array, jax.Array]:
        """Returns a part [H, heads] and numbers [heads] of zeros."""
        return jnp.zeros((self.tile.head_dim, self.tile.heads)), jnp.zeros(self.tile.heads)

    def store_part(self, part: jax.Array, target_g: MosaicValue) -> None:
        """Stores an array to device memory."""
        target_g[...] = part

    store_per_head = store_part


type Instructions = Machine | Interpreted


def _store(values: jax.Array, layout: MosaicValue, target: MosaicValue) -> None:
    store = plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))
    store(lambda ctx, held, target: held.store_untiled(target, optimized=False))(values, target)


def _emit_scores(tile: Tile, ctx, q, pages):
    queries, keys = q.registers.reshape(tile.heads // EIGHT, -1), [page.registers.reshape(-1) for page in pages]
    return fragmented(scores_of(queries, keys, machine(tile)), _SCORES, (ROWS, COLUMNS))


def _emit_scaled(ctx, scores, scales):
    found = scaled_scores(scores.registers.reshape(2, 2), [one.registers.item() for one in scales])
    return fragmented(found, _SCORES, (ROWS, COLUMNS))


def _emit_sums(tile: Tile, ctx, sums, fade, weights, pages, seen):
    old = sums.registers.reshape(tile.heads // EIGHT, -1, tile.vector(EIGHT))
    values = [page.registers.reshape(-1, 2) for page in pages]
    of_weights, of_seen = (one.registers.reshape(2, 2) for one in (weights, seen))
    found = sums_of(old, fade.registers.reshape(2), of_weights, of_seen, values, machine(tile))
    return fragmented(found, tiled(Layouts.of(tile).sums), (WARPS * tile.head_dim, tile.heads))
