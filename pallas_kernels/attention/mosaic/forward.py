"""Flash attention forward by mma.sync (Dao et al., 2022).

A tile is a block of queries of one head. It visits the blocks of keys that its queries see; those that all of them see
whole are not masked. Per block of keys: wait for K; start copying V; scores; wait for V; start copying the next K;
softmax; weights times V. So there is one buffer each for K and V, and each copy has half a block's time to arrive.

The number of positions is a multiple of 64. Dimension key: B batch, T positions, N q-heads, K kv-heads, G = N / K,
H head_dim, I blocks of queries; _g device memory, _s shared memory.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.attention.bounds import IN_REGISTERS, Block, Bounds
from pallas_kernels.attention.mosaic.instructions import Instructions, flat, part, query_tile, swizzled
from pallas_kernels.attention.mosaic.mask import Visits, hide_unless_whole
from pallas_kernels.attention.tiles import ScoreScaling
from pallas_kernels.mosaic.registers import MosaicValue

HIDDEN = float("-inf")  # a finite one would give NaN if a multiply-add made the exponent infinite
LOWEST = -1e30  # first maximum: finite, so that rows which see no key of a block get weights of 0, never NaN


def forward(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    bounds: Bounds,
    sinks_N: Float[Array, " N"] | None,
    scores: ScoreScaling,
    do: Instructions,
    block: Block,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Returns (out, log2-sum-exp2 in f32, of scores and sink)."""
    (batch, length, heads, width), kv_heads = q_BTNH.shape, k_BTKH.shape[2]
    rows, keys = block
    task = _Task(Softmax(do, scores), block, length // rows, kv_heads, heads // kv_heads, width)
    call = plgpu.kernel(
        task.kernel,
        out_type=(
            jax.ShapeDtypeStruct((batch, length, heads * width), q_BTNH.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        grid=(batch * task.blocks * heads,),
        grid_names=("tile",),
        scratch_types=[
            swizzled(rows, width, q_BTNH.dtype),
            *[swizzled(keys, width, q_BTNH.dtype)] * 2,
            *do.barriers(3),
        ],
        kernel_name="attention_forward",
        **do.options,
    )
    arrays = (flat(x) for x in (q_BTNH, k_BTKH, v_BTKH))
    out, lse_BNT = call(*arrays, bounds.visible, bounds.forward, bounds.forward_whole, in_log2(sinks_N))
    return out.reshape(q_BTNH.shape), lse_BNT


def in_log2(sinks_N: Float[Array, " N"] | None) -> tuple[Float[Array, " N"], ...]:
    """Returns the sinks as base-2 logarithms, or nothing."""
    return () if sinks_N is None else (sinks_N.astype(jnp.float32) * math.log2(math.e),)


type Running = tuple[jax.Array, jax.Array, jax.Array]  # sums of weighted values, largest score, total of weights


class Softmax(NamedTuple):
    """The running softmax of a tile of queries: its instructions and scores."""

    do: Instructions
    scores: ScoreScaling

    def start(self, rows: int, width: int, sinks_g: tuple[MosaicValue, ...], n: jax.Array) -> Running:
        """Returns the sums before the first keys; a sink is a key that has a score and no value."""
        top, total = (sinks_g[0][n], 1.0) if sinks_g else (LOWEST, 0.0)
        return self.do.full((rows, width), 0.0), self.do.full_rows(rows, top), self.do.full_rows(rows, total)

    def weigh(self, running: Running, s: jax.Array) -> tuple[Running, jax.Array]:
        """Returns the sums to which the products of weights and values are to be added, and the weights."""
        sums, top, total = running
        new = jnp.maximum(top, jnp.max(s, axis=1) * self.scores.to_log2)
        fade = jnp.exp2(top - new)
        weights = jnp.exp2(s * self.scores.to_log2 - lax.broadcast_in_dim(new, s.shape, (0,)))
        total = total * fade + jnp.sum(weights, axis=1)
        return (sums * lax.broadcast_in_dim(fade, sums.shape, (0,)), new, total), weights

    def store(self, running: Running, lse_g: MosaicValue, through_s: MosaicValue, out_g: MosaicValue) -> None:
        """Stores the log-sum-exp and the mean of the values."""
        sums, top, total = running
        self.do.store_rows(top + jnp.log2(total), lse_g)
        self.do.store(sums * lax.broadcast_in_dim(1 / total, sums.shape, (0,)), through_s, out_g)


class _Task(NamedTuple):
    """One forward pass: its softmax and sizes; `blocks` of queries per row, `group` heads per key head."""

    softmax: Softmax
    block: Block
    blocks: int
    kv_heads: int
    group: int
    width: int

    def kernel(self, q_g, k_g, v_g, visible_g, visits_g, whole_g, sinks_g, out_g, lse_g, q_s, k_s, v_s, *arrived):
        """Computes a block of queries of one head."""
        softmax, do, (rows, keys), width = self.softmax, self.softmax.do, self.block, self.width
        q_here, k_here, v_here = arrived
        b, i, n, kv = query_tile(self.blocks, self.kv_heads, self.group)
        row, visits = i * rows, Visits.load(visits_g.at[b, i], visible_g)

        def copy_keys(source_g, visited, target_s, here):
            do.copy(part(source_g, b, visits.block(visited) * keys, keys, kv, width), target_s, here)

        do.copy(part(q_g, b, row, rows, n, width), q_s, q_here)
        copy_keys(k_g, jnp.int32(0), k_s, k_here)
        do.wait(q_here)
        kept = list(do.left(q_s)) if width <= IN_REGISTERS else None

        def step(visited, running):
            column = visits.block(visited) * keys
            do.wait(k_here)
            copy_keys(v_g, visited, v_s, v_here)
            s = softmax.scores.capped_by_exp2(do.multiply_transposed(do.left(q_s) if kept is None else kept, k_s))
            do.wait(v_here)

            @pl.when(visited + 1 < visits.count)
            def _():
                copy_keys(k_g, visited + 1, k_s, k_here)

            s = hide_unless_whole(do, visible_g, whole_g.at[b, i], b, row, column, 0, s, HIDDEN)
            (sums, top, total), weights = softmax.weigh(running, s)
            return do.multiply_add(sums, weights, v_s), top, total

        running = lax.fori_loop(0, visits.count, step, softmax.start(rows, width, sinks_g, n))
        softmax.store(running, lse_g.at[b, n, pl.ds(row, rows)], q_s, part(out_g, b, row, rows, n, width))
