"""Attention over a key-value cache with all scores at once, in plain JAX, for every device.

Dimension key: L layers, B batch, T query, R rows and I pages of a row in a table, S cache slots, N q-heads, K kv-heads,
G = N / K, H head_dim, Z = B K, M = G T, C queries of a chunk.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.pages import KVPages, dequantize
from pallas_kernels.attention.sinks import softmax_with_sinks
from pallas_kernels.attention.tile_mask import Tiling
from pallas_kernels.attention.tiles import MASKED, ScoreScaling
from pallas_kernels.dense_matmul import dot_nn, dot_nt

CHUNK = 64  # queries whose scores exist at a time


def _attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    positions_BT: Int[Array, "B T"],
    window: int | Int[Array, ""] | None,
    scores: ScoreScaling,
    sinks_N: Float[Array, " N"] | None,
) -> Float[Array, "B T N H"]:
    batch, length, _, _ = q_BTNH.shape
    kv_heads, slots, width = k_BKSH.shape[1:]
    queries = Tiling(batch, length, kv_heads, length)
    q_ZMH = queries.split(q_BTNH)[0]
    k_ZSH, v_ZSH = (x.reshape(batch * kv_heads, slots, width) for x in (k_BKSH, v_BKSH))
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
    out_ZMH = dot_nn(weights_ZMS.astype(v_BKSH.dtype), v_ZSH).astype(q_BTNH.dtype)
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
    """Returns softmax(scores, over visible positions) v; arguments as in `api.paged_attention`.

    Several tokens per row are computed in chunks of CHUNK queries, and these for each row that they have.
    """
    table_RI = pages.pages_LRI[layer]
    dtype = q_BTNH.dtype if pages.k.dtype == q_BTNH.dtype else jnp.float32

    def of_rows(q_BTNH, rows_B, positions_BT):
        seen_B = jnp.max(positions_BT, axis=1)
        k_BKSH = _numbers(pages.k, pages.k_scale, table_RI[rows_B], seen_B, dtype)
        v_BKSH = _numbers(pages.v, pages.v_scale, table_RI[rows_B], seen_B, dtype)
        out_BTNH = _attention(q_BTNH.astype(dtype), k_BKSH, v_BKSH, positions_BT, window, scores, sinks_N)
        return jnp.where(positions_BT[:, :, None, None] < 0, 0, out_BTNH).astype(q_BTNH.dtype)

    def of_chunk(chunk):
        q_CNH, rows_C, positions_C = chunk

        def of_next_row(state):
            out_CNH, left_C = state
            row = rows_C[jnp.argmax(left_C)]
            here_C = left_C & (rows_C == row)
            found_BCNH = of_rows(q_CNH[None], row[None], jnp.where(here_C, positions_C, -1)[None])
            return jnp.where(here_C[:, None, None], found_BCNH[0], out_CNH), left_C & ~here_C

        start = jnp.zeros_like(q_CNH), positions_C >= 0
        return jax.lax.while_loop(lambda state: jnp.any(state[1]), of_next_row, start)[0]

    if q_BTNH.shape[1] == 1:
        return of_rows(q_BTNH, rows_BT[:, 0], positions_BT)
    count = rows_BT.size
    padding = -count % CHUNK
    flat = q_BTNH.reshape(count, *q_BTNH.shape[2:]), rows_BT.reshape(count), positions_BT.reshape(count)
    padded = (jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)), constant_values=-1) for x in flat)
    out_ICNH = jax.lax.map(of_chunk, tuple(x.reshape(-1, CHUNK, *x.shape[1:]) for x in padded))
    return out_ICNH.reshape(-1, *q_BTNH.shape[2:])[:count].reshape(q_BTNH.shape)


def _numbers(
    numbers: jax.Array, scales: jax.Array | None, pages_BI: jax.Array, seen_B: jax.Array, dtype: DTypeLike
) -> Float[Array, "B K S H"]:
    """Returns the numbers of rows of pages; those after the positions that are seen are zeros, as they may be NaN."""
    x_BIKSH = numbers[pages_BI] if scales is None else dequantize(numbers[pages_BI], scales[pages_BI])
    x_BKSH = jnp.moveaxis(x_BIKSH, 1, 2).reshape(len(pages_BI), x_BIKSH.shape[2], -1, x_BIKSH.shape[4])
    seen_BS = jnp.arange(x_BKSH.shape[2])[None] <= seen_B[:, None]
    return jnp.where(seen_BS[:, None, :, None], x_BKSH, 0).astype(dtype)
