"""What kernels are made of below Pallas: registers of arrays, inline PTX, and the look-ups of packed codes in it.

The look-ups are those of pallas_kernels.nf4_matmul.mosaic.decode, for kernels that have them in their innermost loop:
half of their constants are operands, and a word of eight codes shares its masks.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import TiledLayout
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from pallas_kernels.nf4_matmul.mosaic.decode import table_words

# One word for each thread, so that the compiler keeps it in a register of its own: see `constant_words`.
THREADS = plgpu.Layout.WG_STRIDED((128,), 1)

_LOOK_UP = """ prmt.b32 a, {{0}}, {1}, s; prmt.b32 b, {{1}}, {3}, s; prmt.b32 p, a, b, m;
 prmt.b32 a, {{2}}, {5}, s; prmt.b32 b, {{3}}, {7}, s; prmt.b32 q, a, b, m;
 prmt.b32 {{4}}, p, q, 0x6240; prmt.b32 {{5}}, p, q, 0x7351;"""
_SPLIT = " and.b32 s, {0}, 0x77777777; shr.u32 m, {0}, 1; and.b32 m, m, {1}; or.b32 m, m, 0x32103210;"
_FOUR_MERGES = 0x44444444  # of each nibble the bit that a merge selects by, moved one down


def look_up_ptx(table: np.ndarray, dtype: Any) -> str:
    """decode_ptx, with half of its constants as operands: $2 bytes, $3 to $7 constant_words -> $0, $1."""
    look_up = _LOOK_UP.format(*_hexadecimal(table, dtype))
    return "\n".join(
        ["{ .reg .b32 s,m,a,b,p,q;", _SPLIT.format("$2", "$7"), look_up.format("$3", "$4", "$5", "$6", "$0", "$1"), "}"]
    )


def look_up_across_ptx(table: np.ndarray, dtype: Any) -> str:
    """$4 and $5 of two bytes each, $6 to $10 constant_words -> of the first bytes $0, $1, of the second $2, $3."""
    together = "{ .reg .b32 x; prmt.b32 x, $4, $5, 0x5140;\n"
    return together + _look_up_eight(table, dtype, "x", ("$6", "$7", "$8", "$9"), "$10") + "\n}"


def _look_up_eight(table: np.ndarray, dtype: Any, word: str, words: Sequence[str], merges: str) -> str:
    look_up = _LOOK_UP.format(*_hexadecimal(table, dtype))
    return "\n".join(
        [
            "{ .reg .b32 s,m,a,b,p,q;",
            _SPLIT.format(word, merges),
            look_up.format(*words, "$0", "$1"),
            " shr.u32 s, s, 16; shr.u32 m, m, 16;",
            look_up.format(*words, "$2", "$3"),
            "}",
        ]
    )


def look_up_word_ptx(table: np.ndarray, dtype: Any) -> str:
    """$4 of four bytes, $5 to $9 constant_words -> of the low nibbles of bytes 0, 1 $0, the high $1; of 2, 3 $2, $3."""
    return _look_up_eight(table, dtype, "$4", ("$5", "$6", "$7", "$8"), "$9")


def constant_words(table: np.ndarray, dtype: Any) -> np.ndarray:
    """i32 [5, 128]: the constants of a look-up that are read from memory, once for each thread.

    An instruction holds one constant at most. Those of every second operand would be copied to a register before each
    use, wherever the compiler knows them: one instruction in ten.
    """
    words = [*table_words(table, dtype)[::2], _FOUR_MERGES]
    return np.repeat(np.array(words, np.uint32).view(np.int32)[:, None], 128, axis=1)


def _hexadecimal(table: np.ndarray, dtype: Any) -> list[str]:
    return [f"0x{word:08x}" for word in table_words(table, dtype)]


def constants(words_g: Any) -> list[jax.Array]:
    """constant_words in device memory -> in registers."""
    return [plgpu.load(words_g.at[i], layout=THREADS, optimized=False) for i in range(words_g.shape[0])]


def tiled(layout: TiledLayout) -> Any:
    """A layout as Pallas takes it."""
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def fragmented(registers: np.ndarray, layout: Any, shape: tuple[int, ...]) -> mgpu.FragmentedArray:
    """An array of registers in the order that its layout has them."""
    layout = layout.to_mgpu()
    return mgpu.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None
    )


def value(register: Any, i: int) -> Any:
    """Element i of a register that holds several."""
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def assembly(ptx: str, result: Any, outputs: int, words: Sequence[Any], floats: Sequence[Any] = ()) -> list[Any]:
    """The outputs of inline PTX, all of one type, i32 or f32; its operands are words, then f32s."""
    constraint = "=r" if isinstance(result, ir.IntegerType) else "=f"
    constraints = [constraint] * outputs + ["r"] * len(words) + ["f"] * len(floats)
    of_all = result if outputs == 1 else ir.Type.parse(f"!llvm.struct<({','.join([str(result)] * outputs)})>")
    found = llvm.inline_asm(of_all, [*words, *floats], ptx, ",".join(constraints))
    return [found] if outputs == 1 else [llvm.extractvalue(result, found, [at]) for at in range(outputs)]
