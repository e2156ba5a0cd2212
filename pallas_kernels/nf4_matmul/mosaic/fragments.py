"""Register fragments of mma.sync (m16n8k16): arranges packed bytes as decoded operands, and sums as results.

A warpgroup of four warps w computes a tile [M rows, 128 columns]. Each warp computes 32 of the columns for all rows, so
no two warps decode the same weight. The decoded weights are the second operand: in one register, a thread (g, t) =
(lane / 4, lane % 4) holds elements 2t and 2t + 1 of the contraction. The order of a tile's columns in the operand is
free. This order lets a thread store four consecutive columns of a result at once:

    operand's column 64 c + 32 i + 8 w + g   is the tile's column 64 c + 16 w + 2 g + i        (c, i in 0..1)

In the layout `split_k`, two consecutive bytes of a row are neighbours along K, and the bytes of two consecutive rows
are neighbours along N. So both contractions read the same bytes, without a transpose. Forward (contraction over K), a
register holds two bytes of a row. Backward (over N), it holds one byte of each of two rows, joined by one PRMT per
eight codes.

The functions that take an `Alu` only arrange registers, of any kind: machine values in a kernel, and in tests arrays
over 128 threads, which prove the arrangement against the equations. Dimension key: J = 64 bytes of a row, R = 64
rows of packed weights, both in steps s of 16, halves h of 8.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import Replicated, TiledLayout, Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.dispatch import Direction
from pallas_kernels.mosaic.registers import MosaicValue, assembly, fragmented, tiled, value
from pallas_kernels.nf4_matmul.mosaic import inline_ptx
from pallas_kernels.nf4_matmul.mosaic.inline_ptx import THREADS

RUN = 64
TILE_COLUMNS = 2 * RUN
STEPS, HALVES = RUN // 16, 2

type Register = MosaicValue  # in tests, an array over 128 threads

# [R, J]: row 16 w + 2 g + i, byte 16 s + 8 h + 2 t + e; registers (s, h, i), each of two bytes e.
PACKED_FORWARD = TiledLayout(Tiling(((64, 16), (16, 8), (2, 2))), (-6,), (-4, -3), -1)
# [R, J]: row 16 s + 8 h + 2 t + e, byte 16 w + 2 g + i; registers (s, h, e), each of two bytes i.
PACKED_BACKWARD = TiledLayout(Tiling(((16, 64), (8, 16), (2, 2))), (-5,), (-3, -4), -1)
# Scales of [R] rows: of rows 16 w + 2 g + i, one register of two i; of rows 16 s + 8 h + 2 t + e, registers (s, h).
SCALES_FORWARD = TiledLayout(Tiling(((64,), (16,), (2,))), (-3,), (-2, Replicated(4)), -1)
SCALES_BACKWARD = TiledLayout(Tiling(((16,), (8,), (2,))), (Replicated(4),), (Replicated(8), -2), -1)
PACKED = {"forward": PACKED_FORWARD, "backward": PACKED_BACKWARD}


def scales_backward(groups: int) -> TiledLayout:
    """Returns the layout of scales [groups, R] of the 64 bytes of a row: a warp's 16 bytes are in one group.

    Warp w has the scales of group w groups / 4: of rows 16 s + 8 h + 2 t + e, registers (s, h).
    """
    if groups == STEPS:
        return TiledLayout(Tiling(((groups, 16), (8,), (2,))), (-4,), (Replicated(8), -2), -1)
    warps = (-4, Replicated(STEPS // groups))
    return TiledLayout(Tiling(((groups, 16), (8,), (2,))), warps, (Replicated(8), -2), -1)


# A result [M, J]: row 8 r + g, column 16 w + 4 t + v; registers (r), each of four columns v.
RESULT = TiledLayout(Tiling(((8, 64), (8, 16), (4,))), (-4,), (-3, -2), -1)


class Alu(NamedTuple):
    """The operations on registers that arranging uses.

    Attributes:
      look_up: two packed bytes -> (values of their low nibbles, of their high nibbles), each two values.
      look_up_across: two bytes of one row, two of the next -> the same for the first bytes of both, then the second.
      both: (two values, i) -> value i, twice.
      multiply: two values times two values.
    """

    look_up: Callable[[Register], Sequence[Register]]
    look_up_across: Callable[[Register, Register], Sequence[Register]]
    both: Callable[[Register, int], Register]
    multiply: Callable[[Register, Register], Register]


def operands_forward(
    packed: Sequence[np.ndarray], scales: Sequence[Sequence[Sequence[Register]]], alu: Alu
) -> list[np.ndarray]:
    """Returns operands [64 of the contraction, 128 columns] of low and high nibbles: registers (s, b, h), b = 2 c + i.

    Args:
      packed: for each chunk c of 64 rows, registers (s, h, i).
      scales: for each nibble and chunk, one register per group of the 64 columns.
    """
    operands = [np.empty((STEPS, 2 * len(packed), HALVES), object) for _ in range(2)]
    for chunk, registers in enumerate(packed):
        for i in range(2):
            factors = [[alu.both(group, i) for group in scales[nibble][chunk]] for nibble in range(2)]
            for s, h in np.ndindex(STEPS, HALVES):
                for nibble, values in enumerate(alu.look_up(registers[s, h, i])):
                    factor = factors[nibble][s * len(factors[nibble]) // STEPS]
                    operands[nibble][s, 2 * chunk + i, h] = alu.multiply(values, factor)
    return operands


def operands_backward(
    packed: Sequence[np.ndarray], scales: Sequence[Sequence[np.ndarray]], alu: Alu
) -> list[np.ndarray]:
    """Returns operands [64 rows, 128 columns of the low, then the high nibbles]: registers (s, b, h), b = 2 c + i.

    Args:
      packed: for each chunk of 64 rows, registers (s, h, e).
      scales: for each nibble and chunk, registers (s, h).
    """
    operands = [np.empty((STEPS, 4, HALVES), object) for _ in packed]
    for chunk, registers in enumerate(packed):
        for s, h in np.ndindex(STEPS, HALVES):
            found = alu.look_up_across(registers[s, h, 0], registers[s, h, 1])
            for i, nibble in np.ndindex(2, 2):
                value = alu.multiply(found[2 * i + nibble], scales[nibble][chunk][s, h])
                operands[chunk][s, 2 * nibble + i, h] = value
    return operands


def results(
    accumulator: np.ndarray, pick: Callable[[Register, int], Register], join: Callable[..., Register]
) -> list[np.ndarray]:
    """Arranges an accumulator's registers (m, b, h) of two values as chunks [M, J] in the layout RESULT.

    Args:
      pick: (register, e) -> one value.
      join: four values -> a register.
    """
    chunks = [np.empty((accumulator.shape[0], HALVES), object) for _ in range(accumulator.shape[1] // 2)]
    for m, h in np.ndindex(accumulator.shape[0], HALVES):
        for c, chunk in enumerate(chunks):
            pairs = accumulator[m, 2 * c, h], accumulator[m, 2 * c + 1, h]
            chunk[m, h] = join(*(pick(pairs[i], e) for e in range(2) for i in range(2)))
    return chunks


# The same on machine values, inside a kernel


def of_rows(dtype: DTypeLike) -> MosaicValue:
    """Returns the layout of the first operand, rows that all warps read."""
    return plgpu.Layout.MMA_LHS(dtype, m_warps=1)


def of_weights(dtype: DTypeLike) -> MosaicValue:
    """Returns the layout of the second operand."""
    return plgpu.Layout.MMA_RHS(dtype, m_warps=1)


def of_sums(dtype: DTypeLike) -> MosaicValue:
    """Returns the layout of the accumulator."""
    return plgpu.Layout.MMA_ACC(dtype, m_warps=1)


def decoded(
    direction: Direction,
    codes_s: MosaicValue,
    scales_s: MosaicValue,
    words: Sequence[jax.Array],
    table: np.ndarray,
    dtype: np.dtype,
) -> Sequence[jax.Array]:
    """Decodes the operands [64, 128] of both parts of a round from shared memory: u8 [2, 64, 64], scales [2 G, 128].

    G groups of the 64 columns of a nibble have a scale each.
    """
    load = functools.partial(plgpu.load, optimized=False)
    of_packed = tiled(PACKED[direction])
    packed = [load(codes_s.at[chunk], layout=of_packed) for chunk in range(2)]
    groups = scales_s.shape[0] // 2
    of_scales, places = _scales_of(direction, groups)
    chunks = [pl.ds(RUN * chunk, RUN) for chunk in range(2)]
    scales = [
        [[load(scales_s.at[at, chunk], layout=of_scales) for at in places[nibble]] for chunk in chunks]
        for nibble in range(2)
    ]
    types = ([of_packed] * 2, [[[of_scales] * len(places[0])] * 2] * 2, [THREADS] * len(words))
    result = plgpu.ShapeDtypeStruct((RUN, TILE_COLUMNS), dtype, layout=of_weights(dtype))
    emit = functools.partial(_decode, direction, table, dtype)
    return plgpu.inline_mgpu(arg_types=types, return_type=[result, result])(emit)(packed, scales, list(words))


def _scales_of(direction: Direction, groups: int) -> tuple[MosaicValue, list[list[MosaicValue]]]:
    """Returns the layout in which scales are loaded, and for each nibble the rows of the loads."""
    if direction == "forward" or groups == 1:
        layout = tiled(SCALES_FORWARD if direction == "forward" else SCALES_BACKWARD)
        return layout, [[*range(groups)], [*range(groups, 2 * groups)]]
    return tiled(scales_backward(groups)), [[pl.ds(groups * nibble, groups)] for nibble in range(2)]


def _decode(direction, table, dtype, ctx, packed, scales, words):
    arrange = {"forward": operands_forward, "backward": operands_backward}[direction]
    alu = _machine(table, dtype, [word.registers.item() for word in words])
    chunks = [one.registers.reshape(STEPS, HALVES, 2) for one in packed]
    factors = [[_factors(direction, loads) for loads in row] for row in scales]
    layout, shape = of_weights(dtype), (RUN, TILE_COLUMNS)
    return [fragmented(registers, layout, shape) for registers in arrange(chunks, factors, alu)]


def _factors(direction, loads):
    """Returns the registers of the scales of a nibble and chunk: one per group forward, (s, h) backward."""
    if direction == "forward":
        return [load.registers.item() for load in loads]
    return loads[0].registers.reshape(STEPS, HALVES)


def multiply_add(sums: jax.Array, rows: Sequence[jax.Array], weights: Sequence[jax.Array]) -> jax.Array:
    """Computes sums + sum_p rows[p] @ weights[p] on tensor cores: f32 [M, 128], 16-bit [M, 64] and [64, 128].

    The outer loop is over steps of 16 and the inner one over parts, so operands from one look-up are used soon.
    """
    dtype = rows[0].dtype
    types = (of_sums(dtype), [of_rows(dtype)] * len(rows), [of_weights(dtype)] * len(rows))
    result = plgpu.ShapeDtypeStruct(sums.shape, jnp.dtype(jnp.float32), layout=of_sums(dtype))

    def emit(ctx, sums, rows, weights):
        for step in range(0, RUN, 16):
            for one, other in zip(rows, weights, strict=True):
                sums = mgpu.mma(sums, one[:, step : step + 16], other[step : step + 16, :])
        return sums

    return plgpu.inline_mgpu(arg_types=types, return_type=result)(emit)(sums, list(rows), list(weights))


def in_order(sums: jax.Array) -> list[jax.Array]:
    """Returns the tile's columns in natural order, in two chunks [M, 64]; sums are in 16 bits."""
    rows, columns = sums.shape
    chunk = plgpu.ShapeDtypeStruct((rows, RUN), sums.dtype, layout=tiled(RESULT))

    def emit(ctx, sums):
        registers = sums.registers.reshape(rows // 16, columns // 32, HALVES)
        four = ir.VectorType.get((4,), sums.mlir_dtype)

        def join(*values):
            return vector.from_elements(four, values)

        return [fragmented(one, tiled(RESULT), chunk.shape) for one in results(registers, value, join)]

    return plgpu.inline_mgpu(arg_types=(of_sums(sums.dtype),), return_type=[chunk] * (columns // RUN))(emit)(sums)


def _machine(table: np.ndarray, dtype: DTypeLike, constants: Sequence[Register]) -> Alu:
    two_values = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)))
    of_one, of_two = inline_ptx.look_up_ptx(table, dtype), inline_ptx.look_up_across_ptx(table, dtype)
    i32 = ir.IntegerType.get_signless(32)

    def look_up(ptx, outputs, *packed):
        words = [_two_bytes(register) for register in packed]
        return [mgpu.utils.bitcast(word, two_values) for word in assembly(ptx, i32, outputs, [*words, *constants])]

    return Alu(
        look_up=functools.partial(look_up, of_one, 2),
        look_up_across=functools.partial(look_up, of_two, 4),
        both=lambda register, i: vector.broadcast(two_values, value(register, i)),
        multiply=arith.mulf,
    )


def _two_bytes(register: Register) -> Register:
    i32, i16 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(16)
    return arith.extui(i32, mgpu.utils.bitcast(register, i16))
