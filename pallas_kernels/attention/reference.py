"""Attention over a key-value cache with all scores at once, in plain JAX, for every device.

Dimension key: L layers, B batch, T query, S cache slot, N q-heads, K kv-heads, G = N / K, H head_dim, Z = B K, M = G T.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.pages import KVPages
from pallas_kernels.attention.sinks import softmax_with_sinks
from pallas_kernels.attention.tiles import MASKED, ScoreScaling
from pallas_kernels.attention.tiling import Tiling
from pallas_kernels.dense_matmul import dot_nn, dot_nt


def cached_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_LBKSH: Float[Array, "L B K S H"],
    v_LBKSH: Float[Array, "L B K S H"],
    layer: Int[Array, ""] | int,
    positions_BT: Int[Array, "B T"],
    window: int | Int[Array, ""] | None,
    scores: ScoreScaling,
    sinks_N: Float[Array, " N"] | None,
) -> Float[Array, "B T N H"]:
    """Returns softmax(scores, over visible cache slots) v; arguments as in `api.cached_attention`."""
    batch, length, _, _ = q_BTNH.shape
    _, _, kv_heads, slots, width = k_LBKSH.shape
    queries = Tiling(batch, length, kv_heads, length)
    q_ZMH = queries.split(q_BTNH)[0]
    k_ZSH, v_ZSH = (
        jax.lax.dynamic_index_in_dim(x, layer, keepdims=False).reshape(batch * kv_heads, slots, width)
        for x in (k_LBKSH, v_LBKSH)
    )
    product_ZMS = dot_nt(q_ZMH, k_ZSH)
    scores_ZMS = product_ZMS * scores.scale if scores.softcap is None else scores.capped(product_ZMS)
    slots_S = jnp.arange(slots, dtype=positions_BT.dtype)
    visible_BTS = slots_S[None, None, :] <= positions_BT[:, :, None]
    if window is not None:
        visible_BTS &= slots_S[None, None, :] > positions_BT[:, :, None] - window
    visible_ZMS = jnp.tile(jnp.repeat(visible_BTS, kv_heads, axis=0), (1, q_ZMH.shape[1] // length, 1))
    seen_ZMS = jnp.where(visible_ZMS, scores_ZMS, MASKED)
    weights_ZMS = (
        jax.nn.softmax(seen_ZMS, axis=-1) if sinks_N is None else softmax_with_sinks(seen_ZMS, sinks_N, kv_heads)
    )
    out_ZMH = dot_nn(weights_ZMS.astype(v_LBKSH.dtype), v_ZSH).astype(q_BTNH.dtype)
    return queries.join(out_ZMH[None])


def paged_attention(
    q_BTNH: Float[Array, "B T N H"],
    pages: KVPages,
    layer: Int[Array, ""] | int,
    rows_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    window: int | Int[Array, ""] | None,
    scores: ScoreScaling,
    sinks_N: Float[Array, " N"] | None,
) -> Float[Array, "B T N H"]:
    """Returns softmax(scores, over visible positions) v; arguments as in `api.paged_attention`."""
    own = functools.partial(_of_rows, pages, layer, window, scores, sinks_N)
    if q_BTNH.shape[1] == 1:
        return own(rows_BT[:, 0], q_BTNH, positions_BT)

    def add_row(out_BTNH: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        here_BT = (rows_BT == row) & (positions_BT >= 0)

        def attend(out_BTNH: jax.Array) -> jax.Array:
            rows_B = jnp.full(q_BTNH.shape[0], row)
            return jnp.where(here_BT[:, :, None, None], own(rows_B, q_BTNH, positions_BT), out_BTNH)

        return jax.lax.cond(here_BT.any(), attend, lambda out_BTNH: out_BTNH, out_BTNH), None

    rows_R = jnp.arange(pages.pages_LRI.shape[1], dtype=rows_BT.dtype)
    return jax.lax.scan(add_row, jnp.zeros_like(q_BTNH), rows_R)[0]


def _of_rows(pages, layer, window, scores, sinks_N, rows_B, q_BTNH, positions_BT) -> jax.Array:
    """Returns attention of queries that are all of the row `rows_B` of their batch row."""
    own_BI = pages.pages_LRI[layer][rows_B]

    def gathered(values: jax.Array, scales: jax.Array | None) -> jax.Array:
        own = values[own_BI]  # [B, I, K, S, H]
        if scales is not None:
            own = (own.astype(jnp.float32) * scales[own_BI][..., None]).astype(q_BTNH.dtype)
        batch, blocks, heads, slots, width = own.shape
        return jnp.moveaxis(own, 1, 2).reshape(1, batch, heads, blocks * slots, width)

    k, v = gathered(pages.k, pages.k_scale), gathered(pages.v, pages.v_scale)
    return cached_attention(q_BTNH, k, v, 0, jnp.maximum(positions_BT, 0), window, scores, sinks_N)
