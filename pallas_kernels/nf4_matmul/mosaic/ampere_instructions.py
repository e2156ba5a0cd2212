"""What the kernel for Ampere and Ada does on a card, and what its twin does instead: copies, waits, decode, product.

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
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from pallas_kernels.nf4_matmul.dispatch import Direction
from pallas_kernels.nf4_matmul.mosaic import fragments, inline_ptx
from pallas_kernels.nf4_matmul.mosaic.decode import select_pair
from pallas_kernels.nf4_matmul.mosaic.fragments import RUN, TILE_COLUMNS

COPIES = 4  # of a round, each a group of cp.async; the scales travel with the first


class Machine:
    """What the kernel does on a card."""

    # The barriers that Mosaic puts before each copy would be four more in a round.
    options: dict[str, Any] = {"compiler_params": plgpu.CompilerParams(unsafe_no_auto_barriers=True)}  # noqa: RUF012

    def __init__(self, direction: Direction, dtype: Any, table: np.ndarray) -> None:
        self.direction: Direction = direction
        self.dtype, self.table = jnp.dtype(dtype), table

    def barriers(self, steps: int) -> list[Any]:
        """Copies are waited for without: in the order in which they were started."""
        return []

    def copy(self, source, target, arrived, slot) -> None:
        """A group of cp.async, with what was started before and is in none."""
        plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

    def copy_scales(self, source, target, arrived, slot) -> None:
        """cp.async of four bytes a thread: Mosaic's own takes for granted that the rows of a source are neighbours."""
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))(_copy_scales)(source, target)

    def skip_copies(self) -> None:
        """As many groups as a round has, empty ones, so that counting them stays exact."""
        plgpu.inline_mgpu()(_commit_nothing)()

    def wait(self, arrived, slot, younger: int) -> None:
        """Until all copies but those of `younger` rounds have arrived, for all threads; then a barrier."""
        plgpu.wait_gmem_to_smem(younger * COPIES)

    def constants(self, words_g) -> list[jax.Array]:
        """The look-up's constants, in registers."""
        return inline_ptx.constants(words_g)

    def weights(self, codes_s, scales_s, words) -> Sequence[jax.Array]:
        """Of each part of the round's contraction the second operand [64, 128]."""
        return fragments.decoded(self.direction, codes_s, scales_s, words, self.table, self.dtype)

    def zeros(self, rows: int) -> jax.Array:
        """Sums to begin with."""
        return plgpu.layout_cast(jnp.zeros((rows, TILE_COLUMNS), jnp.float32), fragments.of_sums(self.dtype))

    def multiply_add(self, sums, rows_s, weights) -> jax.Array:
        """sums + rows @ weights of both parts."""
        layout = fragments.of_rows(self.dtype)
        rows = [plgpu.load(rows_s.at[part], layout=layout, optimized=False) for part in range(2)]
        return fragments.multiply_add(sums, rows, weights)

    def in_order(self, sums) -> list[jax.Array]:
        """The tile, rounded to 16 bits once, as two chunks of 64 columns."""
        return fragments.in_order(sums.astype(self.dtype))


class Interpreted:
    """The same in operations that Pallas' interpreter knows; it moves and waits as TMA does, by barriers."""

    def __init__(self, direction: Direction, dtype: Any, table: np.ndarray, params: plgpu.InterpretGPUParams) -> None:
        self.direction: Direction = direction
        self.dtype, self.table = jnp.dtype(dtype), table
        self.options: dict[str, Any] = {"interpret": params}

    def barriers(self, steps: int) -> list[Any]:
        """One a slot, which waits for a round's copies and its scales."""
        return [plgpu.Barrier(num_arrivals=COPIES + 1, num_barriers=steps)]

    def copy(self, source, target, arrived, slot) -> None:
        """A copy by TMA."""
        plgpu.copy_gmem_to_smem(source, target, arrived[0].at[slot])

    copy_scales = copy

    def skip_copies(self) -> None:
        """Nothing waits for copies that were not started."""

    def wait(self, arrived, slot, younger: int) -> None:
        """Until the slot's copies have arrived; TMA wants reads fenced before a slot is filled again."""
        plgpu.barrier_wait(arrived[0].at[slot])
        plgpu.commit_smem()

    def constants(self, words_g) -> None:
        """The select tree has its own."""

    def weights(self, codes_s, scales_s, words) -> Sequence[jax.Array]:
        """As Machine.weights, columns in their own order."""
        pairs = [select_pair(codes_s[part], RUN, None, self.table, self.dtype) for part in range(2)]
        scaled = [
            [pairs[part][nibble] * scales_s[nibble, pl.ds(RUN * part, RUN)][:, None] for part in range(2)]
            for nibble in range(2)
        ]
        if self.direction == "forward":
            return [jnp.concatenate(parts).T for parts in scaled]
        return [jnp.concatenate(runs, axis=1) for runs in zip(*scaled, strict=True)]

    def zeros(self, rows: int) -> jax.Array:
        """As Machine.zeros."""
        return jnp.zeros((rows, TILE_COLUMNS), jnp.float32)

    def multiply_add(self, sums, rows_s, weights) -> jax.Array:
        """As Machine.multiply_add."""
        products = (jnp.dot(rows_s[part], weights[part], preferred_element_type=jnp.float32) for part in range(2))
        return sum(products, sums)

    def in_order(self, sums) -> list[jax.Array]:
        """As Machine.in_order; the columns already are."""
        return [sums[:, :RUN].astype(self.dtype), sums[:, RUN:].astype(self.dtype)]


def _copy_scales(ctx, source, target) -> None:
    """[2, 128] 16-bit values, two a thread."""
    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    thread = arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(TILE_COLUMNS, i32))
    row, pair = (op(thread, mgpu.utils.c(RUN, i32)) for op in (arith.divui, arith.remui))

    def address(ref):
        kind = ir.MemRefType(ref.type)
        (stride, _), _ = kind.get_strides_and_offset()
        offset = arith.addi(arith.muli(row, mgpu.utils.c(stride, i32)), arith.muli(pair, mgpu.utils.c(2, i32)))
        return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [arith.extui(i64, offset)], kind.element_type)

    of_device_memory = llvm.addrspacecast(llvm.PointerType.get(address_space=1), address(source))
    nvvm.cp_async_shared_global(address(target), of_device_memory, 4, nvvm.LoadCacheModifierKind.CA)


def _commit_nothing(ctx) -> None:
    for _ in range(COPIES):
        nvvm.cp_async_commit_group()
