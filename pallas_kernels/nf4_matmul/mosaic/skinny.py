"""nf4_matmul of few rows (M <= 16) from Ampere to Blackwell: bound by reading the codes once, not by instructions.

A block of four warps computes 32 columns of the result, over all of K or a part of it. Each step reads 256 packed bytes
of each of the 32 rows of codes, 64 per warp. A thread reads 16 bytes per row, by a vector load into registers, one step
ahead of their use. mma.sync (m16n8k16) multiplies, with the weights as its first operand and up to eight rows of x as
its second. The order of K is free if both agree, so a thread's 16 bytes are its share of eight products. Weights in the
products are bare table values. The constant of a run multiplies the run's sum: eight registers per 128 weights of a
thread. Where 16 or 32 columns share a scale, threads hold different groups, so scales multiply the weights instead.
Warps add their sums through shared memory. XLA adds the parts of K, in the pass that transposes the result.

Instructions per weight and thread, by machine code: 3.3 for up to eight rows, 3.7 for up to sixteen. Of these, 2.6 are
look-ups (21 per eight codes), 0.13 products, 0.13 sums. The budget on an H100 is 132 x 4 schedulers x 1.755 GHz x 32 /
(3.35e12 / 0.53 weights/s) = 4.7. Integer instructions, at half a warp per cycle, take 2.7, but the time of the codes
allows 2.35. So they bound the kernel at 0.86 of the peak bandwidth there, and at 0.93 on an A100; on other cards memory
bounds it. A product by multiply-adds would take one more instruction per weight to widen it, and one per row of x.

Bytes in flight: latency x bandwidth is 0.6 us x 3.35 TB/s = 2.0 MB on an H100, 15 KB per SM. A thread has 64 bytes of
codes of its next step in flight, a block 8 KB, so two blocks per SM cover it; the registers of an SM hold three. On a
B200, with 2.3 times the bandwidth, three cover 0.8 of it.

The twin differs from the kernel only in `dot` (an einsum; see Interpreted). The race detector checks the exchange of
sums, but sees a warpgroup as one thread: Mosaic's own barrier makes the warps wait for each other.

Dimension key: M rows, N out, K in, W = 4 warps; a step is four groups of 128 columns of K, 64 bytes each.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Layer
from pallas_kernels.nf4_matmul.mosaic import inline_ptx
from pallas_kernels.nf4_matmul.mosaic.capabilities import MOST_ROWS
from pallas_kernels.nf4_matmul.mosaic.operands import Operands, Weights, operands
from pallas_kernels.nf4_matmul.mosaic.skinny_instructions import (
    BLOCK,
    EIGHT,
    GROUP,
    RUN,
    STEP_BYTES,
    WARPS,
    Interpreted,
    Machine,
)

ENOUGH_BLOCKS = 4 * 132  # four per SM of an H100, by reasoning
PARTS = (4, 2, 1)  # numbers of parts of K, each computed by separate blocks


def forward(x_MK: Float[Array, "M K"], weights: Weights, layer: Layer) -> Float[Array, "M N"]:
    """Computes y = x w^T, accumulated in f32, in x's dtype."""
    weight = operands(weights, layer, x_MK.dtype)
    return product(Machine(x_MK.dtype, weight.table), x_MK, weight)


def product(instructions: Machine | Interpreted, x_MK: Float[Array, "M K"], weight: Operands) -> Float[Array, "M N"]:
    """Computes `forward` with the instructions of a card or of the twin."""
    assert x_MK.shape[0] <= MOST_ROWS["skinny"].rows
    return _product(instructions, x_MK, _at_least_a_step(weight), pl.cdiv(x_MK.shape[0], EIGHT))


def expert_product(
    instructions: Machine | Interpreted, x_PK: Float[Array, "P K"], weight: Operands
) -> Float[Array, "P N"]:
    """Computes the product of tiles of eight rows, each with its expert; of at least a step of K."""
    assert pl.cdiv(weight.shape[1], GROUP) >= WARPS
    return _product(instructions, x_PK, weight, weight.layer.shape[1])


def _product(
    instructions: Machine | Interpreted, x_MK: Float[Array, "M K"], weight: Operands, tiles: int
) -> Float[Array, "M N"]:
    groups = max(WARPS, pl.cdiv(weight.shape[1], GROUP))
    steps = pl.cdiv(groups, WARPS)
    blocks = weight.codes_LNJ.shape[1] // BLOCK * (tiles if weight.layer.ndim == 2 else 1)
    parts = next(parts for parts in PARTS if parts == 1 or _worth(parts, steps, blocks))
    tile_rows = 2 if x_MK.shape[0] <= 2 else EIGHT
    rows = ((0, tiles * tile_rows - x_MK.shape[0]), (0, groups * GROUP - x_MK.shape[1]))
    x_TRK = jnp.pad(x_MK, rows).reshape(tiles, tile_rows, groups * GROUP)
    task = _Task(instructions, groups, steps, parts, weight.codes_LNJ.shape[1], GROUP // weight.group)
    sums_PTNR = task.run(x_TRK, weight)
    y_TRN = jnp.sum(sums_PTNR, axis=0).swapaxes(1, 2)
    return y_TRN.reshape(tiles * EIGHT, -1)[: x_MK.shape[0]].astype(x_MK.dtype)


def _worth(parts: int, steps: int, blocks: int) -> bool:
    """True if the parts of K are equal, and half as many would give too few blocks, with this many per part."""
    return steps % parts == 0 and blocks * parts // 2 < ENOUGH_BLOCKS


def _at_least_a_step(weight: Operands) -> Operands:
    """Pads a weight of at most 384 columns, whose rows are shorter than a step, with zeros.

    This is the only case in which a layer's codes are copied: at most 192 bytes per row become 256.
    """
    used = RUN * pl.cdiv(weight.shape[1], GROUP)
    if used >= STEP_BYTES:
        return weight
    one = lax.dynamic_index_in_dim(weight.codes_LNJ, weight.layer[0])[:, :, :used]
    codes = jnp.pad(one, ((0, 0), (0, 0), (0, STEP_BYTES - used)))
    scales = jnp.pad(weight.scales, ((0, GROUP // weight.group * WARPS - weight.scales.shape[0]), (0, 0)))
    return weight._replace(codes_LNJ=codes, layer=jnp.zeros_like(weight.layer), scales=scales)


class _Task(NamedTuple):
    """One product: its groups of K, steps, parts of K, columns of the result, and scales of a row in a group."""

    instructions: Machine | Interpreted
    groups: int
    steps: int
    parts: int
    columns: int
    scales: int

    def run(self, x_TRK: jax.Array, weight: Operands) -> Float[Array, "parts T N 8"]:
        """Computes the sums of every part of K; with experts, separate blocks compute each tile of rows."""
        tiles, of_tiles = x_TRK.shape[0], weight.layer.ndim == 2
        words = jnp.asarray(inline_ptx.constant_words(weight.table, x_TRK.dtype))
        return plgpu.kernel(
            self.kernel,
            out_type=jax.ShapeDtypeStruct((self.parts, tiles, self.columns, EIGHT), jnp.float32),
            grid=(self.columns // BLOCK, self.parts, *([tiles] if of_tiles else [])),
            grid_names=("block", "part", *(["tile"] if of_tiles else [])),
            scratch_types=[plgpu.SMEM((1 if of_tiles else tiles, WARPS * BLOCK, EIGHT), jnp.float32)],
            kernel_name="skinny",
            **self.instructions.options,
        )(x_TRK, weight.codes_LNJ, weight.layer, weight.scales, words)

    def kernel(self, x_g, codes_g, layer_g, scales_g, words_g, out_g, sums_s):
        """Computes 32 columns of the result, over one part of K, for all tiles of rows or for one with its expert."""
        do, part = self.instructions, lax.axis_index("part")
        column = pl.multiple_of(BLOCK * lax.axis_index("block"), BLOCK)
        words = do.constants(words_g)
        steps = count = self.steps // self.parts
        if len(layer_g.shape) == 1:
            tiles, layer = list(range(x_g.shape[0])), layer_g[0]
        else:
            tiles = [lax.axis_index("tile")]
            layer, expert = layer_g[0, tiles[0]], layer_g[1, tiles[0]]
            scales_g, count = scales_g.at[jnp.maximum(expert, 0)], jnp.where(expert >= 0, steps, 0)
        load = functools.partial(self.load, [x_g.at[tile] for tile in tiles], codes_g.at[layer], scales_g, column)

        def step(i, carry):
            sums, (x, codes, scales) = carry
            later = load(steps * part + jnp.minimum(i + 1, steps - 1))
            return do.dot(sums, x, codes, scales, words), later

        sums, _ = lax.fori_loop(0, count, step, ([do.zeros() for _ in tiles], load(steps * part)))
        for at in range(len(tiles)):
            do.show(sums[at], sums_s.at[at])
        for at, tile in enumerate(tiles):
            of_warps = [do.stored(sums_s.at[at, pl.ds(BLOCK * warp, BLOCK)]) for warp in range(WARPS)]
            out_g[part, tile, pl.ds(column, BLOCK)] = sum(of_warps[1:], of_warps[0])

    def load(self, tiles_g, codes_g, scales_g, column, step):
        """Loads (rows of x, codes, scales) of a step; the last ends at K's end, and repeated runs get scales 0."""
        do = self.instructions
        group = jnp.minimum(WARPS * step, self.groups - WARPS)
        columns = pl.ds(pl.multiple_of(GROUP * group, GROUP), WARPS * GROUP)
        x = [do.rows(x_g.at[:, columns]) for x_g in tiles_g]
        codes = do.codes(codes_g.at[pl.ds(column, BLOCK), pl.ds(pl.multiple_of(64 * group, 64), STEP_BYTES)])
        each = self.scales
        scales = do.scales(scales_g.at[pl.ds(each * group, each * WARPS), pl.ds(column, BLOCK)])
        if self.groups % WARPS:
            is_new = do.groups(each * WARPS) >= each * (WARPS * step - group)
            scales = jnp.where(is_new, scales, jnp.zeros_like(scales))
        return x, codes, scales
