"""Loads, products and stores of the decoding kernel, for NVIDIA cards and for the interpreted twin.

A step has two pages of 32 positions. Warp w has positions 8 w to 8 w + 7 of both, and its own running maximum and sums,
so warps share nothing within the loop. Keys and values go from device memory to the registers of mma.sync, each byte
once, without shared memory: the order of a contraction is free, and so is the order of results in registers. With
lane = 4 g + t, a thread has 4 of the features of key g, and values of positions 2 t and 2 t + 1.

Scores [64, 16]: row 16 w + head, column 8 page + position of the warp. They are q k^T with heads as the first operand,
whose registers hold, after rounding, weights as the second operand of v^T p^T. So sums [4 head_dim, heads] are
transposed: row head_dim w + feature. Codes of 8 bits become 16-bit integers in registers, and their scales multiply
scores and weights: one number per position.

Dimension key: H head_dim; _g device memory, _s shared memory.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import Replicated, TiledLayout, Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.mosaic.registers import MosaicValue, assembly, fragmented, tiled, value

WARPS, EIGHT = 4, 8
PAGE = 32  # positions
ROWS, COLUMNS = 64, 16  # of a tile of scores
WIDEST_LOAD = 16  # bytes
_SCORES = plgpu.Layout.WGMMA
_PER_POSITION = TiledLayout(Tiling(((PAGE,), (EIGHT,), (2,))), (-3,), (Replicated(EIGHT), -2), -1)
# By dtype of products: mma's name of it; PTX that makes two numbers of the lower or upper bytes of $1, which is `flip`ped.
_KINDS = {"bfloat16": "bf16", "float16": "f16"}
_FLIPS = {"bfloat16": 0, "float16": 0x80808080}
_FROM_BYTES = {
    # 0x43 before a byte makes 128 + its lower 7 bits, or 256 + twice these: subtract 128 or 256.
    "bfloat16": "{{ .reg .b32 a, b, m; prmt.b32 a, $1, 0x43, {select}; and.b32 b, a, 0xff80ff80; and.b32 a, a, "
    "0xff7fff7f; mov.b32 m, 0xbf80bf80; fma.rn.bf16x2 $0, b, m, a; }}",
    # 0x64 before a byte makes 1,024 + the byte, which is the code + 128.
    "float16": "{{ .reg .b32 a, m; prmt.b32 a, $1, 0x64, {select}; mov.b32 m, 0x64806480; sub.f16x2 $0, a, m; }}",
}
_SELECT = ("0x4140", "0x4342")


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
        widths = (size // self.cache_dtype.itemsize for size in (WIDEST_LOAD, 8, 4, 2))
        return next(width for width in widths if self.head_dim % (lanes * width) == 0)


class Machine:
    """The kernel's instructions on a card."""

    def __init__(self, tile: Tile) -> None:
        self.tile = tile
        params = plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True, reduction_scratch_bytes=0)
        self.options: dict[str, MosaicValue] = {"compiler_params": params}
        of_key, of_value = tile.vector(4), tile.vector(EIGHT)
        self.of_queries = TiledLayout(
            Tiling(((EIGHT, 4 * of_key), (of_key,))), (Replicated(WARPS),), (-3, -2), -1
        )
        self.of_keys = TiledLayout(Tiling(((PAGE, 4 * of_key), (EIGHT, 4 * of_key), (of_key,))), (-5,), (-3, -2), -1)
        run = EIGHT * of_value
        self.of_values = TiledLayout(Tiling(((PAGE, run), (EIGHT, run), (2, of_value))), (-6,), (-3, -4), -1)
        rows = dict.fromkeys((WARPS * tile.head_dim, tile.head_dim, run))  # the last two may be equal
        tiles = (*((size, EIGHT) for size in rows), (of_value, 2))
        self.of_sums = TiledLayout(Tiling(tiles), (-2 * len(tiles),), (-4, -3), -1)
        few = 128 // tile.heads
        self.of_part = TiledLayout(
            Tiling(((few, tile.heads), (few // WARPS, tile.heads), (1,))), (-5,), (-3, -2), -1
        )

    def _load(self, source_g, layout: TiledLayout) -> jax.Array:
        return plgpu.load(source_g, layout=tiled(layout), optimized=False)

    def queries(self, source_g: MosaicValue) -> jax.Array:
        """Loads queries [heads, H]; every warp has all."""
        return self._load(source_g, self.of_queries)

    def keys(self, source_g: MosaicValue) -> jax.Array:
        """Loads a page of keys [32, H]."""
        return self._load(source_g, self.of_keys)

    def values(self, source_g: MosaicValue) -> jax.Array:
        """Loads a page of values [32, H]."""
        return self._load(source_g, self.of_values)

    def scales(self, source_g: MosaicValue) -> jax.Array:
        """Loads a page of scales [32]."""
        return self._load(source_g, _PER_POSITION)

    def indices(self, axis: int) -> jax.Array:
        """Returns the index of each score along an axis."""
        return plgpu.broadcasted_iota(jnp.int32, (ROWS, COLUMNS), axis, layout=_SCORES)

    def full_rows(self, number: float) -> jax.Array:
        """Returns [64], one number for each row of scores."""
        return plgpu.layout_cast(jnp.full((ROWS,), number, jnp.float32), _SCORES.reduce(1))

    def zeros(self) -> jax.Array:
        """Returns sums [4 H, heads] of zeros."""
        return plgpu.layout_cast(jnp.zeros((WARPS * self.tile.head_dim, self.tile.heads)), tiled(self.of_sums))

    def scores(self, q: jax.Array, pages: Sequence[jax.Array]) -> jax.Array:
        """Returns q k^T [64, 16] for two pages of keys."""
        types = (tiled(self.of_queries), [tiled(self.of_keys)] * 2)
        result = plgpu.ShapeDtypeStruct((ROWS, COLUMNS), jnp.dtype(jnp.float32), layout=_SCORES)
        emit = functools.partial(_emit_scores, self.tile)
        return plgpu.inline_mgpu(arg_types=types, return_type=result)(emit)(q, list(pages))

    def scaled(self, tile: jax.Array, scales: Sequence[jax.Array]) -> jax.Array:
        """Multiplies [64, 16] by one number for each position of two pages."""
        types = (_SCORES, [tiled(_PER_POSITION)] * 2)
        result = plgpu.ShapeDtypeStruct((ROWS, COLUMNS), jnp.dtype(jnp.float32), layout=_SCORES)
        return plgpu.inline_mgpu(arg_types=types, return_type=result)(_emit_scaled)(tile, list(scales))

    def add(self, sums: jax.Array, fade: jax.Array, weights: jax.Array, pages: Sequence[jax.Array]) -> jax.Array:
        """Returns fade * sums + v^T weights^T [4 H, heads] for two pages of values; weights are rounded to 16 bits."""
        of_sums, rows = tiled(self.of_sums), _SCORES.reduce(1)
        types = (of_sums, rows, _SCORES, [tiled(self.of_values)] * 2)
        result = plgpu.ShapeDtypeStruct(sums.shape, jnp.dtype(jnp.float32), layout=of_sums)
        emit = functools.partial(_emit_add, self.tile)
        call = plgpu.inline_mgpu(arg_types=types, return_type=result)(emit)
        return call(sums, fade, weights.astype(self.tile.dtype), list(pages))

    def show(self, sums: jax.Array, rows: Sequence[jax.Array], sums_s: MosaicValue, rows_s: MosaicValue) -> None:
        """Writes the sums of all warps, and numbers of their rows, to shared memory."""
        _store(sums, tiled(self.of_sums), sums_s)
        for at, numbers in enumerate(rows):
            _store(numbers, _SCORES.reduce(1), rows_s.at[at])

    def sync(self) -> None:
        """Waits for all warps."""
        plgpu.inline_mgpu()(lambda ctx: mgpu.utils.warpgroup_barrier())()

    def part(self, source: MosaicValue) -> jax.Array:
        """Loads sums [H, heads], spread over the warps."""
        return self._load(source, self.of_part)

    def per_head(self, source: MosaicValue) -> jax.Array:
        """Loads one number for each head of a part."""
        return plgpu.load(source, layout=tiled(self.of_part).reduce(0), optimized=False)

    def full_part(self) -> tuple[jax.Array, jax.Array]:
        """Returns a part [H, heads] and numbers [heads] of zeros."""
        of_part = tiled(self.of_part)
        part = jnp.zeros((self.tile.head_dim, self.tile.heads), jnp.float32)
        numbers = jnp.zeros((self.tile.heads,), jnp.float32)
        return plgpu.layout_cast(part, of_part), plgpu.layout_cast(numbers, of_part.reduce(0))

    def store_part(self, part: jax.Array, target_g: MosaicValue) -> None:
        """Stores a part to device memory."""
        _store(part, tiled(self.of_part), target_g)

    def store_per_head(self, numbers: jax.Array, target_g: MosaicValue) -> None:
        """Stores one number for each head to device memory."""
        _store(numbers, tiled(self.of_part).reduce(0), target_g)


class Interpreted:
    """The twin's instructions, which Pallas can interpret; it takes f32, too."""

    def __init__(self, tile: Tile, params: plgpu.InterpretGPUParams) -> None:
        self.tile = tile
        self.options: dict[str, MosaicValue] = {"interpret": params}

    def queries(self, source: MosaicValue) -> jax.Array:
        """Loads an array."""
        return source[...]

    keys = values = scales = part = per_head = queries

    def indices(self, axis: int) -> jax.Array:
        """Returns the index of each score along an axis."""
        return lax.broadcasted_iota(jnp.int32, (ROWS, COLUMNS), axis)

    def full_rows(self, number: float) -> jax.Array:
        """Returns [64], one number for each row of scores."""
        return jnp.full((ROWS,), number, jnp.float32)

    def zeros(self) -> jax.Array:
        """Returns sums [4 H, heads] of zeros."""
        return jnp.zeros((WARPS * self.tile.head_dim, self.tile.heads), jnp.float32)

    def _of_warps(self, pages: Sequence[jax.Array]) -> jax.Array:
        """Returns [warps, 16 positions, H] of two pages, in the dtype of products."""
        of_pages = [page.astype(self.tile.dtype).reshape(WARPS, EIGHT, -1) for page in pages]
        return jnp.concatenate(of_pages, axis=1)

    def scores(self, q: jax.Array, pages: Sequence[jax.Array]) -> jax.Array:
        """Returns q k^T [64, 16] for two pages of keys."""
        rows = jnp.pad(q, ((0, ROWS // WARPS - q.shape[0]), (0, 0)))
        found = jnp.einsum("nh,wsh->wns", rows, self._of_warps(pages), preferred_element_type=jnp.float32)
        return found.reshape(ROWS, COLUMNS)

    def scaled(self, tile: jax.Array, scales: Sequence[jax.Array]) -> jax.Array:
        """Multiplies [64, 16] by one number for each position of two pages."""
        factors = jnp.concatenate([one.reshape(WARPS, 1, EIGHT) for one in scales], axis=2)
        return (tile.reshape(WARPS, -1, COLUMNS) * factors).reshape(ROWS, COLUMNS)

    def add(self, sums: jax.Array, fade: jax.Array, weights: jax.Array, pages: Sequence[jax.Array]) -> jax.Array:
        """Returns fade * sums + v^T weights^T [4 H, heads] for two pages of values; weights are rounded to 16 bits."""
        of_heads = weights.astype(self.tile.dtype).reshape(WARPS, -1, COLUMNS)[:, : self.tile.heads]
        more = jnp.einsum("wsh,wns->whn", self._of_warps(pages), of_heads, preferred_element_type=jnp.float32)
        factors = fade.reshape(WARPS, 1, -1)[..., : self.tile.heads]
        return (sums.reshape(more.shape) * factors + more).reshape(sums.shape)

    def show(self, sums: jax.Array, rows: Sequence[jax.Array], sums_s: MosaicValue, rows_s: MosaicValue) -> None:
        """Writes the sums of all warps, and numbers of their rows, to shared memory."""
        sums_s[...] = sums
        for at, numbers in enumerate(rows):
            rows_s[at] = numbers

    def sync(self) -> None:
        """Waits for all warps."""
        plgpu.commit_smem()

    def full_part(self) -> tuple[jax.Array, jax.Array]:
        """Returns a part [H, heads] and numbers [heads] of zeros."""
        return jnp.zeros((self.tile.head_dim, self.tile.heads)), jnp.zeros(self.tile.heads)

    def store_part(self, part: jax.Array, target_g: MosaicValue) -> None:
        """Stores an array to device memory."""
        target_g[...] = part

    store_per_head = store_part


type Instructions = Machine | Interpreted


def _store(values: jax.Array, layout: MosaicValue, target: MosaicValue) -> None:
    store = plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))
    store(lambda ctx, held, target: held.store_untiled(target, optimized=False))(values, target)


# Code that runs on registers


def _words(tile: Tile, register: MosaicValue) -> list[MosaicValue]:
    """Returns the numbers of a register in words of two, in the dtype of products."""
    i32 = ir.IntegerType.get_signless(32)
    held = ir.VectorType(register.type)
    if not isinstance(held.element_type, ir.IntegerType):
        return _bits(register, held.shape[0] // 2)
    if held.shape[0] == 2:
        bits = arith.extui(i32, mgpu.utils.bitcast(register, ir.IntegerType.get_signless(16)))
        return [_from_bytes(tile, bits, 0)]
    return [_from_bytes(tile, word, half) for word in _bits(register, held.shape[0] // 4) for half in range(2)]


def _bits(register: MosaicValue, count: int) -> list[MosaicValue]:
    i32 = ir.IntegerType.get_signless(32)
    if count == 1:
        return [mgpu.utils.bitcast(register, i32)]
    words = mgpu.utils.bitcast(register, ir.VectorType.get((count,), i32))
    return [value(words, at) for at in range(count)]


def _from_bytes(tile: Tile, word: MosaicValue, half: int) -> MosaicValue:
    i32, name = ir.IntegerType.get_signless(32), tile.dtype.name
    if flip := _FLIPS[name]:
        word = arith.xori(word, mgpu.utils.c(flip, i32))
    return assembly(_FROM_BYTES[name].format(select=_SELECT[half]), i32, 1, [word])[0]


def _multiply(tile: Tile, first: Sequence[MosaicValue], second: Sequence[MosaicValue], sums: Sequence[MosaicValue]):
    kind = _KINDS[tile.dtype.name]
    ptx = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    return assembly(ptx, ir.F32Type.get(), 4, [*first, *second], sums)


def _pair(numbers: Sequence[MosaicValue]) -> MosaicValue:
    return vector.from_elements(ir.VectorType.get((2,), ir.F32Type.get()), list(numbers))


def _emit_scores(tile: Tile, ctx, q, pages):
    zero = mgpu.utils.c(0, ir.IntegerType.get_signless(32))
    queries = [[_words(tile, each) for each in row] for row in q.registers.reshape(tile.heads // EIGHT, -1)]
    of_pages = [page.registers.reshape(-1) for page in pages]
    sums = [[mgpu.utils.c(0.0, ir.F32Type.get())] * 4 for _ in pages]
    for at in range(len(of_pages[0])):
        keys = [_words(tile, registers[at]) for registers in of_pages]
        for first in range(0, len(keys[0]), 2):
            pairs = [[row[at][first + half] for row in queries] for half in range(2)]
            rows = [word for pair in pairs for word in (*pair, zero)[:2]]
            sums = [
                _multiply(tile, rows, of_page[first : first + 2], one) for of_page, one in zip(keys, sums, strict=True)
            ]
    registers = np.array([[_pair(one[:2]), _pair(one[2:])] for one in sums], object)
    return fragmented(registers, _SCORES, (ROWS, COLUMNS))


def _emit_scaled(ctx, scores, scales):
    of_pages = scores.registers.reshape(2, 2)
    registers = np.empty((2, 2), object)
    for page, row in np.ndindex(2, 2):
        registers[page, row] = arith.mulf(of_pages[page, row], scales[page].registers.item())
    return fragmented(registers, _SCORES, (ROWS, COLUMNS))


def _emit_add(tile: Tile, ctx, sums, fade, weights, pages):
    blocks, of_load = tile.heads // EIGHT, tile.vector(EIGHT)
    old = sums.registers.reshape(blocks, -1, of_load)
    found = np.empty(old.shape, object)
    of_weights = weights.registers.reshape(2, 2)
    of_pages = [page.registers.reshape(-1, 2) for page in pages]
    fades = [_of_columns(value(fade.registers.reshape(2)[block], 0)) for block in range(blocks)]
    for at in range(old.shape[1]):
        of_keys = [[_words(tile, register) for register in registers[at]] for registers in of_pages]
        for pair in range(of_load // 2):
            rows = [word for of_page in of_keys for word in _transposed(*(words[pair] for words in of_page))]
            for block in range(blocks):
                faded = [
                    arith.mulf(value(old[block, at, 2 * pair + row], column), fades[block][column])
                    for row in range(2)
                    for column in range(2)
                ]
                columns = [_bits(of_weights[page, block], 1)[0] for page in range(2)]
                new = _multiply(tile, rows, columns, faded)
                found[block, at, 2 * pair], found[block, at, 2 * pair + 1] = _pair(new[:2]), _pair(new[2:])
    shape = (WARPS * tile.head_dim, tile.heads)
    return fragmented(found, tiled(Machine(tile).of_sums), shape)


def _transposed(of_even: MosaicValue, of_odd: MosaicValue) -> list[MosaicValue]:
    """Returns, for each of two features, the word of an even and an odd position."""
    i32 = ir.IntegerType.get_signless(32)
    return [assembly(f"prmt.b32 $0, $1, $2, {at};", i32, 1, [of_even, of_odd])[0] for at in ("0x5410", "0x7632")]


def _of_columns(of_row: MosaicValue) -> list[MosaicValue]:
    """Returns the numbers of rows 2 t and 2 t + 1 from one of row g in each thread."""
    i32 = ir.IntegerType.get_signless(32)
    lane = arith.andi(mgpu.utils.thread_idx(), mgpu.utils.c(3, i32))
    bits, first = arith.bitcast(i32, of_row), arith.muli(lane, mgpu.utils.c(8, i32))
    found = []
    for more in (0, 4):
        source = arith.addi(first, mgpu.utils.c(more, i32))
        ptx = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
        found.append(arith.bitcast(ir.F32Type.get(), assembly(ptx, i32, 1, [bits, source])[0]))
    return found
