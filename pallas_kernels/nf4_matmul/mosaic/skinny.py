"""nf4_matmul of few rows (M <= 16) on Ampere, Ada and Hopper: bounded by reading the codes once, not by instructions.

A block of four warps makes 32 columns of the result, along all of K or a part of it. Each step reads 256 packed bytes
of each of the 32 rows of codes, 64 for each warp: 16 a thread and row, which is a vector load, straight to registers,
one step ahead of its use. mma.sync (m16n8k16) multiplies, the weights as its first operand, up to eight rows of x as
its second: it wants no order of K but that both agree, so the 16 bytes of a thread are its share of eight products.
Values come from the table alone; the constant of a run multiplies the run's sum, eight registers for 128 weights of a
thread. Warps add their sums up through shared memory; parts of K are added by XLA, in the pass that turns the result.

Instructions for one weight and thread: 21 for eight look-ups, 2.63; products 0.13, sums 0.13, and the rest of a step:
3.2 in all by machine code (M <= 8). The budget on an H100 is 132 x 4 schedulers x 1.755 GHz x 32 / (3.35e12 / 0.53
weights a second) = 4.7 instructions; of them integers, at half a warp a cycle, may be 2.35 in the time that the codes
take: integer units bound the kernel at 0.85 of the peak bandwidth there, 0.9 on an A100; on other cards memory does.
A product by fused multiply-adds would need 1 more a weight to widen to 32 bits and 1 a weight and row of x.

Bytes in flight: latency x bandwidth is 0.6 us x 3.35 TB/s = 2.0 MB on an H100, 15 KB a multiprocessor. A thread has 64
bytes of the next step in flight, a block 8 KB: two blocks a multiprocessor cover it; by registers it holds four.

The twin is the same kernel but for `dot` (an einsum; see Interpreted). The race detector sees the sums that warps
exchange, but a warpgroup is one thread to it: that the warps wait for each other is Mosaic's own barrier.

Dimension key: M rows, N out, K in, W = 4 warps, a step is four groups of 128 columns of K, 64 bytes each.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import Replicated, TiledLayout, Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector
from jaxtyping import Array, Float

from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.nf4_matmul.dispatch import Layer
from pallas_kernels.nf4_matmul.mosaic import fragments
from pallas_kernels.nf4_matmul.mosaic.decode import select_pair
from pallas_kernels.nf4_matmul.mosaic.operands import Operands, operands

WARPS = 4
GROUP = 128  # columns of K whose codes share 64 bytes
STEP_BYTES = WARPS * GROUP // 2
BLOCK = 32  # columns of the result that a block makes
EIGHT = 8  # rows of x in one product
MOST_ROWS = 16
ENOUGH_BLOCKS = 4 * 132  # four on each multiprocessor of the largest card
PARTS = (4, 2, 1)  # of K

# [32, 256]: row 4 g + q, byte 64 w + 16 t + b; registers (q), each of 16 bytes b.
CODES = TiledLayout(Tiling(((BLOCK, STEP_BYTES), (BLOCK, 64), (4, 16))), (-5,), (-4, -3), -1)
# [8, 512] rows of x: row g, column 128 w + 64 r + 16 t + b; registers (r), each of 16 values b.
ROWS = TiledLayout(Tiling(((EIGHT, WARPS * GROUP), (EIGHT, GROUP), (EIGHT, 64), (16,))), (-6,), (-3, -2), -1)
# Two rows of x, and all threads g read one of them: row g % 2.
TWO_ROWS = TiledLayout(Tiling(((2, WARPS * GROUP), (2, GROUP), (2, 64), (16,))), (-6,), (Replicated(4), -3, -2), -1)
# [8, 32] scales: run 2 w + r, row 4 g + q; registers (r), each of four values q.
SCALES = TiledLayout(Tiling(((2 * WARPS, BLOCK), (2, BLOCK), (4,))), (-5,), (-2, Replicated(4)), -1)
# [128, 8] sums of warps: 32 w + row 4 g + q, row of x 2 t + v; registers (q), each of two values v.
SUMS = TiledLayout(Tiling(((WARPS * BLOCK, EIGHT), (BLOCK, EIGHT), (4, 2))), (-6,), (-4, -3), -1)


def forward(x_MK: Float[Array, "M K"], weights: QTensor, layer: Layer) -> Float[Array, "M N"]:
    """y = x w^T, accumulated in f32, in x's dtype."""
    weight = operands(weights, layer, x_MK.dtype)
    return product(Machine(x_MK.dtype, weight.table), x_MK, weight)


def product(instructions: "Machine | Interpreted", x_MK: Float[Array, "M K"], weight: Operands) -> Float[Array, "M N"]:
    """`forward` with the instructions of a card or of the twin."""
    assert x_MK.shape[0] <= MOST_ROWS
    weight = _at_least_a_step(weight)
    groups = weight.codes_LNJ.shape[2] * 2 // GROUP
    steps = pl.cdiv(groups, WARPS)
    parts = next(parts for parts in PARTS if parts == 1 or _worth(parts, steps, weight.codes_LNJ.shape[1]))
    tiles, tile_rows = pl.cdiv(x_MK.shape[0], EIGHT), 2 if x_MK.shape[0] <= 2 else EIGHT
    rows = ((0, tiles * tile_rows - x_MK.shape[0]), (0, groups * GROUP - x_MK.shape[1]))
    x_TRK = jnp.pad(x_MK, rows).reshape(tiles, tile_rows, groups * GROUP)
    task = _Task(instructions, groups, steps, parts, weight.codes_LNJ.shape[1])
    sums_PTNR = task.run(x_TRK, weight)
    y_TRN = jnp.sum(sums_PTNR, axis=0).swapaxes(1, 2)
    return y_TRN.reshape(tiles * EIGHT, -1)[: x_MK.shape[0]].astype(x_MK.dtype)


def _worth(parts: int, steps: int, columns: int) -> bool:
    """Whether parts of K are equal, and without as many there are too few blocks."""
    return steps % parts == 0 and columns // BLOCK * parts // 2 < ENOUGH_BLOCKS


def _at_least_a_step(weight: Operands) -> Operands:
    """A weight with at most 384 columns, whose rows are shorter than a step, filled up: the one copy that is made."""
    missing = STEP_BYTES - weight.codes_LNJ.shape[2]
    if missing <= 0:
        return weight
    codes = jnp.pad(lax.dynamic_index_in_dim(weight.codes_LNJ, weight.layer[0]), ((0, 0), (0, 0), (0, missing)))
    scales = jnp.pad(weight.scales, ((0, 2 * WARPS - weight.scales.shape[0]), (0, 0)))
    return weight._replace(codes_LNJ=codes, layer=jnp.zeros_like(weight.layer), scales=scales)


class _Task(NamedTuple):
    """One product: groups of K, steps, parts that K is made in, columns of the result."""

    instructions: "Machine | Interpreted"
    groups: int
    steps: int
    parts: int
    columns: int

    def run(self, x_TRK: jax.Array, weight: Operands) -> Float[Array, "parts T N 8"]:
        """Sums of every part of K."""
        tiles = x_TRK.shape[0]
        words = jnp.asarray(fragments.constant_words(weight.table, x_TRK.dtype))
        return plgpu.kernel(
            self.kernel,
            out_type=jax.ShapeDtypeStruct((self.parts, tiles, self.columns, EIGHT), jnp.float32),
            grid=(self.columns // BLOCK, self.parts),
            grid_names=("block", "part"),
            scratch_types=[plgpu.SMEM((tiles, WARPS * BLOCK, EIGHT), jnp.float32)],
            **self.instructions.options,
        )(x_TRK, weight.codes_LNJ, weight.layer, weight.scales, words)

    def kernel(self, x_g, codes_g, layer_g, scales_g, words_g, out_g, sums_s):
        """32 columns of the result, of one part of K."""
        do, part, tiles = self.instructions, lax.axis_index("part"), range(x_g.shape[0])
        column = pl.multiple_of(BLOCK * lax.axis_index("block"), BLOCK)
        load = functools.partial(self.load, x_g, codes_g.at[layer_g[0]], scales_g, column)
        words = do.constants(words_g)
        steps = self.steps // self.parts

        def step(i, carry):
            sums, (x, codes, scales) = carry
            later = load(steps * part + jnp.minimum(i + 1, steps - 1))
            return do.dot(sums, x, codes, scales, words), later

        sums, _ = lax.fori_loop(0, steps, step, ([do.zeros() for _ in tiles], load(steps * part)))
        for tile in tiles:
            sums_s[tile] = sums[tile]
        plgpu.commit_smem()
        for tile in tiles:
            of_warps = [do.stored(sums_s.at[tile, pl.ds(BLOCK * warp, BLOCK)]) for warp in range(WARPS)]
            out_g[part, tile, pl.ds(column, BLOCK)] = sum(of_warps[1:], of_warps[0])

    def load(self, x_g, codes_g, scales_g, column, step):
        """(rows of x, codes, scales) of a step; the last is moved to where K ends, what it repeats gets scales 0."""
        do = self.instructions
        group = jnp.minimum(WARPS * step, self.groups - WARPS)
        columns = pl.ds(pl.multiple_of(GROUP * group, GROUP), WARPS * GROUP)
        x = [do.rows(x_g.at[tile, :, columns]) for tile in range(x_g.shape[0])]
        codes = do.codes(codes_g.at[pl.ds(column, BLOCK), pl.ds(pl.multiple_of(64 * group, 64), STEP_BYTES)])
        scales = do.scales(scales_g.at[pl.ds(2 * group, 2 * WARPS), pl.ds(column, BLOCK)])
        if self.groups % WARPS:
            scales = jnp.where(do.runs() >= 2 * (WARPS * step - group), scales, jnp.zeros_like(scales))
        return x, codes, scales


class Machine:
    """What the kernel does on a card."""

    options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, dtype: Any, table: np.ndarray) -> None:
        self.dtype, self.table = jnp.dtype(dtype), table

    def _load(self, source, layout) -> jax.Array:
        return plgpu.load(source, layout=fragments.tiled(layout), optimized=False)

    def rows(self, source) -> jax.Array:
        """[8 or 2, 512] values of x."""
        return self._load(source, ROWS if source.shape[0] == EIGHT else TWO_ROWS)

    def codes(self, source) -> jax.Array:
        """[32, 256] bytes."""
        return self._load(source, CODES)

    def scales(self, source) -> jax.Array:
        """[8, 32] constants of runs."""
        return self._load(source, SCALES)

    def runs(self) -> jax.Array:
        """[8, 32], the number of each run."""
        return plgpu.broadcasted_iota(jnp.int32, (2 * WARPS, BLOCK), 0, layout=fragments.tiled(SCALES))

    def constants(self, words_g) -> list[jax.Array]:
        """The look-up's constants, in registers."""
        return [plgpu.load(words_g.at[i], layout=fragments.THREADS, optimized=False) for i in range(words_g.shape[0])]

    def zeros(self) -> jax.Array:
        """Sums of four warps to begin with."""
        return plgpu.layout_cast(jnp.zeros((WARPS * BLOCK, EIGHT), jnp.float32), fragments.tiled(SUMS))

    def stored(self, source) -> jax.Array:
        """A warp's sums [32, 8] as a warpgroup reads them."""
        return plgpu.load(source, layout=plgpu.Layout.WG_STRIDED((BLOCK, EIGHT), 2), optimized=False)

    def dot(self, sums, x, codes, scales, words) -> list[jax.Array]:
        """Of each warp w, row n and row m of x: sums + sum_r scales[2 w + r, n] (table[codes of run r] . x)."""
        of_rows = fragments.tiled(ROWS if x[0].shape[0] == EIGHT else TWO_ROWS)
        of_codes, of_scales = fragments.tiled(CODES), fragments.tiled(SCALES)
        types = ([SUMS_LAYOUT] * len(x), [of_rows] * len(x), of_codes, of_scales, [fragments.THREADS] * len(words))
        result = [plgpu.ShapeDtypeStruct(one.shape, jnp.dtype(jnp.float32), layout=SUMS_LAYOUT) for one in sums]
        emit = functools.partial(_emit_dot, self.table, self.dtype)
        return plgpu.inline_mgpu(arg_types=types, return_type=result)(emit)(list(sums), list(x), codes, scales, words)


SUMS_LAYOUT = fragments.tiled(SUMS)


class Interpreted:
    """The same in operations that Pallas' interpreter knows."""

    def __init__(self, dtype: Any, table: np.ndarray, params: plgpu.InterpretGPUParams) -> None:
        self.dtype, self.table = jnp.dtype(dtype), table
        self.options: dict[str, Any] = {"interpret": params}

    def _load(self, source) -> jax.Array:
        return source[...]

    rows = codes = scales = stored = _load

    def runs(self) -> jax.Array:
        """As Machine.runs."""
        return lax.broadcasted_iota(jnp.int32, (2 * WARPS, BLOCK), 0)

    def constants(self, words_g) -> None:
        """The select tree has its own."""

    def zeros(self) -> jax.Array:
        """As Machine.zeros."""
        return jnp.zeros((WARPS * BLOCK, EIGHT), jnp.float32)

    def dot(self, sums, x, codes, scales, words) -> list[jax.Array]:
        """As Machine.dot."""
        bytes_of_warps = jnp.concatenate(jnp.split(codes, WARPS, axis=1))
        pair = select_pair(bytes_of_warps, WARPS * BLOCK, None, self.table, self.dtype)
        weights_WrNC = jnp.stack([values.reshape(WARPS, BLOCK, 64) for values in pair], axis=1)
        factors_WrN = scales.reshape(WARPS, 2, BLOCK).astype(jnp.float32)
        return [one + self._dot(weights_WrNC, factors_WrN, tile) for one, tile in zip(sums, x, strict=True)]

    def _dot(self, weights_WrNC, factors_WrN, x):
        x_MWrC = jnp.tile(x, (EIGHT // x.shape[0], 1)).reshape(EIGHT, WARPS, 2, 64)
        runs = jnp.einsum("wrnc,mwrc->wrnm", weights_WrNC, x_MWrC, preferred_element_type=jnp.float32)
        return jnp.sum(runs * factors_WrN[..., None], axis=1).reshape(WARPS * BLOCK, EIGHT)


class Alu(NamedTuple):
    """What `dots` does with registers.

    Fields:
      look_up: (16 packed bytes, s) -> of bytes 4 s to 4 s + 3 the values of nibbles low 0, 1; high 0, 1; low 2, 3; high.
      values: (16 values, s) -> values 4 s, 4 s + 1; 4 s + 2, 4 s + 3.
      multiply: mma.sync: (four registers, two registers, four sums or None) -> four sums.
      add: (two sums, scales of four rows, q, two sums) -> the first plus scale q times the second.
    """

    look_up: Any
    values: Any
    multiply: Any
    add: Any


def dots(
    sums: list[np.ndarray], x: list[np.ndarray], codes: np.ndarray, scales: np.ndarray, alu: Alu
) -> list[np.ndarray]:
    """The registers of Machine.dot: sums (q) and x (r) of each tile of x, codes (q), scales (r)."""
    runs = np.full((len(x), 2, 2, 4), None, object)  # tile of x, run, pair of rows q: sums of (row, row of x)
    for s, pair in np.ndindex(4, 2):
        first, second = (alu.look_up(codes[2 * pair + e], s) for e in range(2))
        for tile, run in np.ndindex(len(x), 2):
            weights = first[run], second[run], first[2 + run], second[2 + run]
            runs[tile, run, pair] = alu.multiply(weights, alu.values(x[tile][run], s), runs[tile, run, pair])
    for tile, run, q in np.ndindex(len(x), 2, 4):
        found = runs[tile, run, q // 2, 2 * (q % 2) : 2 * (q % 2) + 2]
        sums[tile][q] = alu.add(sums[tile][q], scales[run], q, found)
    return sums


def _emit_dot(table, dtype, ctx, sums, x, codes, scales, words):
    alu = _machine(table, dtype, [word.registers.item() for word in words])
    found = dots(
        [one.registers.reshape(4).copy() for one in sums],
        [one.registers.reshape(2) for one in x],
        codes.registers.reshape(4),
        scales.registers.reshape(2),
        alu,
    )
    return [fragments.fragmented(one, SUMS_LAYOUT, (WARPS * BLOCK, EIGHT)) for one in found]


def _machine(table: np.ndarray, dtype: Any, constants: list[Any]) -> Alu:
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    ptx = fragments.look_up_word_ptx(table, dtype)
    kind = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]
    multiply_ptx = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )

    def word(register, at, count):
        return fragments.value(mgpu.utils.bitcast(register, ir.VectorType.get((count,), i32)), at)

    def multiply(weights, values, sums):
        start = [mgpu.utils.c(0.0, f32)] * 4 if sums[0] is None else list(sums)
        return fragments.assembly(multiply_ptx, f32, 4, [*weights, *values], start)

    def add(sums, scales, q, found):
        scale = arith.extf(f32, fragments.value(scales, q))
        new = [
            fragments.assembly("fma.rn.f32 $0, $1, $2, $3;", f32, 1, [], [scale, found[v], fragments.value(sums, v)])[0]
            for v in range(2)
        ]
        return vector.from_elements(ir.VectorType.get((2,), f32), new)

    return Alu(
        look_up=lambda register, s: fragments.assembly(ptx, i32, 4, [word(register, s, 4), *constants], []),
        values=lambda register, s: [word(register, 2 * s + half, 8) for half in range(2)],
        multiply=multiply,
        add=add,
    )
