"""The decoding kernel's registers: which thread has which number, and the products of a step.

A step has two pages of 32 positions. Warp w has positions 8 w to 8 w + 7 of both, and its own running maximum and sums.
Keys and values go from device memory to the registers of mma.sync, each byte once, without shared memory: the order of
a contraction is free, and so is the order of results. Lane 4 g + t has a part of the features of key g, and a part of
those of the values at positions 2 t and 2 t + 1.

Scores are q k^T with heads as the first operand. Their registers hold, after rounding, weights as the second operand of
v^T p^T, so sums are transposed. Codes of 8 bits become 16-bit numbers in registers; their scales multiply scores and
weights, one number per position.

Dimension key: H head_dim, J loads of a row.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_LAYOUT, Replicated, TiledLayout, Tiling
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.attention.pages import PAGE
from pallas_kernels.mosaic.registers import MosaicValue, assembly, value

WARPS, EIGHT = 4, 8
ROWS, COLUMNS = 64, 16  # scores have heads of four warps, and positions of a warp
LOADS = (16, 8, 4, 2)  # bytes

OF_SCORES = WGMMA_LAYOUT  # [64, 16]: registers (page, block of eight heads), each of two positions
OF_POSITIONS = TiledLayout(Tiling(((PAGE,), (EIGHT,), (2,))), (-3,), (Replicated(EIGHT), -2), -1)  # [32] numbers

_KINDS = {"bfloat16": "bf16", "float16": "f16"}  # mma's names
# PTX by dtype: two numbers of two signed bytes of $1.
_FROM_BYTES = {
    # 0x43 above a byte makes 128 + its lower 7 bits, or 256 + these if its sign is set: less 128, or less 256.
    "bfloat16": "{{ .reg .b32 a, b, m; mov.b32 m, 0xbf80bf80; prmt.b32 a, $1, 0x43, {select}; "
    "and.b32 b, a, 0xff80ff80; and.b32 a, a, 0xff7fff7f; fma.rn.bf16x2 $0, b, m, a; }}",
    # 0x64 above a byte with its sign flipped makes 1,024 + 128 + the code.
    "float16": "{{ .reg .b32 a, m; mov.b32 m, 0x64806480; xor.b32 a, $1, 0x80808080; prmt.b32 a, a, 0x64, {select}; "
    "sub.f16x2 $0, a, m; }}",
}
_HALVES = ("0x4140", "0x4342")  # selects bytes 0 and 1, or 2 and 3
_EVEN_AND_ODD = ("0x5410", "0x7632")  # selects the lower, or the upper halves of two words
_FROM_LANE = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"


class Tile(NamedTuple):
    """The queries of a program, which share a key head, and what they multiply with.

    Attributes:
      heads: 8 or 16, as many as the registers hold.
      dtype: of queries and products.
      cache_dtype: of keys and values.
    """

    head_dim: int
    heads: int
    dtype: np.dtype
    cache_dtype: np.dtype

    def vector(self, lanes: int) -> int:
        """Returns the numbers of one load if so many lanes load a row together."""
        widths = (size // self.cache_dtype.itemsize for size in LOADS)
        return next(width for width in widths if self.head_dim % (lanes * width) == 0)


class Layouts(NamedTuple):
    """Layouts of arrays in registers.

    Attributes:
      queries: [heads, H]: registers (block of heads, J), in every warp.
      keys: [32, H]: registers (J), with the features that `queries` has.
      values: [32, H]: registers (J, position 2 t or 2 t + 1).
      sums: [4 H, heads]: registers (block of heads, J, feature of a load), each of two heads.
      part: [H, heads], spread over all threads.
    """

    queries: TiledLayout
    keys: TiledLayout
    values: TiledLayout
    sums: TiledLayout
    part: TiledLayout

    @classmethod
    def of(cls, tile: Tile) -> "Layouts":
        """Returns the layouts of a tile."""
        of_key, of_value = tile.vector(4), tile.vector(EIGHT)
        run, few = EIGHT * of_value, 32 * WARPS // tile.heads
        sizes = dict.fromkeys((WARPS * tile.head_dim, tile.head_dim, run))  # the last two may be equal
        tiles = (*((size, EIGHT) for size in sizes), (of_value, 2))
        return cls(
            TiledLayout(Tiling(((EIGHT, 4 * of_key), (of_key,))), (Replicated(WARPS),), (-3, -2), -1),
            TiledLayout(Tiling(((PAGE, 4 * of_key), (EIGHT, 4 * of_key), (of_key,))), (-5,), (-3, -2), -1),
            TiledLayout(Tiling(((PAGE, run), (EIGHT, run), (2, of_value))), (-6,), (-3, -4), -1),
            TiledLayout(Tiling(tiles), (-2 * len(tiles),), (-4, -3), -1),
            TiledLayout(Tiling(((few, tile.heads), (few // WARPS, tile.heads), (1,))), (-5,), (-3, -2), -1),
        )


class Alu(NamedTuple):
    """The operations on registers that a step uses. A word is two 16-bit numbers.

    Attributes:
      words: a register -> its numbers in words.
      no_word, no_number: zeros.
      multiply: mma.sync: (four words, two words, four sums) -> four sums.
      number: (a register, i) -> its number i.
      pair: two numbers -> a register.
      times: the product of two numbers.
      transposed: (words of an even and of an odd position) -> for each of two features, a word of both positions.
      mask: (-1 or 0 for an even, and for an odd position) -> the bits of a word that are seen.
      hide: (a word, a mask) -> the word without hidden bits.
      of_columns: a number of row g -> those of rows 2 t and 2 t + 1.
    """

    words: Callable[[MosaicValue], Sequence[MosaicValue]]
    no_word: MosaicValue
    no_number: MosaicValue
    multiply: Callable[[Sequence[MosaicValue], Sequence[MosaicValue], Sequence[MosaicValue]], Sequence[MosaicValue]]
    number: Callable[[MosaicValue, int], MosaicValue]
    pair: Callable[[Sequence[MosaicValue]], MosaicValue]
    times: Callable[[MosaicValue, MosaicValue], MosaicValue]
    transposed: Callable[[MosaicValue, MosaicValue], Sequence[MosaicValue]]
    mask: Callable[[MosaicValue, MosaicValue], MosaicValue]
    hide: Callable[[MosaicValue, MosaicValue], MosaicValue]
    of_columns: Callable[[MosaicValue], Sequence[MosaicValue]]


def scores_of(queries: np.ndarray, pages: Sequence[np.ndarray], alu: Alu) -> np.ndarray:
    """Computes q k^T in the registers of `OF_SCORES` from those of `Layouts.queries` and two of `Layouts.keys`."""
    words = [[alu.words(each) for each in row] for row in queries]
    sums: list[Sequence[MosaicValue]] = [[alu.no_number] * 4] * len(pages)
    for at in range(len(pages[0])):
        keys = [alu.words(registers[at]) for registers in pages]
        for first in range(0, len(keys[0]), 2):
            rows = [alu.no_word] * 4
            for block, row in enumerate(words):
                rows[block], rows[2 + block] = row[at][first : first + 2]
            sums = [alu.multiply(rows, key[first : first + 2], one) for key, one in zip(keys, sums, strict=True)]
    found = np.empty((len(pages), 2), object)
    for page, block in np.ndindex(*found.shape):
        found[page, block] = alu.pair(sums[page][2 * block : 2 * block + 2])
    return found


def scaled_scores(scores: np.ndarray, scales: Sequence[MosaicValue]) -> np.ndarray:
    """Multiplies scores or weights by the numbers of their positions."""
    found = np.empty_like(scores)
    for page, block in np.ndindex(*scores.shape):
        found[page, block] = arith.mulf(scores[page, block], scales[page])
    return found


def sums_of(
    sums: np.ndarray, fades: np.ndarray, weights: np.ndarray, seen: np.ndarray, pages: Sequence[np.ndarray], alu: Alu
) -> np.ndarray:
    """Computes fade * sums + v^T weights^T in the registers of `Layouts.sums`.

    Args:
      fades: one register for each block of heads, of one number.
      weights: 16-bit numbers in the registers of `OF_SCORES`.
      seen: -1 for values that are seen, 0 for others, in the same registers.
      pages: registers of `Layouts.values`.
    """
    found, blocks = np.empty_like(sums), range(sums.shape[0])
    factors = [alu.of_columns(alu.number(fades[block], 0)) for block in blocks]
    masks = [alu.mask(*(alu.number(seen[page, 0], n) for n in range(2))) for page in range(2)]
    columns = [[alu.words(weights[page, block])[0] for page in range(2)] for block in blocks]
    for at in range(sums.shape[1]):
        words = [[alu.words(register) for register in page[at]] for page in pages]
        for pair in range(sums.shape[2] // 2):
            rows = [
                alu.hide(word, mask)
                for of_page, mask in zip(words, masks, strict=True)
                for word in alu.transposed(*(of_key[pair] for of_key in of_page))
            ]
            for block in blocks:
                features = sums[block, at, 2 * pair : 2 * pair + 2]
                faded = [alu.times(alu.number(one, n), factors[block][n]) for one in features for n in range(2)]
                new = alu.multiply(rows, columns[block], faded)
                found[block, at, 2 * pair], found[block, at, 2 * pair + 1] = alu.pair(new[:2]), alu.pair(new[2:])
    return found


def from_bytes_ptx(dtype: np.dtype, half: int) -> str:
    """Returns PTX: $1 of four signed bytes -> $0, a word of the lower or of the upper two."""
    return _FROM_BYTES[dtype.name].format(select=_HALVES[half])


def machine(tile: Tile) -> Alu:
    """Returns the operations on a card's registers."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    kind = _KINDS[tile.dtype.name]
    multiply_ptx = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )

    def permute(select, *words):
        return assembly(f"prmt.b32 $0, $1, $2, {select};", i32, 1, words)[0]

    def of_columns(of_row):
        bits = arith.bitcast(i32, of_row)
        first = arith.muli(arith.andi(mgpu.utils.thread_idx(), mgpu.utils.c(3, i32)), mgpu.utils.c(8, i32))
        lanes = [arith.addi(first, mgpu.utils.c(more, i32)) for more in (0, 4)]
        return [arith.bitcast(f32, assembly(_FROM_LANE, i32, 1, [bits, lane])[0]) for lane in lanes]

    return Alu(
        words=lambda register: _words(tile.dtype, register),
        no_word=mgpu.utils.c(0, i32),
        no_number=mgpu.utils.c(0.0, f32),
        multiply=lambda first, second, sums: assembly(multiply_ptx, f32, 4, [*first, *second], sums),
        number=value,
        pair=lambda numbers: vector.from_elements(ir.VectorType.get((2,), f32), list(numbers)),
        times=arith.mulf,
        transposed=lambda *words: [permute(at, *words) for at in _EVEN_AND_ODD],
        mask=lambda *both: permute(_EVEN_AND_ODD[0], *both),
        hide=arith.andi,
        of_columns=of_columns,
    )


def _words(dtype: np.dtype, register: MosaicValue) -> list[MosaicValue]:
    """Returns 16-bit numbers, or codes of 8 bits as 16-bit numbers, in words."""
    i32, held = ir.IntegerType.get_signless(32), ir.VectorType(register.type)
    (count,) = held.shape
    if not isinstance(held.element_type, ir.IntegerType):
        return _split(register, count // 2)
    if count == 2:
        words = [arith.extui(i32, mgpu.utils.bitcast(register, ir.IntegerType.get_signless(16)))]
    else:
        words = _split(register, count // 4)
    halves = range(min(count // 2, 2))
    return [assembly(from_bytes_ptx(dtype, half), i32, 1, [word])[0] for word in words for half in halves]


def _split(register: MosaicValue, count: int) -> list[MosaicValue]:
    """Returns a register as so many words."""
    i32 = ir.IntegerType.get_signless(32)
    if count == 1:
        return [mgpu.utils.bitcast(register, i32)]
    words = mgpu.utils.bitcast(register, ir.VectorType.get((count,), i32))
    return [value(words, at) for at in range(count)]
