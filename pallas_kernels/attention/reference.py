"""Attention over a key-value cache with all scores at once, in plain JAX, for every device.

Dimension key: L layers, B batch, T query, S cache slot, N q-heads, K kv-heads, G = N / K, H head_dim, Z = B K, M = G T.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
