"""Attention sinks: one logit per query head that enters the softmax of every query and has no value (gpt-oss).

With lse the log-sum-exp of a query's scores, the sink divides all weights by 1 + e^(sink - lse). So attention is first
computed without it. Then the result is scaled, and lse gets the sink's share: a backward pass that recomputes weights
from lse needs no other change. The sink's gradient is -p sum(out * d_out), with p the weight that it has taken.

Log-sum-exps are base-2 logarithms here. Dimension key: B batch, T query, N q-heads, K kv-heads, H head_dim, S keys,
G = N / K, M = G T rows of one key head, Z = B K.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LOG2_E = math.log2(math.e)


def add_sinks(
    out_BTNH: Float[Array, "B T N H"], lse_BTN: Float[Array, "B T N"], sinks_N: Float[Array, " N"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns (out, lse) of attention with sinks from those of attention without them.

    Args:
      lse_BTN: log2-sum-exp2 of each query's scores, in f32.
      sinks_N: natural logits.
    """
    with_sinks_BTN = jnp.logaddexp2(lse_BTN, _log2(sinks_N))
    kept_BTN1 = jnp.exp2(lse_BTN - with_sinks_BTN)[..., None]
    return (out_BTNH.astype(jnp.float32) * kept_BTN1).astype(out_BTNH.dtype), with_sinks_BTN


def sinks_gradient(
    sinks_N: Float[Array, " N"], mean_BTN: Float[Array, "B T N"], lse_BTN: Float[Array, "B T N"]
) -> Float[Array, " N"]:
    """Returns the gradient of the sinks, in their dtype.

    Args:
      mean_BTN: sum over features of out * d_out, in f32; 0 for padding.
      lse_BTN: log2-sum-exp2 of scores and sink.
    """
    weights_BTN = jnp.exp2(_log2(sinks_N) - lse_BTN)
    return -jnp.sum(weights_BTN * mean_BTN, axis=(0, 1)).astype(sinks_N.dtype)


def _log2(sinks_N: jax.Array) -> Float[Array, "1 1 N"]:
    return sinks_N.astype(jnp.float32)[None, None] * LOG2_E


def softmax_with_sinks(
    scores_ZMS: Float[Array, "Z M S"], sinks_N: Float[Array, " N"], kv_heads: int
) -> Float[Array, "Z M S"]:
    """Returns the weights of the keys, which sum to 1 less the weight of the sink.

    Args:
      scores_ZMS: rows as in `tiling.Tiling.split`: for each key head, its query heads, each with all queries.
    """
    rows, per_head, _ = scores_ZMS.shape
    sinks_KG = sinks_N.astype(scores_ZMS.dtype).reshape(kv_heads, -1)
    sinks_KM = jnp.repeat(sinks_KG, per_head // sinks_KG.shape[1], axis=1)
    sinks_ZM1 = jnp.tile(sinks_KM, (rows // kv_heads, 1))[..., None]
    return jax.nn.softmax(jnp.concatenate([scores_ZMS, sinks_ZM1], axis=-1), axis=-1)[..., :-1]
