"""The instructions of the kernel for few rows and of its interpreted twin, and the layouts of its registers.

There are four warps w of threads (g, t) = (lane / 4, lane % 4). In a step, each warp reads 64 bytes per row: 128
columns of K in two runs r of 64.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import Replicated, TiledLayout, Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.mosaic.registers import MosaicValue, assembly, fragmented, tiled, value
from pallas_kernels.nf4_matmul.mosaic import inline_ptx
from pallas_kernels.nf4_matmul.mosaic.code_lookup import select_pair

WARPS = 4
RUN = 64
GROUP = 2 * RUN  # columns of K whose codes share 64 bytes
STEP_BYTES = WARPS * GROUP // 2
BLOCK = 32  # columns of the result that a block makes
EIGHT = 8  # rows of x in one product

# [32, 256]: row 4 g + q, byte 64 w + 16 t + b; registers (q), each of 16 bytes b.
CODES = TiledLayout(Tiling(((BLOCK, STEP_BYTES), (BLOCK, 64), (4, 16))), (-5,), (-4, -3), -1)
# [8, 512] rows of x: row g, column 128 w + 64 r + 16 t + b; registers (r), each of 16 values b.
ROWS = TiledLayout(Tiling(((EIGHT, WARPS * GROUP), (EIGHT, GROUP), (EIGHT, 64), (16,))), (-6,), (-3, -2), -1)
# Two rows of x, and all threads g read one of them: row g % 2.
TWO_ROWS = TiledLayout(Tiling(((2, WARPS * GROUP), (2, GROUP), (2, 64), (16,))), (-6,), (Replicated(4), -3, -2), -1)
# [8, 32] scales: run 2 w + r, row 4 g + q; registers (r), each of four values q.
SCALES = TiledLayout(Tiling(((2 * WARPS, BLOCK), (2, BLOCK), (4,))), (-5,), (-2, Replicated(4)), -1)
# [8 G, 32] scales of G groups in a run: group G (2 w + r) + t G / 4, row 4 g + q; registers (r), each of four values q.
SCALES_OF_GROUPS = {
    2: TiledLayout(Tiling(((16, BLOCK), (4, BLOCK), (2, 4))), (-6,), (-3, -2, Replicated(2)), -1),
    4: TiledLayout(Tiling(((32, BLOCK), (8, BLOCK), (4, 4))), (-6,), (-3, -2), -1),
}
# [128, 8] sums of warps: 32 w + row 4 g + q, row of x 2 t + v; registers (q), each of two values v.
SUMS = TiledLayout(Tiling(((WARPS * BLOCK, EIGHT), (BLOCK, EIGHT), (4, 2))), (-6,), (-4, -3), -1)
SUMS_LAYOUT = tiled(SUMS)


class Machine:
    """The kernel's instructions on a card."""

    options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, dtype: DTypeLike, table: np.ndarray) -> None:
        self.dtype, self.table = jnp.dtype(dtype), table

    def _load(self, source, layout) -> jax.Array:
        return plgpu.load(source, layout=tiled(layout), optimized=False)

    def rows(self, source) -> jax.Array:
        """Loads [8 or 2, 512] values of x."""
        return self._load(source, ROWS if source.shape[0] == EIGHT else TWO_ROWS)

    def codes(self, source) -> jax.Array:
        """Loads [32, 256] bytes of codes."""
        return self._load(source, CODES)

    def scales(self, source) -> jax.Array:
        """Loads [8 G, 32] scales of the groups of runs."""
        return self._load(source, _of_scales(source.shape[0]))

    def groups(self, count: int) -> jax.Array:
        """Returns [8 G, 32], the number of each group."""
        return plgpu.broadcasted_iota(jnp.int32, (count, BLOCK), 0, layout=tiled(_of_scales(count)))

    def constants(self, words_g) -> list[jax.Array]:
        """Loads the look-up's constants into registers."""
        return inline_ptx.constants(words_g)

    def zeros(self) -> jax.Array:
        """Returns the initial sums of four warps."""
        return plgpu.layout_cast(jnp.zeros((WARPS * BLOCK, EIGHT), jnp.float32), tiled(SUMS))

    def show(self, sums, target) -> None:
        """Writes the sums of all warps to shared memory; then a barrier."""
        plgpu.inline_mgpu(arg_types=(SUMS_LAYOUT, plgpu.RefType()))(_show)(sums, target)

    def stored(self, source) -> jax.Array:
        """Loads a warp's sums [32, 8], spread over the warpgroup."""
        return plgpu.load(source, layout=plgpu.Layout.WG_STRIDED((BLOCK, EIGHT), 2), optimized=False)

    def dot(self, sums, x, codes, scales, words) -> list[jax.Array]:
        """Computes sums + sum_r scales[2 w + r, n] (table[codes of run r] . x) for each warp w, row n, row of x.

        If a run has several groups, each has its scale.
        """
        of_rows = tiled(ROWS if x[0].shape[0] == EIGHT else TWO_ROWS)
        of_codes, of_scales = tiled(CODES), tiled(_of_scales(scales.shape[0]))
        types = ([SUMS_LAYOUT] * len(x), [of_rows] * len(x), of_codes, of_scales, [inline_ptx.THREADS] * len(words))
        result = [plgpu.ShapeDtypeStruct(one.shape, jnp.dtype(jnp.float32), layout=SUMS_LAYOUT) for one in sums]
        emit = functools.partial(_emit_dot, self.table, self.dtype)
        return plgpu.inline_mgpu(arg_types=types, return_type=result)(emit)(list(sums), list(x), codes, scales, words)


class Interpreted:
    """The twin's instructions, which Pallas can interpret."""

    def __init__(self, dtype: DTypeLike, table: np.ndarray, params: plgpu.InterpretGPUParams) -> None:
        self.dtype, self.table = jnp.dtype(dtype), table
        self.options: dict[str, Any] = {"interpret": params}

    def _load(self, source) -> jax.Array:
        return source[...]

    rows = codes = scales = stored = _load

    def groups(self, count: int) -> jax.Array:
        """Returns [8 G, 32], the number of each group."""
        return lax.broadcasted_iota(jnp.int32, (count, BLOCK), 0)

    def constants(self, words_g) -> None:
        """Returns None: the select tree has its own constants."""

    def zeros(self) -> jax.Array:
        """Returns the initial sums of four warps."""
        return jnp.zeros((WARPS * BLOCK, EIGHT), jnp.float32)

    def show(self, sums, target) -> None:
        """Writes the sums of all warps to shared memory."""
        target[...] = sums
        plgpu.commit_smem()

    def dot(self, sums, x, codes, scales, words) -> list[jax.Array]:
        """Returns the sums plus the round's products, for each warp, row of the weight and row of x."""
        bytes_of_warps = jnp.concatenate(jnp.split(codes, WARPS, axis=1))
        pair = select_pair(bytes_of_warps, WARPS * BLOCK, None, self.table, self.dtype)
        weights_WrNC = jnp.stack([values.reshape(WARPS, BLOCK, 64) for values in pair], axis=1)
        factors_WrGN = scales.reshape(WARPS, 2, -1, BLOCK)
        groups = factors_WrGN.shape[2]
        if groups == 1:
            factors_WrN = factors_WrGN[:, :, 0].astype(jnp.float32)
        else:
            weights_WrNC *= jnp.repeat(factors_WrGN.swapaxes(2, 3), 64 // groups, axis=3)
            factors_WrN = jnp.ones((WARPS, 2, BLOCK), jnp.float32)
        return [one + self._dot(weights_WrNC, factors_WrN, tile) for one, tile in zip(sums, x, strict=True)]

    def _dot(self, weights_WrNC, factors_WrN, x):
        x_MWrC = jnp.tile(x, (EIGHT // x.shape[0], 1)).reshape(EIGHT, WARPS, 2, 64)
        runs = jnp.einsum("wrnc,mwrc->wrnm", weights_WrNC, x_MWrC, preferred_element_type=jnp.float32)
        return jnp.sum(runs * factors_WrN[..., None], axis=1).reshape(WARPS * BLOCK, EIGHT)


def _of_scales(rows: int) -> TiledLayout:
    """Returns the layout of scales [rows, 32]."""
    return SCALES if rows == 2 * WARPS else SCALES_OF_GROUPS[rows // (2 * WARPS)]


class Alu(NamedTuple):
    """The operations on registers that `dots` and `dots_of_groups` use.

    Attributes:
      look_up: (16 packed bytes, s) -> the values of bytes 4 s to 4 s + 3 in four registers: low nibbles of 0, 1; high
        of 0, 1; low of 2, 3; high of 2, 3.
      values: (16 values, s) -> values 4 s, 4 s + 1; 4 s + 2, 4 s + 3.
      multiply: mma.sync: (four registers, two registers, four sums or None) -> four sums.
      add: (two sums, scales of four rows, q, two sums) -> the first plus scale q times the second.
      scale: (two values, scales of four rows, q) -> the values times scale q.
      split, join: two sums in a register -> the sums, and back.
    """

    look_up: Callable[[MosaicValue, int], Sequence[MosaicValue]]
    values: Callable[[MosaicValue, int], Sequence[MosaicValue]]
    multiply: Callable[[Sequence[MosaicValue], Sequence[MosaicValue], np.ndarray], Sequence[MosaicValue]]
    add: Callable[[MosaicValue, MosaicValue, int, np.ndarray], MosaicValue]
    scale: Callable[[MosaicValue, MosaicValue, int], MosaicValue]
    split: Callable[[MosaicValue], Sequence[MosaicValue]]
    join: Callable[[Sequence[MosaicValue]], MosaicValue]


def dots(
    sums: list[np.ndarray], x: list[np.ndarray], codes: np.ndarray, scales: np.ndarray, alu: Alu
) -> list[np.ndarray]:
    """Computes Machine.dot on registers: sums (q) and x (r) of each tile of x, codes (q), scales (r)."""
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


def dots_of_groups(
    sums: list[np.ndarray], x: list[np.ndarray], codes: np.ndarray, scales: np.ndarray, alu: Alu
) -> list[np.ndarray]:
    """Computes `dots` where threads t of a row hold different groups: weights are scaled before the product adds them.

    So products add to the sums themselves.
    """
    for s, pair in np.ndindex(4, 2):
        found = [alu.look_up(codes[2 * pair + e], s) for e in range(2)]
        for run in range(2):
            places = (run, 0), (run, 1), (2 + run, 0), (2 + run, 1)  # (values of a look-up, row of the pair)
            weights = [alu.scale(found[e][at], scales[run], 2 * pair + e) for at, e in places]
            for one, x_of in zip(sums, x, strict=True):
                start = [value for e in range(2) for value in alu.split(one[2 * pair + e])]
                total = alu.multiply(weights, alu.values(x_of[run], s), np.array(start, object))
                for e in range(2):
                    one[2 * pair + e] = alu.join(total[2 * e : 2 * e + 2])
    return sums


def _show(ctx, sums, target) -> None:
    sums.store_untiled(target, optimized=False)
    mgpu.utils.warpgroup_barrier()


def _emit_dot(table, dtype, ctx, sums, x, codes, scales, words):
    alu = _machine(table, dtype, [word.registers.item() for word in words])
    found = (dots if scales.shape[0] == 2 * WARPS else dots_of_groups)(
        [one.registers.reshape(4).copy() for one in sums],
        [one.registers.reshape(2) for one in x],
        codes.registers.reshape(4),
        scales.registers.reshape(2),
        alu,
    )
    return [fragmented(one, SUMS_LAYOUT, (WARPS * BLOCK, EIGHT)) for one in found]


def _machine(table: np.ndarray, dtype: DTypeLike, constants: Sequence[MosaicValue]) -> Alu:
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    ptx = inline_ptx.look_up_word_ptx(table, dtype)
    kind = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]
    multiply_ptx = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )

    def word(register, at, count):
        return value(mgpu.utils.bitcast(register, ir.VectorType.get((count,), i32)), at)

    def multiply(weights, values, sums):
        start = [mgpu.utils.c(0.0, f32)] * 4 if sums[0] is None else list(sums)
        return assembly(multiply_ptx, f32, 4, [*weights, *values], start)

    def add(sums, scales, q, found):
        scale = arith.extf(f32, value(scales, q))
        new = [
            assembly("fma.rn.f32 $0, $1, $2, $3;", f32, 1, [], [scale, found[v], value(sums, v)])[0] for v in range(2)
        ]
        return vector.from_elements(ir.VectorType.get((2,), f32), new)

    two_values, two_sums = (
        ir.VectorType.get((2,), kind) for kind in (mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)), f32)
    )

    def scale(values, scales, q):
        factor = vector.broadcast(two_values, value(scales, q))
        return mgpu.utils.bitcast(arith.mulf(mgpu.utils.bitcast(values, two_values), factor), i32)

    return Alu(
        look_up=lambda register, s: assembly(ptx, i32, 4, [word(register, s, 4), *constants], []),
        values=lambda register, s: [word(register, 2 * s + half, 8) for half in range(2)],
        multiply=multiply,
        add=add,
        scale=scale,
        split=lambda sums: [value(sums, v) for v in range(2)],
        join=lambda sums: vector.from_elements(two_sums, list(sums)),
    )
