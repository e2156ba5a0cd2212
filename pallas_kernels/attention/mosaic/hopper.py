"""Flash attention forward on Hopper (sm_90) by wgmma, in the way of FlashAttention-3 (Shah et al., 2024).

A tile is a block of queries of one head: half of them belong to each of two warpgroups. A third warpgroup only starts
TMA copies: of the blocks of keys and values that the tile visits, some steps ahead. Both others read them from the same
shared memory. Their weights stay in registers, from which wgmma reads its left operand.

The warpgroups take turns: while the tensor cores compute products of one, the other computes its softmax. For that,
each hands over when its q k^T is issued, and again when its weights are ready.

Dimension key: as in `forward`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.attention.bounds import Block, Bounds
from pallas_kernels.attention.mosaic.forward import HIDDEN, Softmax, in_log2
from pallas_kernels.attention.mosaic.instructions import (
    InterpretedWgmma,
    Wgmma,
    flat,
    part,
    query_tile,
    swizzled,
    tiles_of,
)
from pallas_kernels.attention.mosaic.mask import Visits, hide_unless_whole
from pallas_kernels.attention.tiles import ScoreScaling
from pallas_kernels.mosaic.registers import MosaicValue

WARPGROUPS = 2  # that compute
AHEAD = 2  # steps whose keys and values are in shared memory at once
MEMORY_REGISTERS = 24  # registers of the warpgroup that starts copies; the others share the rest


def forward(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    bounds: Bounds,
    sinks_N: Float[Array, " N"] | None,
    scores: ScoreScaling,
    do: Wgmma | InterpretedWgmma,
    block: Block,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Returns (out, log2-sum-exp2 in f32, of scores and sink)."""
    (batch, length, heads, width), kv_heads = q_BTNH.shape, k_BTKH.shape[2]
    task = _Task(do, Softmax(do, scores), block, length // block.queries, kv_heads, heads // kv_heads, width)
    call = plgpu.kernel(
        task.kernel,
        out_type=(
            jax.ShapeDtypeStruct((batch, length, heads * width), q_BTNH.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        grid=(batch * task.blocks * heads,),
        grid_names=("tile",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            swizzled(task.rows, width, q_BTNH.dtype, count=(WARPGROUPS,)),
            plgpu.Barrier(num_barriers=WARPGROUPS),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ],
        kernel_name="attention_forward",
        **do.options,
    )
    arrays = (flat(x) for x in (q_BTNH, k_BTKH, v_BTKH))
    out, lse_BNT = call(*arrays, bounds.visible, bounds.forward, bounds.forward_whole, in_log2(sinks_N))
    return out.reshape(q_BTNH.shape), lse_BNT


class _Task(NamedTuple):
    """One forward pass; as in `forward`, but half of the queries of a block belong to each warpgroup."""

    do: Wgmma | InterpretedWgmma
    softmax: Softmax
    block: Block
    blocks: int
    kv_heads: int
    group: int
    width: int

    @property
    def rows(self) -> int:
        """Returns the number of queries of a warpgroup."""
        return self.block.queries // WARPGROUPS

    def kernel(self, q_g, k_g, v_g, visible_g, visits_g, whole_g, sinks_g, out_g, lse_g, q_s, q_here, turn):
        """Computes a block of queries of one head."""
        do, softmax, keys = self.do, self.softmax, self.block.keys
        warpgroup = lax.axis_index("warpgroup")
        b, i, n, kv = query_tile(self.blocks, self.kv_heads, self.group)
        visits, row = Visits.load(visits_g.at[b, i], visible_g), i * self.block.queries + warpgroup * self.rows

        def hand_over():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def compute(visit_all):
            mine_s, here = q_s.at[warpgroup], q_here.at[warpgroup]
            do.copy(part(q_g, b, row, self.rows, n, self.width), mine_s, here)
            do.wait(here)
            pl.when(warpgroup == 1)(hand_over)  # starts half a step later
            running = visit_all(softmax.start(self.rows, self.width, sinks_g, n))
            pl.when(warpgroup == 0)(hand_over)
            out = part(out_g, b, row, self.rows, n, self.width)
            softmax.store(running, lse_g.at[b, n, pl.ds(row, self.rows)], mine_s, out)

        def step(at, k_s, v_s, running) -> MosaicValue:
            product = do.multiply_transposed(do.left(q_s.at[warpgroup]), k_s, hand_over)
            s, column = softmax.scores.capped_by_exp2(product), visits.block(at[0]) * keys
            s = hide_unless_whole(do, visible_g, whole_g.at[b, i], b, row, column, 0, s, HIDDEN)
            (sums, top, total), weights = softmax.weigh(running, s)
            hand_over()
            return do.multiply_add(sums, weights, v_s), top, total

        of_keys = plgpu.BlockSpec(
            (None, keys, self.width),
            lambda visited: (b, visits.block(visited), kv),
            memory_space=plgpu.SMEM,
            transforms=tiles_of(self.width, do.dtype),
        )
        plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(visits.count,),
            memory_registers=MEMORY_REGISTERS,
            in_specs=[of_keys, of_keys],
            max_concurrent_steps=AHEAD,
            wg_axis="warpgroup",
            num_compute_wgs=WARPGROUPS,
            compute_context=compute,
        )(k_g, v_g)
