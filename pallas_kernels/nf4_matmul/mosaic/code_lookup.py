"""Decodes packed codes to table values inside a kernel, two bytes (four codes) in 11 instructions.

PRMT picks four bytes out of eight by the low three bits of each nibble of a selector. A table of 16 16-bit values is
eight 32-bit words: four of low bytes, four of high bytes. Two PRMTs look up four codes in the lower and the upper half
of the low bytes, and a third selects between them by bit 3 of each code. The high bytes take three more. Two last PRMTs
join low and high bytes. Any table of 16 values costs the same.

Dimension key: R rows, J = 64 bytes of a row.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mosaic.registers import MosaicValue

RUN = 64  # bytes of a row that are decoded together; each has one code of each of two runs of 64 columns

# $2: two packed bytes, so four codes. $0: the values of the two low nibbles, $1: of the two high ones, in order.
# lop3's table 0xea is (a & b) | c, which the assembler alone would make two instructions.
_PTX = """{{ .reg .b32 s,m,a,b,p,q;
 and.b32 s, $2, 0x7777; shr.u32 m, $2, 1; lop3.b32 m, m, 0x4444, 0x3210, 0xea;
 prmt.b32 a, {0}, {1}, s; prmt.b32 b, {2}, {3}, s; prmt.b32 p, a, b, m;
 prmt.b32 a, {4}, {5}, s; prmt.b32 b, {6}, {7}, s; prmt.b32 q, a, b, m;
 prmt.b32 $0, p, q, 0x6240; prmt.b32 $1, p, q, 0x7351; }}"""


def table_words(table: np.ndarray, dtype: DTypeLike) -> list[int]:
    """Returns the table in a 16-bit dtype as 32-bit words: four of the values' low bytes, then four of high bytes."""
    bits = table.astype(jnp.dtype(dtype)).view(np.uint16)
    lows_and_highs = np.concatenate([bits & 255, bits >> 8]).astype(np.uint8)
    return lows_and_highs.view("<u4").tolist()


def decode_ptx(table: np.ndarray, dtype: DTypeLike) -> str:
    """Returns the inline assembly that looks up four codes in a table of 16 values."""
    return _PTX.format(*(f"0x{word:08x}" for word in table_words(table, dtype)))


def decode_pair(
    packed: jax.Array, rows: int, layout: MosaicValue, table: np.ndarray, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Returns (table[byte & 15], table[byte >> 4]) in a 16-bit dtype, inside a Mosaic kernel.

    Args:
      packed: u8 [R, 64] in registers of `layout`, which must place two neighbouring bytes of a row in one register.
      rows: R.
      layout: a plgpu.Layout, also of the results.
      table: f32 [16].
    """
    result = plgpu.ShapeDtypeStruct((rows, RUN), jnp.dtype(dtype), layout=layout)
    look_up = functools.partial(_look_up, decode_ptx(table, dtype), dtype)
    return plgpu.inline_mgpu(arg_types=(layout,), return_type=(result, result))(look_up)(packed)


def select_pair(
    packed: jax.Array, rows: int, layout: MosaicValue, table: np.ndarray, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Computes `decode_pair` by interpretable operations: a tree of 15 selects over the bits of each code."""
    assert packed.shape == (rows, RUN)
    codes = packed.astype(jnp.int32)
    values = table.astype(jnp.dtype(dtype)).astype(np.float32).tolist()
    low, high = (_select(values, nibbles).astype(dtype) for nibbles in (codes & 15, codes >> 4))
    return low, high


def group_factors(scales: Sequence[jax.Array], layout: MosaicValue) -> jax.Array:
    """Returns factors [64, 64] in registers, whose columns in group i of `len(scales)` are scales[i], [64]."""
    result = plgpu.ShapeDtypeStruct((RUN, RUN), scales[0].dtype, layout=layout)
    emit = functools.partial(_factors, layout.to_mgpu())
    return plgpu.inline_mgpu(arg_types=([layout.reduce(1)] * len(scales),), return_type=result)(emit)(list(scales))


def repeated_factors(scales: Sequence[jax.Array], layout: MosaicValue) -> jax.Array:
    """Computes `group_factors` by interpretable operations."""
    return jnp.repeat(jnp.stack(scales, axis=1), RUN // len(scales), axis=1)


def _factors(layout, ctx: MosaicValue, scales: list[mgpu.FragmentedArray]) -> mgpu.FragmentedArray:
    whole = [one.broadcast_in_dim((RUN, RUN), (0,), layout) for one in scales]
    registers = np.empty_like(whole[0].registers)
    for at in np.ndindex(registers.shape):
        registers[at] = whole[at[1] * len(whole) // registers.shape[1]].registers[at]  # at[1]: eight columns
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _look_up(
    ptx: str, dtype: DTypeLike, ctx: MosaicValue, packed: mgpu.FragmentedArray
) -> tuple[mgpu.FragmentedArray, mgpu.FragmentedArray]:
    low, high = np.empty_like(packed.registers), np.empty_like(packed.registers)
    for at in np.ndindex(packed.registers.shape):
        low[at], high[at] = _look_up_register(ptx, dtype, packed.registers[at])
    make = functools.partial(mgpu.FragmentedArray, _layout=packed.layout, _is_signed=None)
    return make(_registers=low), make(_registers=high)


def _look_up_register(ptx: str, dtype: DTypeLike, register: MosaicValue) -> list[MosaicValue]:
    """Decodes one register of two packed bytes to two registers of two values."""
    i32, i16 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(16)
    two_values = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)))
    word = arith.extui(i32, mgpu.utils.bitcast(register, i16))
    words = llvm.inline_asm(ir.Type.parse("!llvm.struct<(i32,i32)>"), [word], ptx, "=r,=r,r")
    return [mgpu.utils.bitcast(llvm.extractvalue(i32, words, [at]), two_values) for at in (0, 1)]


def _select(values: Sequence[float], codes: jax.Array) -> jax.Array:
    level = [jnp.full(codes.shape, value, jnp.float32) for value in values]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        level = [jnp.where(is_set, level[i + 1], level[i]) for i in range(0, len(level), 2)]
    return level[0]
