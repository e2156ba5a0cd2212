"""The instructions of the mma.sync kernel and of its interpreted twin: copies, waits, decoding, product.

Dimension key: a round is 128 of the contraction; _g device memory, _s shared memory.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from pallas_kernels.dispatch import Direction
from pallas_kernels.nf4_matmul.mosaic import fragments, inline_ptx
from pallas_kernels.nf4_matmul.mosaic.code_lookup import select_pair
from pallas_kernels.nf4_matmul.mosaic.fragments import RUN, TILE_COLUMNS

COPIES = 4  # copies per round, each a group of cp.async; the scales are in the first group


class Machine:
    """The kernel's instructions on a card before Hopper, which copies by cp.async."""

    # Mosaic's automatic barriers before copies would add four per round.
    options: dict[str, Any] = {"compiler_params": plgpu.CompilerParams(unsafe_no_auto_barriers=True)}  # noqa: RUF012

    def __init__(self, direction: Direction, dtype: DTypeLike, table: np.ndarray) -> None:
        self.direction: Direction = direction
        self.dtype, self.table = jnp.dtype(dtype), table

    def barriers(self, steps: int) -> list[plgpu.Barrier]:
        """None: a wait counts copies in the order in which they were started."""
        return []

    def copy(self, source, target, arrived, slot) -> None:
        """Starts a group of cp.async, which includes earlier copies that are in no group."""
        plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

    def copy_scales(self, source, target, arrived, slot) -> None:
        """Starts cp.async of 4, 8 or 16 bytes per thread: Mosaic's own assumes that a source's rows are contiguous."""
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))(_copy_scales)(source, target)

    def skip_copies(self) -> None:
        """Commits a round's number of empty groups, so that counting them stays exact."""
        plgpu.inline_mgpu()(_commit_nothing)()

    def wait(self, arrived, slot, younger: int) -> None:
        """Waits until all copies except those of the `younger` latest rounds have arrived; then a barrier."""
        plgpu.wait_gmem_to_smem(younger * COPIES)

    def constants(self, words_g) -> list[jax.Array]:
        """Loads the look-up's constants into registers."""
        return inline_ptx.constants(words_g)

    def weights(self, codes_s, scales_s, words) -> Sequence[jax.Array]:
        """Returns the second operand [64, 128] of each part of the round's contraction."""
        return fragments.decoded(self.direction, codes_s, scales_s, words, self.table, self.dtype)

    def zeros(self, rows: int) -> jax.Array:
        """Returns the initial sums."""
        return plgpu.layout_cast(jnp.zeros((rows, TILE_COLUMNS), jnp.float32), fragments.of_sums(self.dtype))

    def multiply_add(self, sums, rows_s, weights) -> jax.Array:
        """Returns sums + rows @ weights of both parts."""
        layout = fragments.of_rows(self.dtype)
        rows = [plgpu.load(rows_s.at[part], layout=layout, optimized=False) for part in range(2)]
        return fragments.multiply_add(sums, rows, weights)

    def in_order(self, sums) -> list[jax.Array]:
        """Returns the tile, rounded once to 16 bits, as two chunks of 64 columns."""
        return fragments.in_order(sums.astype(self.dtype))


class TmaCopies:
    """Copies by TMA, and waits for barriers that count their bytes."""

    def barriers(self, steps: int) -> list[plgpu.Barrier]:
        """Returns one barrier per slot, for a round's copies and scales."""
        return [plgpu.Barrier(num_arrivals=COPIES + 1, num_barriers=steps)]

    def copy(self, source, target, arrived, slot) -> None:
        """Starts a copy by TMA."""
        plgpu.copy_gmem_to_smem(source, target, arrived[0].at[slot])

    copy_scales = copy

    def skip_copies(self) -> None:
        """Does nothing: no wait counts copies that were not started."""

    def wait(self, arrived, slot, younger: int) -> None:
        """Waits until the slot's copies have arrived; TMA requires a fence between reads and the refill of a slot."""
        plgpu.barrier_wait(arrived[0].at[slot])
        plgpu.commit_smem()


class TmaMachine(TmaCopies, Machine):
    """The kernel's instructions on a card with TMA and mma.sync: Mosaic has cp.async only before Hopper."""


class Interpreted(TmaCopies):
    """The twin's instructions, which Pallas can interpret: the copies and waits are those of TmaMachine."""

    def __init__(
        self, direction: Direction, dtype: DTypeLike, table: np.ndarray, params: plgpu.InterpretGPUParams
    ) -> None:
        self.direction: Direction = direction
        self.dtype, self.table = jnp.dtype(dtype), table
        self.options: dict[str, Any] = {"interpret": params}

    def constants(self, words_g) -> None:
        """Returns None: the select tree has its own constants."""

    def weights(self, codes_s, scales_s, words) -> Sequence[jax.Array]:
        """Computes Machine.weights with columns in natural order."""
        pairs = [select_pair(codes_s[part], RUN, None, self.table, self.dtype) for part in range(2)]
        scaled = [
            [pairs[part][nibble] * self._factors(scales_s, nibble, part) for part in range(2)] for nibble in (0, 1)
        ]
        if self.direction == "forward":
            return [jnp.concatenate(parts).T for parts in scaled]
        return [jnp.concatenate(runs, axis=1) for runs in zip(*scaled, strict=True)]

    def _factors(self, scales_s, nibble: int, part: int) -> jax.Array:
        """Returns the scale of each weight [64, 64] of a nibble and a part of the rows."""
        groups = scales_s.shape[0] // 2
        scales = scales_s[pl.ds(groups * nibble, groups), pl.ds(RUN * part, RUN)]
        return jnp.repeat(scales.T, RUN // groups, axis=1)

    def zeros(self, rows: int) -> jax.Array:
        """Returns the initial sums."""
        return jnp.zeros((rows, TILE_COLUMNS), jnp.float32)

    def multiply_add(self, sums, rows_s, weights) -> jax.Array:
        """Returns sums + rows @ weights."""
        products = (jnp.dot(rows_s[part], weights[part], preferred_element_type=jnp.float32) for part in range(2))
        return sum(products, sums)

    def in_order(self, sums) -> list[jax.Array]:
        """Computes Machine.in_order; the columns already are in order."""
        return [sums[:, :RUN].astype(self.dtype), sums[:, RUN:].astype(self.dtype)]


def _copy_scales(ctx, source, target) -> None:
    """Copies [2, 128] 16-bit values, two per thread; [4, 128] four, and [8, 128] eight."""
    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    (each, _) = ir.MemRefType(target.type).shape  # values per thread: as many as there are rows
    thread = arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(TILE_COLUMNS, i32))
    row, place = (op(thread, mgpu.utils.c(TILE_COLUMNS // each, i32)) for op in (arith.divui, arith.remui))

    def address(ref):
        kind = ir.MemRefType(ref.type)
        (stride, _), _ = kind.get_strides_and_offset()
        offset = arith.addi(arith.muli(row, mgpu.utils.c(stride, i32)), arith.muli(place, mgpu.utils.c(each, i32)))
        return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [arith.extui(i64, offset)], kind.element_type)

    of_device_memory = llvm.addrspacecast(llvm.PointerType.get(address_space=1), address(source))
    nvvm.cp_async_shared_global(address(target), of_device_memory, 2 * each, nvvm.LoadCacheModifierKind.CA)


def _commit_nothing(ctx) -> None:
    for _ in range(COPIES):
        nvvm.cp_async_commit_group()
