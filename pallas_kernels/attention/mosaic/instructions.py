"""Copies, waits, products and stores of the attention kernels, for each kind of device.

`CpAsync`: sm_80, sm_86, sm_89. Copies are cp.async, products mma.sync.
`Tma`: sm_90 and newer, among them sm_120, which has TMA and mbarriers but neither wgmma nor tcgen05. Products are
mma.sync.
`Wgmma`: sm_90 alone. Copies are those of `Tma`.
`Interpreted`: the twin that JAX interprets on a CPU, with its race detector. Copies and waits are those of `Tma`,
products are jnp.dot, and it takes f32, too.

A warpgroup computes a tile of 64 rows; warp w has rows 16 w to 16 w + 15. So a row's maximum and sum need four lanes of
one warp and no shared memory. A tile in the layout of an accumulator has its 16-bit values in the registers in which
the next product expects its left operand, so weights never leave registers.

The twin and the race detector do not check that cp.async's waits count groups (all waits are for all groups), nor that
a barrier precedes each refill of a buffer. Dimension key: _g device memory, _s shared memory.
"""

from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.mosaic.registers import MosaicValue, fragmented

TILE = 64  # rows of a tile
EIGHT = 8  # rows of a swizzled tile in shared memory
# Parts of a contraction whose operands are loaded together. Larger ones would spill at head_dim 256.
COLUMNS, ROWS = 64, 16
SWIZZLES = (128, 64, 32)  # bytes of its rows; all are free of bank conflicts for ldmatrix


class _Barriers:
    """Copies by TMA, one barrier per buffer."""

    def barriers(self, count: int) -> list[plgpu.Barrier]:
        """Returns the barriers of so many buffers."""
        return [plgpu.Barrier(num_arrivals=1) for _ in range(count)]

    def copy(self, source_g: MosaicValue, target_s: MosaicValue, barrier: MosaicValue) -> None:
        """Starts a copy from device to shared memory."""
        plgpu.copy_gmem_to_smem(source_g, target_s, barrier)

    def wait(self, barrier: MosaicValue) -> None:
        """Waits for a buffer's copy; then for all warps, and orders their reads before the next copy."""
        plgpu.barrier_wait(barrier)
        plgpu.commit_smem()

    def sync(self) -> None:
        """Waits until all warps have read what a later copy overwrites."""
        plgpu.commit_smem()

    def store(self, tile: jax.Array, through_s: MosaicValue, target_g: MosaicValue) -> None:
        """Stores a tile in 16 bits to device memory through shared memory."""
        self.sync()
        through_s[...] = tile.astype(through_s.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(through_s, target_g)
        plgpu.wait_smem_to_gmem(0)


class _Groups:
    """Copies by cp.async, which waits count in groups."""

    def barriers(self, count: int) -> list[None]:
        """Returns no barrier for each buffer."""
        return [None] * count

    def copy(self, source_g: MosaicValue, target_s: MosaicValue, barrier: None) -> None:
        """Starts a copy from device to shared memory: a group of cp.async."""
        plgpu.copy_gmem_to_smem(source_g, target_s, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

    def wait(self, barrier: None) -> None:
        """Waits for all copies of all warps."""
        plgpu.wait_gmem_to_smem(0)  # includes a barrier of the warpgroup

    def sync(self) -> None:
        """Waits until all warps have read what a later copy overwrites."""
        plgpu.inline_mgpu()(lambda ctx: mgpu.utils.warpgroup_barrier())()

    def store(self, tile: jax.Array, through_s: MosaicValue, target_g: MosaicValue) -> None:
        """Stores a tile in 16 bits to device memory through shared memory, in whole sectors."""
        self.sync()
        through_s[...] = tile.astype(through_s.dtype)
        self.sync()
        layout = plgpu.Layout.SMEM_GMEM_COPY(through_s.shape, through_s.dtype, swizzle=_swizzle(*through_s.shape[1:]))
        _store(plgpu.load(through_s, layout=layout), layout, target_g)


class _Registers:
    """Arrays in the registers of accumulators, for operands of one 16-bit dtype."""

    def __init__(self, dtype: DTypeLike, acc: MosaicValue) -> None:
        self.dtype = jnp.dtype(dtype)
        self.acc = acc
        # No automatic barriers; and no scratch for sums across warps: a row is in one warp, and 2 KiB more would leave
        # one block per SM on sm_86.
        params = plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True, reduction_scratch_bytes=0)
        self.options: dict[str, MosaicValue] = {"compiler_params": params}

    def full(self, shape: tuple[int, int], value: float) -> jax.Array:
        """Returns a tile of one f32 value."""
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), self.acc)

    def full_rows(self, rows: int, value: float | jax.Array) -> jax.Array:
        """Returns one f32 value for each row of a tile."""
        return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), self.acc.reduce(1))

    def along(self, ref_g: MosaicValue, axis: int) -> jax.Array:
        """Loads one value for each index of a tile along an axis."""
        return plgpu.load(ref_g, layout=self.acc.reduce(1 - axis), optimized=False)

    def indices(self, shape: tuple[int, int], axis: int) -> jax.Array:
        """Returns the index of each element of a tile along an axis."""
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=self.acc)

    def tile(self, ref: MosaicValue) -> jax.Array:
        """Loads a tile as f32."""
        return plgpu.load(ref, layout=self.acc, optimized=False).astype(jnp.float32)

    def store_rows(self, values: jax.Array, target_g: MosaicValue) -> None:
        """Stores one value for each row to device memory."""
        _store(values, self.acc.reduce(1), target_g)


class _Mma(_Registers):
    """Products by mma.sync."""

    counts_from_block = False

    def __init__(self, dtype: DTypeLike) -> None:
        super().__init__(dtype, plgpu.Layout.MMA_ACC(dtype, m_warps=4))
        self.lhs = plgpu.Layout.MMA_LHS(dtype, m_warps=4)
        self.rhs = plgpu.Layout.MMA_RHS(dtype, m_warps=4)

    def left(self, ref_s: MosaicValue) -> Iterator[jax.Array]:
        """Loads a left operand [rows, contraction] from shared memory (ldmatrix), in parts of the contraction."""
        for at in _parts(ref_s.shape[1]):
            yield plgpu.load(ref_s.at[:, at], layout=self.lhs, optimized=False)

    def multiply_transposed(self, left: Iterable[jax.Array], ref_s: MosaicValue) -> jax.Array:
        """Computes left @ ref^T for the parts of a left operand."""
        sums = self.full((TILE, ref_s.shape[0]), 0.0)
        for one, at in zip(left, _parts(ref_s.shape[1]), strict=True):
            right = plgpu.load(ref_s.at[:, at].T, layout=self.rhs, optimized=False)
            sums = self._mma(sums, one, right, self.lhs, 0)
        return sums

    def multiply_add(self, sums: jax.Array, tile: jax.Array, ref_s: MosaicValue) -> jax.Array:
        """Computes sums + tile @ ref for a tile of f32, rounded to 16 bits; ldmatrix.trans reads the right operand."""
        tile = tile.astype(self.dtype)
        for first in range(0, ref_s.shape[0], ROWS):
            right = plgpu.load(ref_s.at[pl.ds(first, ROWS)], layout=self.rhs, optimized=False)
            sums = self._mma(sums, tile, right, self.acc, first)
        return sums

    def _mma(self, sums: jax.Array, left: jax.Array, right: jax.Array, layout: MosaicValue, first: int) -> jax.Array:
        """Multiplies the columns of a left operand from `first` on, in a layout whose registers are those of `lhs`."""

        def emit(ctx, sums, left, right):
            left = fragmented(left.registers, self.lhs, left.shape)
            return mgpu.mma(sums, left[:, first : first + right.shape[0]], right)

        result = plgpu.ShapeDtypeStruct(sums.shape, jnp.dtype(jnp.float32), layout=self.acc)
        return plgpu.inline_mgpu(arg_types=(self.acc, layout, self.rhs), return_type=result)(emit)(sums, left, right)


def _store(values: jax.Array, layout: MosaicValue, target_g: MosaicValue) -> None:
    """Stores registers of a layout to device memory; `plgpu.store` came with jax 0.12."""
    store = plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))
    store(lambda ctx, held, target: held.store_untiled(target, optimized=False))(values, target_g)


class CpAsync(_Groups, _Mma):
    """The instructions of sm_80, sm_86 and sm_89."""


class Tma(_Barriers, _Mma):
    """The instructions of sm_90 and newer."""


class Wgmma(_Barriers, _Registers):
    """The instructions of sm_90 alone: a warpgroup multiplies operands in shared memory while its threads go on."""

    counts_from_block = True  # masks count keys from the first one of a block: fewer registers here, but not in `_Mma`

    def __init__(self, dtype: DTypeLike) -> None:
        super().__init__(dtype, plgpu.Layout.WGMMA)

    def left(self, ref_s: MosaicValue) -> Iterator[MosaicValue]:
        """Returns a left operand, in one part, which products read from shared memory."""
        yield ref_s

    def multiply_transposed(
        self, left: Iterable[MosaicValue], ref_s: MosaicValue, issued: Callable[[], None] = lambda: None
    ) -> jax.Array:
        """Computes left @ ref^T; calls `issued` before it waits for the product."""
        (whole,) = left

        def product(sums):
            plgpu.wgmma(sums, whole, ref_s.T)
            issued()
            return sums[...]

        return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((TILE, ref_s.shape[0]), jnp.float32))

    def multiply_add(self, sums: jax.Array, tile: jax.Array, ref_s: MosaicValue) -> jax.Array:
        """Computes sums + tile @ ref for a tile of f32, rounded to 16 bits in its registers."""

        def product(sums_ref):
            plgpu.wgmma(sums_ref, tile.astype(self.dtype), ref_s)

        added: MosaicValue = pl.run_state(product)(plgpu.WGMMAAccumulatorRef.init(sums))
        return added


class Interpreted(_Barriers):
    """The twin's instructions, which Pallas can interpret."""

    counts_from_block = False

    def __init__(self, dtype: DTypeLike, params: plgpu.InterpretGPUParams) -> None:
        self.dtype = jnp.dtype(dtype)
        self.options: dict[str, MosaicValue] = {"interpret": params}

    def full(self, shape: tuple[int, int], value: float) -> jax.Array:
        """Returns a tile of one f32 value."""
        return jnp.full(shape, value, jnp.float32)

    def full_rows(self, rows: int, value: float | jax.Array) -> jax.Array:
        """Returns one f32 value for each row of a tile."""
        return jnp.full((rows,), value, jnp.float32)

    def along(self, ref_g: MosaicValue, axis: int) -> jax.Array:
        """Loads one value for each index of a tile along an axis."""
        return ref_g[...]

    def indices(self, shape: tuple[int, int], axis: int) -> jax.Array:
        """Returns the index of each element of a tile along an axis."""
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    def tile(self, ref: MosaicValue) -> jax.Array:
        """Loads a tile as f32."""
        return ref[...].astype(jnp.float32)

    def left(self, ref_s: MosaicValue) -> Iterator[jax.Array]:
        """Loads a left operand, in one part."""
        yield ref_s[...]

    def multiply_transposed(
        self, left: Iterable[jax.Array], ref_s: MosaicValue, issued: Callable[[], None] = lambda: None
    ) -> jax.Array:
        """Computes left @ ref^T, then calls `issued`."""
        (whole,) = left
        product = jnp.dot(whole, ref_s[...].T, preferred_element_type=jnp.float32)
        issued()
        return product

    def multiply_add(self, sums: jax.Array, tile: jax.Array, ref_s: MosaicValue) -> jax.Array:
        """Computes sums + tile @ ref for a tile of f32, rounded to the operands' dtype."""
        return sums + jnp.dot(tile.astype(self.dtype), ref_s[...], preferred_element_type=jnp.float32)

    def store_rows(self, values: jax.Array, target_g: MosaicValue) -> None:
        """Stores one value for each row to device memory."""
        target_g[...] = values


class InterpretedWgmma(Interpreted):
    """The twin of `Wgmma`; a fence stands for wgmma's way to memory, which is that of the copies that follow."""

    counts_from_block = True

    def multiply_add(self, sums: jax.Array, tile: jax.Array, ref_s: MosaicValue) -> jax.Array:
        """Computes sums + tile @ ref, the last product of a step."""
        added = super().multiply_add(sums, tile, ref_s)
        self.sync()
        return added


type Instructions = CpAsync | Tma | Wgmma | Interpreted


def swizzled(rows: int, width: int, dtype: DTypeLike, *, count: tuple[int, ...] = ()) -> MosaicValue:
    """Returns a buffer [rows, width] in shared memory, in swizzled tiles, or `count` of them."""
    return plgpu.SMEM((*count, rows, width), dtype, transforms=tiles_of(width, dtype))


def tiles_of(width: int, dtype: DTypeLike) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Returns the transforms to tiles whose rows are the longest that divide rows of `width` numbers."""
    row_bytes = _swizzle(width, jnp.dtype(dtype).itemsize)
    return (
        plgpu.TilingTransform((EIGHT, row_bytes // jnp.dtype(dtype).itemsize)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(row_bytes),  # pyright: ignore[reportAbstractUsage]
    )


def _swizzle(width: int, itemsize: int = 2) -> int:
    return next(size for size in SWIZZLES if width * itemsize % size == 0)


def _parts(columns: int) -> list[pl.Slice]:
    return [pl.ds(first, min(COLUMNS, columns - first)) for first in range(0, columns, COLUMNS)]


def rem_div(x: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Returns (x % n, x // n) for x >= 0, without the selects of jnp's signed forms."""
    return lax.rem(x, jnp.int32(n)), lax.div(x, jnp.int32(n))


def query_tile(blocks: int, kv_heads: int, group: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns (row of the batch, block of queries, query head, key head) of this tile of the grid; long tiles first."""
    member, rest = rem_div(lax.axis_index("tile"), group)
    kv, rest = rem_div(rest, kv_heads)
    back, b = rem_div(rest, blocks)
    return b, blocks - 1 - back, kv * group + member, kv


def flat(x_BTNH: jax.Array) -> jax.Array:
    """Views [B, T, N, H] as [B, T, N H]: copies by cp.async need the rows of a tile to be neighbours in the view."""
    return x_BTNH.reshape(*x_BTNH.shape[:2], -1)


def part(source_g: MosaicValue, b: jax.Array, first: jax.Array, count: int, head: jax.Array, width: int) -> MosaicValue:
    """Returns the positions [count, width] from `first` on of one head, in an array of `flat`."""
    positions = pl.ds(pl.multiple_of(first, count), count)
    return source_g.at[b, positions, pl.ds(pl.multiple_of(head * width, width), width)]
