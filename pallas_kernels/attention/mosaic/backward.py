"""Flash attention backward: dq, and dk and dv. No atomics, so results are deterministic.

Both recompute the weights from the log-sum-exp. `dq` has tiles of queries and visits the keys that forward visits.
`dkv` has tiles of keys and visits the queries that see them, of every head of a group, so the sums over a group stay in
registers. It works on transposed scores [keys, queries]: weights and their gradients are left operands without a
transpose, and per-query values are per-column values. Hidden keys get weights of 0 after the exponential.

Dimension key: as in `forward`; J blocks of keys.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.attention.bounds import IN_REGISTERS, Block, Bounds
from pallas_kernels.attention.mosaic.instructions import Instructions, flat, part, query_tile, rem_div, swizzled
from pallas_kernels.attention.mosaic.mask import Visits, hide_unless_whole
from pallas_kernels.attention.tiles import ScoreScaling


def dq(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    out_BTNH: Float[Array, "B T N H"],
    do_BTNH: Float[Array, "B T N H"],
    lse_BNT: Float[Array, "B N T"],
    bounds: Bounds,
    scores: ScoreScaling,
    do: Instructions,
    block: Block,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Returns (dq, the sum over features of out * d_out in f32)."""
    (batch, length, heads, width), kv_heads = q_BTNH.shape, k_BTKH.shape[2]
    rows, keys = block
    task = _Dq(do, scores, block, length // rows, kv_heads, heads // kv_heads, width)
    call = plgpu.kernel(
        task.kernel,
        out_type=(
            jax.ShapeDtypeStruct((batch, length, heads * width), q_BTNH.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        grid=(batch * task.blocks * heads,),
        grid_names=("tile",),
        scratch_types=[
            *[swizzled(rows, width, q_BTNH.dtype)] * 2,
            *[swizzled(keys, width, q_BTNH.dtype)] * 2,
            *do.barriers(4),
        ],
        kernel_name="attention_dq",
        **do.options,
    )
    arrays = (flat(x) for x in (q_BTNH, k_BTKH, v_BTKH, out_BTNH, do_BTNH))
    d_q, mean_BNT = call(*arrays, lse_BNT, bounds.visible, bounds.dq, bounds.dq_whole)
    return d_q.reshape(q_BTNH.shape), mean_BNT


class _Dq(NamedTuple):
    """The kernel of dq: its instructions, scores and sizes, with so many `blocks` of queries per row."""

    do: Instructions
    scores: ScoreScaling
    block: Block
    blocks: int
    kv_heads: int
    group: int
    width: int

    def kernel(
        self, q_g, k_g, v_g, out_g, do_g, lse_g, visible_g, visits_g, whole_g, dq_g, mean_g, q_s, do_s, k_s, v_s, *here
    ):
        """Computes dq of a block of queries of one head."""
        do, (rows, keys), width = self.do, self.block, self.width
        q_here, do_here, k_here, v_here = here
        b, i, n, kv = query_tile(self.blocks, self.kv_heads, self.group)
        row, visits = i * rows, Visits.load(visits_g.at[b, i], visible_g)

        def queries_of(source_g):
            return part(source_g, b, row, rows, n, width)

        def copy_keys(source_g, visited, target_s, here):
            do.copy(part(source_g, b, visits.block(visited) * keys, keys, kv, width), target_s, here)

        do.copy(queries_of(q_g), q_s, q_here)
        do.copy(queries_of(do_g), do_s, do_here)
        copy_keys(k_g, jnp.int32(0), k_s, k_here)
        lse = do.along(lse_g.at[b, n, pl.ds(row, rows)], 0)
        do.wait(q_here)
        do.wait(do_here)
        mean = _mean(do, queries_of(out_g), do_s)
        do.store_rows(mean, mean_g.at[b, n, pl.ds(row, rows)])
        q_kept, do_kept = (list(do.left(q_s)), list(do.left(do_s))) if width <= IN_REGISTERS else (None, None)

        def step(visited, sums):
            column = visits.block(visited) * keys
            do.wait(k_here)
            copy_keys(v_g, visited, v_s, v_here)
            product = do.multiply_transposed(do.left(q_s) if q_kept is None else q_kept, k_s)
            s, weights = _weights(self.scores, product, lse, 0)
            weights = hide_unless_whole(do, visible_g, whole_g.at[b, i], b, row, column, 0, weights, 0.0)
            do.wait(v_here)
            d_weights = do.multiply_transposed(do.left(do_s) if do_kept is None else do_kept, v_s)
            sums = do.multiply_add(sums, _d_scores(self.scores, s, weights, d_weights, mean, 0), k_s)
            do.sync()

            @pl.when(visited + 1 < visits.count)
            def _():
                copy_keys(k_g, visited + 1, k_s, k_here)

            return sums

        sums = lax.fori_loop(0, visits.count, step, do.full((rows, width), 0.0))
        do.store(sums * self.scores.scale, q_s, queries_of(dq_g))


def _weights(scores: ScoreScaling, product: jax.Array, lse: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Returns (scores, weights) of a tile whose queries lie along an axis."""
    s = scores.capped_by_exp2(product)
    return s, jnp.exp2(s * scores.to_log2 - lax.broadcast_in_dim(lse, s.shape, (axis,)))


def _d_scores(
    scores: ScoreScaling, s: jax.Array, weights: jax.Array, d_weights: jax.Array, mean: jax.Array, axis: int
) -> jax.Array:
    """Returns the gradient of a tile of scores before the cap and the scale."""
    return scores.uncapped(weights * (d_weights - lax.broadcast_in_dim(mean, s.shape, (axis,))), s)


def _mean(do, out_g, do_s):
    """Returns the sum over features of out * d_out, in parts of as many features as fit the registers."""
    width = out_g.shape[1]
    size = width if width <= IN_REGISTERS else width // 2
    parts = [pl.ds(first, size) for first in range(0, width, size)]
    sums = [jnp.sum(do.tile(out_g.at[:, at]) * do.tile(do_s.at[:, at]), axis=1) for at in parts]
    return sum(sums[1:], sums[0])


def dkv(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    do_BTNH: Float[Array, "B T N H"],
    lse_BNT: Float[Array, "B N T"],
    mean_BNT: Float[Array, "B N T"],
    bounds: Bounds,
    scores: ScoreScaling,
    do: Instructions,
    block: Block,
) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Returns (dk, dv): from one kernel, or from two if the sums of both do not fit the registers."""
    how = {"scores": scores, "do": do, "block": block}
    run = functools.partial(_dkv, q_BTNH, k_BTKH, v_BTKH, do_BTNH, lse_BNT, mean_BNT, bounds, **how)
    if k_BTKH.shape[3] <= IN_REGISTERS:
        dk, dv = run(("dk", "dv"))
        return dk, dv
    return *run(("dk",)), *run(("dv",))


def _dkv(q, k, v, do_BTNH, lse_BNT, mean_BNT, bounds: Bounds, names: tuple[str, ...], *, scores, do, block):
    (batch, length, heads, width), kv_heads = q.shape, k.shape[2]
    queries, keys = block
    task = _Dkv(do, scores, names, block, length // keys, kv_heads, heads // kv_heads, width)
    call = plgpu.kernel(
        task.kernel,
        out_type=[jax.ShapeDtypeStruct((batch, length, kv_heads * width), k.dtype)] * len(names),
        grid=(batch * task.blocks * kv_heads,),
        grid_names=("tile",),
        scratch_types=[
            *[swizzled(queries, width, q.dtype)] * 2,
            *[swizzled(keys, width, q.dtype)] * 2,
            *do.barriers(4),
        ],
        kernel_name="attention_" + "_".join(names),
        **do.options,
    )
    arrays = (flat(x) for x in (q, k, v, do_BTNH))
    results = call(*arrays, lse_BNT, mean_BNT, bounds.visible, bounds.dkv, bounds.dkv_whole)
    return [x.reshape(k.shape) for x in results]


class _Dkv(NamedTuple):
    """The kernel of dk and dv, or of one of them: instructions, scores, sizes, and `blocks` of keys per row."""

    do: Instructions
    scores: ScoreScaling
    names: tuple[str, ...]
    block: Block
    blocks: int
    kv_heads: int
    group: int
    width: int

    def kernel(self, q_g, k_g, v_g, do_g, lse_g, mean_g, visible_g, visits_g, whole_g, *refs):
        """Computes the gradients of a block of keys of one key head."""
        do, (queries, keys), width = self.do, self.block, self.width
        results_g, (q_s, do_s, k_s, v_s, q_here, do_here, k_here, v_here) = (
            refs[: len(self.names)],
            refs[len(self.names) :],
        )
        kv, rest = rem_div(lax.axis_index("tile"), self.kv_heads)
        j, b = rem_div(rest, self.blocks)  # early keys, which most queries see, first
        column, visits = j * keys, Visits.load(visits_g.at[b, j], visible_g)

        def keys_of(source_g):
            return part(source_g, b, column, keys, kv, width)

        def place(visited):
            """Returns (block of queries, head)."""
            member, at = rem_div(visited, self.group)
            return visits.block(at), kv * self.group + member

        def copy_queries(source_g, visited, target_s, here):
            i, n = place(visited)
            do.copy(part(source_g, b, i * queries, queries, n, width), target_s, here)

        do.copy(keys_of(k_g), k_s, k_here)
        do.copy(keys_of(v_g), v_s, v_here)
        copy_queries(q_g, jnp.int32(0), q_s, q_here)
        do.wait(k_here)
        do.wait(v_here)

        def step(visited, sums):
            i, n = place(visited)
            row = i * queries
            of_row = pl.ds(pl.multiple_of(row, queries), queries)
            do.wait(q_here)
            copy_queries(do_g, visited, do_s, do_here)
            product = do.multiply_transposed(do.left(k_s), q_s)
            s, weights = _weights(self.scores, product, do.along(lse_g.at[b, n, of_row], 1), 1)
            weights = hide_unless_whole(do, visible_g, whole_g.at[b, i], b, row, column, 1, weights, 0.0)
            do.wait(do_here)
            added = self.add(sums, s, weights, mean_g.at[b, n, of_row], q_s, do_s, v_s)
            do.sync()

            @pl.when(visited + 1 < visits.count * self.group)
            def _():
                copy_queries(q_g, visited + 1, q_s, q_here)

            return added

        zeros = {name: do.full((keys, width), 0.0) for name in self.names}
        sums = lax.fori_loop(0, visits.count * self.group, step, zeros)
        for name, result_g in zip(self.names, results_g, strict=True):
            factor, through_s = {"dk": (self.scores.scale, k_s), "dv": (1.0, v_s)}[name]
            do.store(sums[name] * factor, through_s, keys_of(result_g))

    def add(self, sums, s, weights, mean_g, q_s, do_s, v_s):
        """Adds the products of one block of queries."""
        do, added = self.do, dict(sums)
        if "dv" in sums:
            added["dv"] = do.multiply_add(sums["dv"], weights, do_s)
        if "dk" in sums:
            mean = do.along(mean_g, 1)
            d_weights = do.multiply_transposed(do.left(v_s), do_s)
            added["dk"] = do.multiply_add(sums["dk"], _d_scores(self.scores, s, weights, d_weights, mean, 1), q_s)
        return added
