"""nf4_matmul on Ampere, Ada and Blackwell: one kernel with mma.sync, forward and backward.

Copies are cp.async on sm_80, sm_86 and sm_89, and TMA on sm_100, sm_120 and sm_121; all else is the same.

A warpgroup computes a tile [rows, 128 columns] of the result in rounds of 128 of the contraction. A round's rows,
packed codes [128, 64] and scales [128 / group, 128] are copied to shared memory `steps - 1` rounds ahead. The codes are
decoded in the registers from which mma.sync reads them (`fragments`), and never written to memory. Forward and backward
read the same tiles of codes and scales: forward keeps 128 rows n and iterates over K, backward keeps two runs of 64
columns k and iterates over N. Everything else is shared.

Table and group (16, 32 or 64 columns of a row that share a scale) are parameters, so another 4-bit code is another
table, not another kernel. Forward, each step of 16 multiplies by the scales of its group; backward, each warp by those
of its 16 columns.

If a size is not a multiple of a tile, the last copies are moved back to the array's end. Rows that are then computed
twice are stored once, a run of the contraction that is read twice has scales 0, and columns past the end are not
stored. Nothing outside of an array is read or written. The number of rows is padded to at least a tile and to a
multiple of eight before the kernel.

A thread executes 706 (881) instructions forward and 700 (875) backward per round with 64 (128) rows. Tensor cores take
1024 (2048) cycles per round on sm_80, 2048 (4096) on sm_86, and at least as long on sm_89. An SM of sm_80 holds two
blocks with 64 rows or one with 128. SMs of sm_86, sm_89, sm_120 and sm_121 hold one of either, so there the larger tile
decodes half as often. With TMA a thread executes up to 780 (1082) and 784 (1084). These numbers are counted from
machine code; no tile was timed.

The twin (`Interpreted`) can be interpreted on a CPU, with JAX's race detector. Index maps, order of copies and waits,
loop and stores are the kernel's. Copies and waits are those of TMA (the interpreter does not support cp.async), the
look-up uses selects, the product is jnp.dot, and columns within a tile have another order. The twin and the race
detector do not check:

- for cp.async, the number of copies that a wait leaves in flight: `steps - 2` rounds of COPIES groups, each copy one;
- for cp.async, that the barrier after each wait, the only one in a round, also permits refilling a slot: all reads of
  the previous round precede it in program order (tests count one barrier and one wait in the loop);
- the arrangement of registers in `fragments` (tests run its functions on arrays), and the addresses of `_copy_scales`.

Dimension key: M rows, N out, K in, L layers, C the contraction (K forward, N backward); _g device, _s shared memory.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.devices import Device, target_device
from pallas_kernels.dispatch import Direction, Layer
from pallas_kernels.nf4_matmul.mosaic import inline_ptx
from pallas_kernels.nf4_matmul.mosaic.ampere_instructions import Interpreted, Machine, TmaMachine
from pallas_kernels.nf4_matmul.mosaic.fragments import RUN, TILE_COLUMNS
from pallas_kernels.nf4_matmul.mosaic.operands import Operands, Weights, operands, pad_rows, place_of

EIGHT = 8  # rows of a swizzled tile in shared memory; copies start at a multiple
WIDE = 8  # row tiles per column tile in block order, so that their operands stay in the L2 cache


class Tile(NamedTuple):
    """The rows of a result's tile, and the rounds whose data are in shared memory at once."""

    rows: int
    steps: int


SMALL, LARGE = Tile(rows=64, steps=3), Tile(rows=128, steps=2)
# Devices that hold one block of either tile per SM, or two of the larger one (sm_100) -> the number of large tiles from
# which no SM of their largest card is idle.
LARGE_FROM = {"sm_86": 84, "sm_89": 142, "sm_100": 148, "sm_120": 188, "sm_121": 48}


def forward(x_MK: Float[Array, "M K"], weights: Weights, layer: Layer) -> Float[Array, "M N"]:
    """Computes y = x w^T, accumulated in f32, in x's dtype."""
    return _on_card("forward", x_MK, weights, layer)


def backward(dy_MN: Float[Array, "M N"], weights: Weights, layer: Layer) -> Float[Array, "M K"]:
    """Computes dx = dy w, accumulated in f32, in dy's dtype."""
    return _on_card("backward", dy_MN, weights, layer)


def _on_card(direction: Direction, rows_MC: jax.Array, weights: Weights, layer: Layer) -> jax.Array:
    weight = operands(weights, layer, rows_MC.dtype)
    tile = tile_for(target_device(), rows_MC.shape[0], _columns(direction, weight))
    return product(machine_for(target_device())(direction, rows_MC.dtype, weight.table), rows_MC, weight, tile)


def machine_for(device: Device) -> type[Machine]:
    """Returns the instructions of a device of a known compute capability."""
    assert device.compute_capability is not None
    return Machine if device.compute_capability < (9, 0) else TmaMachine


def _columns(direction: Direction, weight: Operands) -> int:
    n, k = weight.shape
    return n if direction == "forward" else k


def tile_for(device: Device, rows: int, columns: int) -> Tile:
    """Returns the tile for a result [rows, columns] on a device."""
    tiles = pl.cdiv(rows, LARGE.rows) * pl.cdiv(columns, TILE_COLUMNS)
    enough = (LARGE_FROM[name] for name in device.names if name in LARGE_FROM)
    return LARGE if tiles >= next(enough, tiles + 1) else SMALL


def product(
    instructions: Machine | Interpreted, rows_MC: Float[Array, "M C"], weight: Operands, tile: Tile
) -> Float[Array, "M columns"]:
    """Computes y[M, N] = x w^T or dx[M, K] = dy w, with a tile and the instructions of a card or of the twin."""
    rows = rows_MC.shape[0]
    padded = rows_MC if rows >= tile.rows else pad_rows(rows_MC, tile.rows)
    padded = pad_rows(padded, EIGHT)
    columns, contracted = _columns(instructions.direction, weight), rows_MC.shape[1]
    task = _Task(instructions, tile, padded.shape[0], contracted, columns, weight.shape[0], weight.group)
    columns_added = (*[(0, 0)] * (weight.scales.ndim - 1), (0, -weight.shape[0] % TILE_COLUMNS))
    scales = jnp.pad(weight.scales, columns_added)
    words = jnp.asarray(inline_ptx.constant_words(weight.table, rows_MC.dtype))
    return task.run(padded, weight.codes_LNJ, weight.layer, scales, words)[:rows]


class _Task(NamedTuple):
    """One product: its sizes and its kernel. `rows` is a multiple of EIGHT and at least a tile's."""

    instructions: Machine | Interpreted
    tile: Tile
    rows: int
    contracted: int
    columns: int
    weight_rows: int
    group: int

    @property
    def scales(self) -> int:
        """The number of scales of a row in 128 columns of the weight."""
        return 2 * RUN // self.group

    @property
    def grid(self) -> tuple[int, int]:
        """The numbers of row tiles and column tiles."""
        return pl.cdiv(self.rows, self.tile.rows), pl.cdiv(self.columns, TILE_COLUMNS)

    @property
    def rounds(self) -> int:
        """The number of rounds of 128 of the contraction; the last may be half a round."""
        return pl.cdiv(self.contracted, TILE_COLUMNS)

    def run(self, rows_g: jax.Array, *operands: jax.Array) -> jax.Array:
        """Runs the kernel on rows [rows, contracted], codes, layer, scales and constant words."""
        (rows, steps), dtype = self.tile, rows_g.dtype
        return plgpu.kernel(
            self.kernel,
            out_type=jax.ShapeDtypeStruct((self.rows, self.columns), dtype),
            grid=(self.grid[0] * self.grid[1],),
            grid_names=("tile",),
            scratch_types=[
                plgpu.SMEM((steps, 2, rows, RUN), dtype, transforms=_swizzled(2 * RUN)),
                plgpu.SMEM((steps, 2, RUN, RUN), jnp.uint8, transforms=_swizzled(RUN)),
                plgpu.SMEM((steps, self.scales, TILE_COLUMNS), dtype),
                *self.instructions.barriers(steps),
            ],
            kernel_name=f"ampere_{self.instructions.direction}",
            **self.instructions.options,
        )(rows_g, *operands)

    def kernel(self, rows_g, codes_g, layer_g, scales_g, words_g, out_g, rows_s, codes_s, scales_s, *arrived):
        """Computes one tile of the result."""
        do, (tile_rows, steps) = self.instructions, self.tile
        row_tile, column_tile = plgpu.planar_snake(lax.axis_index("tile"), self.grid, 0, WIDE)
        row = jnp.minimum(row_tile * tile_rows, self.rows - tile_rows)
        words = do.constants(words_g)
        layer, expert = place_of(layer_g, row_tile)
        scales_g = scales_g if expert is None else scales_g.at[jnp.maximum(expert, 0)]
        rounds = self.rounds if expert is None else jnp.where(expert >= 0, self.rounds, 0)
        fetch = functools.partial(
            self.fetch,
            (rows_g, codes_g.at[layer], scales_g),
            (rows_s, codes_s, scales_s),
            arrived,
            row,
            column_tile,
        )
        for k in range(steps - 1):
            if k >= self.rounds:
                do.skip_copies()
            elif expert is None:
                fetch(jnp.int32(k), k)
            else:
                lax.cond(expert >= 0, functools.partial(fetch, jnp.int32(k), k), do.skip_copies)

        def one_round(k, carry):
            sums, slot, free = carry
            do.wait(arrived, slot, steps - 2)
            later = k + steps - 1
            lax.cond(later < self.rounds, lambda: fetch(later, free), do.skip_copies)
            weights = do.weights(codes_s.at[slot], scales_s.at[slot], words)
            return do.multiply_add(sums, rows_s.at[slot], weights), *(_next(at, steps) for at in (slot, free))

        start = (do.zeros(tile_rows), jnp.int32(0), jnp.int32(steps - 1))
        sums, *_ = lax.fori_loop(0, rounds, one_round, start)
        self.store(do.in_order(sums), out_g, row_tile, row, column_tile)

    def fetch(self, sources, targets, arrived, row, column_tile, k, slot):
        """Starts the copies of round k: two runs of the rows, [128, 64] codes, their scales."""
        (rows_g, codes_g, scales_g), (rows_s, codes_s, scales_s) = sources, targets
        do = self.instructions
        n, j = (column_tile, k) if do.direction == "forward" else (k, column_tile)
        rows_n = pl.ds(pl.multiple_of(TILE_COLUMNS * n, TILE_COLUMNS), TILE_COLUMNS)
        of_scales = scales_g.at[pl.ds(self.scales * j, self.scales), rows_n]
        do.copy_scales(of_scales, scales_s.at[slot], arrived, slot)
        for part in range(2):
            run = jnp.minimum(2 * k + part, self.contracted // RUN - 1)
            of_rows = rows_g.at[pl.ds(row, self.tile.rows), pl.ds(RUN * run, RUN)]
            do.copy(of_rows, rows_s.at[slot, part], arrived, slot)
            block = jnp.minimum(2 * n + part, self.weight_rows // RUN - 1)
            of_codes = codes_g.at[pl.ds(RUN * block, RUN), pl.ds(RUN * j, RUN)]
            do.copy(of_codes, codes_s.at[slot, part], arrived, slot)

    def store(self, chunks, out_g, row_tile, row, column_tile):
        """Stores the chunks [rows, 64] that are within the result, each row once."""
        whole = self.rows % self.tile.rows == 0
        height = self.tile.rows if whole else EIGHT
        for part, first in itertools.product(range(len(chunks)), range(0, self.tile.rows, height)):
            block = 2 * column_tile + part
            is_mine = block < self.columns // RUN
            if not whole:  # the last tile was moved back: its first rows belong to the previous tile
                is_mine &= row + first >= row_tile * self.tile.rows

            @pl.when(is_mine)
            def _(rows=chunks[part][first : first + height], first=first, block=block):
                out_g[pl.ds(row + first, height), pl.ds(RUN * block, RUN)] = rows


def _swizzled(row_bytes: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Returns the transforms to swizzled tiles of 8 x 64 in shared memory, which avoid bank conflicts."""
    return (
        plgpu.TilingTransform((EIGHT, RUN)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(row_bytes),  # pyright: ignore[reportAbstractUsage]
    )


def _next(slot: jax.Array, steps: int) -> jax.Array:
    return jnp.where(slot == steps - 1, 0, slot + 1)
