"""Look-ups of packed codes in PTX.

The look-ups are those of pallas_kernels.nf4_matmul.mosaic.code_lookup, for kernels that run them in the innermost loop:
half of the constants are operands, and a word of eight codes shares its masks.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.mosaic.registers import MosaicValue
from pallas_kernels.nf4_matmul.mosaic.code_lookup import table_words

# One word per thread, so that the compiler keeps it in a register: see `constant_words`.
THREADS = plgpu.Layout.WG_STRIDED((128,), 1)

_LOOK_UP = """ prmt.b32 a, {{0}}, {1}, s; prmt.b32 b, {{1}}, {3}, s; prmt.b32 p, a, b, m;
 prmt.b32 a, {{2}}, {5}, s; prmt.b32 b, {{3}}, {7}, s; prmt.b32 q, a, b, m;
 prmt.b32 {{4}}, p, q, 0x6240; prmt.b32 {{5}}, p, q, 0x7351;"""
_SPLIT = " and.b32 s, {0}, 0x77777777; shr.u32 m, {0}, 1; and.b32 m, m, {1}; or.b32 m, m, 0x32103210;"
_FOUR_MERGES = 0x44444444  # in each nibble, the bit by which a merge selects, shifted down by one


def look_up_ptx(table: np.ndarray, dtype: DTypeLike) -> str:
    """Returns decode_ptx with half of its constants as operands: $2 bytes, $3 to $7 constant_words -> $0, $1."""
    look_up = _LOOK_UP.format(*_hexadecimal(table, dtype))
    return "\n".join(
        ["{ .reg .b32 s,m,a,b,p,q;", _SPLIT.format("$2", "$7"), look_up.format("$3", "$4", "$5", "$6", "$0", "$1"), "}"]
    )


def look_up_across_ptx(table: np.ndarray, dtype: DTypeLike) -> str:
    """Returns PTX: $4, $5 of two bytes each, $6 to $10 constant_words -> $0, $1 of first bytes, $2, $3 of second."""
    together = "{ .reg .b32 x; prmt.b32 x, $4, $5, 0x5140;\n"
    return together + _look_up_eight(table, dtype, "x", ("$6", "$7", "$8", "$9"), "$10") + "\n}"


def _look_up_eight(table: np.ndarray, dtype: DTypeLike, word: str, words: Sequence[str], merges: str) -> str:
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


def look_up_word_ptx(table: np.ndarray, dtype: DTypeLike) -> str:
    """PTX for $4 of four bytes, $5 to $9 constant_words -> nibbles: $0 low, $1 high of bytes 0, 1; $2, $3 of 2, 3."""
    return _look_up_eight(table, dtype, "$4", ("$5", "$6", "$7", "$8"), "$9")


def constant_words(table: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Returns i32 [5, 128]: the constants of a look-up that each thread reads from memory once.

    An instruction can contain one constant. If the compiler knew these, it would copy every second operand to a
    register before each use: one instruction in ten.
    """
    words = [*table_words(table, dtype)[::2], _FOUR_MERGES]
    return np.repeat(np.array(words, np.uint32).view(np.int32)[:, None], 128, axis=1)


def _hexadecimal(table: np.ndarray, dtype: DTypeLike) -> list[str]:
    return [f"0x{word:08x}" for word in table_words(table, dtype)]


def constants(words_g: MosaicValue) -> list[jax.Array]:
    """Loads constant_words from device memory into registers."""
    return [plgpu.load(words_g.at[i], layout=THREADS, optimized=False) for i in range(words_g.shape[0])]
