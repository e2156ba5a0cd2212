"""nf4_matmul on Hopper (sm_90): TMA copies codes and rows, two warpgroups dequantize, wgmma multiplies.

Both kernels compute a tile of the transposed result. So the weight is the left operand of wgmma, and each warpgroup
dequantizes its 64 rows as they are needed:

| kernel   | tile of a warpgroup  | left operand, from         | right operand | pipeline step          |
|----------|----------------------|----------------------------|---------------|------------------------|
| forward  | y^T [64 n, rows]     | w [64 n, 64 k], registers  | x^T           | 128 of K: two runs     |
| backward | dx^T [128 k, rows]   | w^T [128 k, 64 n], shared  | dy^T          | 64 of N                |

One of the three warpgroups in a block only starts copies. TMA reads zeros outside of an array and does not write there,
so rows past M, the half of a block past N, and columns past K need no code. Only TMA's view in tiles of 8 rows requires
M to be a multiple of 8; rows are padded before the kernel.

A twin of each kernel can be interpreted on a CPU, with JAX's race detector. It differs in two lines: codes are decoded
by selects instead of inline assembly, and forward's left operand goes through shared memory. The detector does not
check:

- that wgmma is asynchronous (the interpreter multiplies at once; tests check the order of issue, wait and reuse in the
  traced kernel instead), and that it reads registers until the wait (nothing comes between issue and wait);
- the fences inside of Mosaic's own operations;
- two blocks that write the same element.

Dimension key: M rows, L layers, N out, K in, J bytes of a packed row; suffix _g in device memory, _s in shared memory.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Direction, Layer
from pallas_kernels.mosaic.registers import MosaicValue
from pallas_kernels.nf4_matmul.mosaic import code_lookup
from pallas_kernels.nf4_matmul.mosaic.operands import Operands, Weights, operands, pad_rows, place_of

WARPGROUPS = 2  # compute warpgroups
RUN = code_lookup.RUN  # columns with one constant per row, and rows of a warpgroup's part of the weight
GROUP = 2 * RUN  # columns whose codes share bytes
EIGHT = 8  # rows of a wgmma tile in shared memory
MEMORY_REGISTERS = 40  # registers of the warpgroup that starts copies; the others share the rest
REGISTERS = plgpu.Layout.WGMMA

type Interpret = plgpu.InterpretGPUParams | None  # None: the kernel itself


def _tiles(row_bytes: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Returns the transforms to swizzled tiles of 8 x 64 in shared memory, which avoid bank conflicts."""
    return (
        plgpu.TilingTransform((EIGHT, RUN)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(row_bytes),  # pyright: ignore[reportAbstractUsage]
    )


WIDE = _tiles(128)  # rows of 64 values of 16 bits
NARROW = _tiles(64)  # rows of 64 bytes


class Tile(NamedTuple):
    """The rows of x or dy in one block, and the pipeline steps whose copies are in shared memory at once."""

    rows: int
    steps: int


# Tiles that fit shared memory and registers. The choice among them is by reasoning: it was measured on no card.
TILES: dict[Direction, tuple[Tile, ...]] = {
    "forward": (Tile(64, 4), Tile(128, 4), Tile(256, 2)),
    "backward": (Tile(64, 4), Tile(128, 4)),
}
COLUMNS: dict[Direction, int] = {"forward": RUN, "backward": GROUP}  # columns of the result per warpgroup
PROCESSORS = 132  # SMs of an H100 or H200, each with one block at a time
DECODING = 550  # cycles in which a warpgroup decodes 64 x 128 weights: about its instructions and latencies


def best_tile(direction: Direction, rows: int, width: int) -> Tile:
    """Returns the tile with the fewest (waves of blocks x cycles per step), the smallest among equals.

    A step multiplies for 8 cycles per row of the tile (two warpgroups, 4096 FLOP per cycle). One warpgroup decodes
    while the other multiplies, so short products wait for decoding.
    """

    def cycles(tile: Tile) -> int:
        blocks = pl.cdiv(rows, tile.rows) * pl.cdiv(width, WARPGROUPS * COLUMNS[direction])
        return pl.cdiv(blocks, PROCESSORS) * max(8 * tile.rows, DECODING + 4 * tile.rows)

    return min(TILES[direction], key=cycles)


def forward(x_MK: Float[Array, "M K"], weights: Weights, layer: Layer) -> Float[Array, "M N"]:
    """Computes y = x w^T, accumulated in f32, in x's dtype."""
    tile = best_tile("forward", x_MK.shape[0], weights.shape[0])
    return forward_product(x_MK, operands(weights, layer, x_MK.dtype), tile)


def backward(dy_MN: Float[Array, "M N"], weights: Weights, layer: Layer) -> Float[Array, "M K"]:
    """Computes dx = dy w, accumulated in f32, in dy's dtype."""
    tile = best_tile("backward", dy_MN.shape[0], weights.shape[1])
    return backward_product(dy_MN, operands(weights, layer, dy_MN.dtype), tile)


def forward_product(x_MK: jax.Array, weight: Operands, tile: Tile, interpret: Interpret = None) -> jax.Array:
    """Computes `forward` with a given tile, by the kernel or, with `interpret`, by its twin."""
    decoder = _decoder(weight, x_MK.dtype, interpret)

    def step(wg, operand_s, x_s, codes_s, scales_s, acc):
        mine = pl.ds(wg * RUN, RUN)
        values = _dequantized(decoder, codes_s.at[mine], scales_s.at[:, mine])
        left = _through_shared(values, operand_s[0].at[wg]) if operand_s else values
        for run in (0, 1):
            plgpu.wgmma(acc, left[run], x_s.at[:, pl.ds(run * RUN, RUN)].T)
        plgpu.wgmma_wait(0)
        return acc

    return _product(
        x_MK,
        weight,
        tile,
        Shape(
            direction="forward",
            width=weight.shape[0],
            steps=pl.cdiv(weight.shape[1], GROUP),
            scales=decoder.scales,
            blocks=_forward_blocks,
            operand=() if interpret is None else ((WARPGROUPS, 2, RUN, RUN),),
        ),
        step,
        interpret,
    )


def backward_product(dy_MN: jax.Array, weight: Operands, tile: Tile, interpret: Interpret = None) -> jax.Array:
    """Computes `backward` with a given tile, by the kernel or, with `interpret`, by its twin."""
    decoder = _decoder(weight, dy_MN.dtype, interpret)

    def step(wg, operand_s, dy_s, codes_s, scales_s, acc):
        mine = pl.ds(pl.multiple_of(wg * RUN, RUN), RUN)
        values = _dequantized(decoder, codes_s.at[:, mine], scales_s.at[pl.ds(decoder.scales * wg, decoder.scales)])
        plgpu.wgmma_wait(0)  # the previous step read its operand while this one was decoded
        for run in (0, 1):
            operand_s[0][wg, :, pl.ds(run * RUN, RUN)] = values[run]
        plgpu.commit_smem()
        plgpu.wgmma(acc, operand_s[0].at[wg].T, dy_s.T)
        return acc

    return _product(
        dy_MN,
        weight,
        tile,
        Shape(
            direction="backward",
            width=weight.shape[1],
            steps=pl.cdiv(weight.shape[0], RUN),
            scales=decoder.scales,
            blocks=_backward_blocks,
            operand=((WARPGROUPS, RUN, GROUP),),
            late=1,
        ),
        step,
        interpret,
    )


class Shape(NamedTuple):
    """The properties in which the two products differ, other than the step function.

    Attributes:
      width: columns of the result.
      steps: number of pipeline steps.
      scales: the number of scales of a row in 128 columns of the weight.
      blocks: (tile, scales, place, block of rows, block of columns, late) -> the specs of the three arrays that a step
        reads.
      operand: shapes of the left operand in shared memory, if it goes through it.
      late: steps after which a step's shared memory may be refilled, because its product runs into the next one.
    """

    direction: Direction
    width: int
    steps: int
    scales: int
    blocks: Callable[..., list[plgpu.BlockSpec]]
    operand: tuple[tuple[int, ...], ...]
    late: int = 0

    @property
    def columns(self) -> int:
        """Columns of the result per warpgroup."""
        return COLUMNS[self.direction]


type Place = tuple[jax.Array, jax.Array | None]  # index in the stack of codes, and of scales if they are stacked


def _forward_blocks(
    tile: Tile, scales: int, place: Place, m: jax.Array, n: jax.Array, late: int
) -> list[plgpu.BlockSpec]:
    """Returns the specs of step k: rows [rows, 128 k], codes [128 n, 64 bytes], scales [groups, 128 n]."""
    block = functools.partial(plgpu.BlockSpec, memory_space=plgpu.SMEM, delay_release=late)
    layer, expert = place
    return [
        block((tile.rows, GROUP), lambda k: (m, k), transforms=WIDE),
        block((None, WARPGROUPS * RUN, RUN), lambda k: (layer, n, k), transforms=NARROW),
        _scales_block(block, (scales, WARPGROUPS * RUN), lambda k: (k, n), expert),
    ]


def _backward_blocks(
    tile: Tile, scales: int, place: Place, m: jax.Array, k: jax.Array, late: int
) -> list[plgpu.BlockSpec]:
    """Returns the specs of step n: rows [rows, 64 n], codes [64 n, 2 x 64 bytes], scales [2 x groups, 64 n]."""
    block = functools.partial(plgpu.BlockSpec, memory_space=plgpu.SMEM, delay_release=late)
    layer, expert = place
    return [
        block((tile.rows, RUN), lambda n: (m, n), transforms=WIDE),
        block((None, RUN, WARPGROUPS * RUN), lambda n: (layer, n, k), transforms=NARROW),
        _scales_block(block, (scales * WARPGROUPS, RUN), lambda n: (k, n), expert),
    ]


def _scales_block(
    block: Callable[..., plgpu.BlockSpec],
    shape: tuple[int, int],
    index: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    expert: jax.Array | None,
) -> plgpu.BlockSpec:
    """Returns the spec of scales, of the only weight or of an expert."""
    if expert is None:
        return block(shape, index)
    return block((None, *shape), lambda step: (expert, *index(step)))


class Decoder(NamedTuple):
    """The steps by which a kernel decodes a code: its table, and its scales.

    Attributes:
      look_up: packed bytes [64, 64] -> the values of their low and of their high nibbles.
      factors: scales [64] of the groups of 64 columns, several -> the factors [64, 64].
      scales: the number of scales of a row in 128 columns of the weight.
    """

    look_up: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    factors: Callable[[list[jax.Array], MosaicValue], jax.Array]
    scales: int


def _decoder(weight: Operands, dtype: DTypeLike, interpret: Interpret) -> Decoder:
    pair, factors = (
        (code_lookup.decode_pair, code_lookup.group_factors)
        if interpret is None
        else (code_lookup.select_pair, code_lookup.repeated_factors)
    )
    look_up = functools.partial(pair, rows=RUN, layout=REGISTERS, table=weight.table, dtype=dtype)
    return Decoder(look_up, factors, GROUP // weight.group)


def _dequantized(decoder: Decoder, codes_s: MosaicValue, scales_s: MosaicValue) -> list[jax.Array]:
    """Dequantizes two runs [64 rows, 64 columns] of the weight in registers: table values times scales."""
    pair, groups = decoder.look_up(plgpu.load(codes_s, layout=REGISTERS)), decoder.scales // 2
    scales = [plgpu.load(scales_s.at[at], layout=REGISTERS.reduce(1)) for at in range(decoder.scales)]
    if groups == 1:
        factors = [lax.broadcast_in_dim(scale, pair[0].shape, [0]) for scale in scales]
    else:
        factors = [decoder.factors(scales[run * groups : (run + 1) * groups], REGISTERS) for run in (0, 1)]
    return [values * factor for values, factor in zip(pair, factors, strict=True)]


def _through_shared(values: list[jax.Array], operand_s: MosaicValue) -> list[MosaicValue]:
    """Moves the twin's left operand to shared memory, because the interpreted wgmma takes none from registers."""
    for run in (0, 1):
        operand_s[run] = values[run]
    plgpu.commit_smem()
    return [operand_s.at[run] for run in (0, 1)]


def _product(
    rows: jax.Array, weight: Operands, tile: Tile, shape: Shape, step: Callable[..., MosaicValue], interpret: Interpret
) -> jax.Array:
    """Runs the kernel, [M, .] -> [M, width]: one block per tile of the result, with one accumulator over all steps."""
    padded = pad_rows(rows, EIGHT)
    row_tiles = pl.cdiv(len(padded), tile.rows)
    together = _together(row_tiles)
    shared = functools.partial(plgpu.SMEM, dtype=rows.dtype, transforms=WIDE)
    options: dict[str, Any] = {} if interpret is None else {"interpret": interpret}
    run = plgpu.kernel(
        functools.partial(_block_of_result, tile, shape, step, together),
        out_type=jax.ShapeDtypeStruct((len(padded), shape.width), rows.dtype),
        grid=(row_tiles // together, pl.cdiv(shape.width, WARPGROUPS * shape.columns), together),
        grid_names=("group", "across", "m"),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=[shared((WARPGROUPS, tile.rows, shape.columns)), [shared(one) for one in shape.operand]],
        kernel_name=f"hopper_{shape.direction}",
        **options,
    )
    return run(weight.layer, padded, weight.codes_LNJ, weight.scales)[: len(rows)]


def _block_of_result(
    tile: Tile,
    shape: Shape,
    step: Callable[..., MosaicValue],
    together: int,
    layer_g,
    rows_g,
    codes_g,
    scales_g,
    out_g,
    out_s,
    operand_s,
) -> None:
    """Computes one tile [rows, columns of both warpgroups] of the result: the kernel's body."""
    wg, across = lax.axis_index("wg"), lax.axis_index("across")
    m = lax.axis_index("group") * together + lax.axis_index("m")
    columns = pl.ds((across * WARPGROUPS + wg) * shape.columns, shape.columns)

    def compute(pipeline):
        @functools.partial(pl.run_scoped, acc=plgpu.WGMMAAccumulatorRef((shape.columns, tile.rows), jnp.float32))
        def _(acc):
            pipeline(acc)
            _store(acc[...], out_s.at[wg], out_g.at[pl.ds(m * tile.rows, tile.rows), columns])

    place = place_of(layer_g, m)
    pipeline = plgpu.emit_pipeline_warp_specialized(
        lambda _, *step_refs: step(wg, operand_s, *step_refs),
        grid=(shape.steps,),
        memory_registers=MEMORY_REGISTERS,
        in_specs=shape.blocks(tile, shape.scales, place, m, across, shape.late),
        wg_axis="wg",
        num_compute_wgs=WARPGROUPS,
        max_concurrent_steps=max(tile.steps, shape.late + 1),
        compute_context=compute,
    )
    multiply = functools.partial(pipeline, rows_g, codes_g, scales_g)
    if place[1] is None:
        multiply()
        return
    pl.when(place[1] >= 0)(multiply)

    @pl.when((place[1] < 0) & (wg < WARPGROUPS))
    def _():
        zeros = plgpu.layout_cast(jnp.zeros((shape.columns, tile.rows), jnp.float32), REGISTERS)
        _store(zeros, out_s.at[wg], out_g.at[pl.ds(m * tile.rows, tile.rows), columns])


def _store(transposed: jax.Array, out_s: MosaicValue, out_g: MosaicValue) -> None:
    """Stores a warpgroup's tile, transposed on its way through shared memory."""
    out_s.T[...] = transposed.astype(out_s.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_s, out_g)
    plgpu.wait_smem_to_gmem(0)


def _together(row_tiles: int) -> int:
    """Returns the number of row tiles per column tile in block order: the largest divisor of `row_tiles` up to 16.

    So blocks that run at the same time share rows and codes in the L2 cache.
    """
    return max(count for count in range(1, 17) if row_tiles % count == 0)
