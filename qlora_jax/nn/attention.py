"""Causal attention for training, and attention over a key-value cache for decoding.

Scores exist for one chunk of queries at a time, and the backward pass makes them anew from the log-sum-exp: memory is
linear in T, and no [T, S] array is kept.

Dimension key: B batch, T query, S key, N q-heads, K kv-heads, G = N / K q-heads a kv-head, H head_dim, Z = B K,
C queries of a chunk, M = G C, I chunks of a run.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from qlora_jax.nn.dots import dot_nn, dot_nt, dot_tn

CHUNK = 128  # queries whose scores exist at once
RUNS = 8  # a run of chunks sees no key after its own end, so 8 runs compute 9/16 of the full square
MASKED = -1e30  # finite: a row of nothing but -inf would give NaN


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def causal_attention(
    q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"], v_BTKH: Float[Array, "B T K H"], scale: float
) -> Float[Array, "B T N H"]:
    """softmax(scale q k^T, over keys no later than the query) v; scores and sums in f32, the result in q's dtype.

    Query head n reads key head n // G.
    """
    return _forward(q_BTNH, k_BTKH, v_BTKH, scale)[0]


def _fold(x_BTNH: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, H] -> [Z, G, T, H]."""
    b, t, n, h = x_BTNH.shape
    x = x_BTNH.reshape(b, t, kv_heads, n // kv_heads, h)
    return x.transpose(0, 2, 3, 1, 4).reshape(b * kv_heads, n // kv_heads, t, h)


def _unfold(x_ZGTH: jax.Array, batch: int) -> jax.Array:
    """[Z, G, T, H] -> [B, T, N, H]."""
    z, g, t, h = x_ZGTH.shape
    x = x_ZGTH.reshape(batch, z // batch, g, t, h)
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, t, z // batch * g, h)


def _pad_to_chunks(x_BTNH: jax.Array) -> jax.Array:
    """Zeros after the last position: no real query sees them, since keys there are later than it."""
    length = x_BTNH.shape[1]
    extra = -length % min(CHUNK, length)
    return jnp.pad(x_BTNH, ((0, 0), (0, extra), (0, 0), (0, 0)))


def _runs(length: int) -> list[tuple[int, int]]:
    """(start, end) of each run of queries, whole chunks all."""
    chunk = min(CHUNK, length)
    chunks = length // chunk
    per_run = -(-chunks // RUNS)
    return [(i * chunk, min(i + per_run, chunks) * chunk) for i in range(0, chunks, per_run)]


def _chunks_of(x_ZGT: jax.Array, start: int, end: int) -> jax.Array:
    """[Z, G, T, ...] -> [I, Z, M, ...]: the chunks of one run, heads of a group folded into rows."""
    x = x_ZGT[:, :, start:end]
    z, g, t, *rest = x.shape
    c = min(CHUNK, x_ZGT.shape[2])
    x = jnp.moveaxis(x.reshape(z, g, t // c, c, *rest), 2, 0)
    return x.reshape(t // c, z, g * c, *rest)


def _join_chunks(x_IZM: jax.Array, groups: int) -> jax.Array:
    """The inverse of _chunks_of."""
    i, z, m, *rest = x_IZM.shape
    x = jnp.moveaxis(x_IZM.reshape(i, z, groups, m // groups, *rest), 0, 2)
    return x.reshape(z, groups, i * (m // groups), *rest)


def _scores(q_ZMH: jax.Array, k_ZSH: jax.Array, first: jax.Array, groups: int, scale: float) -> jax.Array:
    """Masked scores of the chunk whose first query stands at position `first`."""
    scores_ZMS = dot_nt(q_ZMH, k_ZSH) * scale
    c = q_ZMH.shape[1] // groups
    query_M = first + jnp.tile(jnp.arange(c, dtype=jnp.int32), groups)
    visible_MS = jnp.arange(k_ZSH.shape[1], dtype=jnp.int32)[None, :] <= query_M[:, None]
    return jnp.where(visible_MS[None], scores_ZMS, MASKED)


def _starts(start: int, end: int, length: int) -> jax.Array:
    return jnp.arange(start, end, min(CHUNK, length), dtype=jnp.int32)


def _forward(q_BTNH, k_BTKH, v_BTKH, scale):
    batch, length, _, _ = q_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    q_ZGTH, k_ZG1SH, v_ZG1SH = (_fold(_pad_to_chunks(x), kv_heads) for x in (q_BTNH, k_BTKH, v_BTKH))
    k_ZSH, v_ZSH = k_ZG1SH[:, 0], v_ZG1SH[:, 0]
    groups, padded = q_ZGTH.shape[1], q_ZGTH.shape[2]
    outs, lses = [], []
    for start, end in _runs(padded):

        def chunk(args, end=end):
            q_ZMH, first = args
            scores = _scores(q_ZMH, k_ZSH[:, :end], first, groups, scale)
            top = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            out = dot_nn(weights.astype(v_ZSH.dtype), v_ZSH[:, :end]) / total
            return out.astype(q_ZMH.dtype), (top + jnp.log(total))[..., 0]

        out, lse = jax.lax.map(chunk, (_chunks_of(q_ZGTH, start, end), _starts(start, end, padded)))
        outs.append(_join_chunks(out, groups))
        lses.append(_join_chunks(lse, groups))
    out_BTNH = _unfold(jnp.concatenate(outs, axis=2), batch)[:, :length]
    lse_ZGT = checkpoint_name(jnp.concatenate(lses, axis=2), "attention_lse")
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, lse_ZGT)


def _backward(scale, residuals, do_BTNH):
    q_BTNH, k_BTKH, v_BTKH, lse_ZGT = residuals
    batch, length, _, _ = q_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    q_ZGTH, do_ZGTH, k_ZG1SH, v_ZG1SH = (_fold(_pad_to_chunks(x), kv_heads) for x in (q_BTNH, do_BTNH, k_BTKH, v_BTKH))
    k_ZSH, v_ZSH = k_ZG1SH[:, 0], v_ZG1SH[:, 0]
    groups, padded = q_ZGTH.shape[1], q_ZGTH.shape[2]
    dk_ZSH, dv_ZSH = jnp.zeros(k_ZSH.shape, jnp.float32), jnp.zeros(v_ZSH.shape, jnp.float32)
    dqs = []
    for start, end in _runs(padded):

        def chunk(sums, args, end=end):
            q_ZMH, do_ZMH, lse_ZM, first = args
            scores = _scores(q_ZMH, k_ZSH[:, :end], first, groups, scale)
            weights = jnp.exp(scores - lse_ZM[..., None])
            d_weights = dot_nt(do_ZMH, v_ZSH[:, :end])
            mean = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
            d_scores = (weights * (d_weights - mean) * scale).astype(q_ZMH.dtype)
            dk = sums[0] + dot_tn(d_scores, q_ZMH)
            dv = sums[1] + dot_tn(weights.astype(do_ZMH.dtype), do_ZMH)
            return (dk, dv), dot_nn(d_scores, k_ZSH[:, :end], q_ZMH.dtype)

        zeros = (dk_ZSH[:, :end] * 0, dv_ZSH[:, :end] * 0)
        args = [_chunks_of(x, start, end) for x in (q_ZGTH, do_ZGTH, lse_ZGT)]
        (dk, dv), dq = jax.lax.scan(chunk, zeros, (*args, _starts(start, end, padded)))
        dk_ZSH, dv_ZSH = dk_ZSH.at[:, :end].add(dk), dv_ZSH.at[:, :end].add(dv)
        dqs.append(_join_chunks(dq, groups))
    dq_BTNH = _unfold(jnp.concatenate(dqs, axis=2), batch)[:, :length]
    dk_BTKH, dv_BTKH = (_unfold(x[:, None].astype(k_BTKH.dtype), batch)[:, :length] for x in (dk_ZSH, dv_ZSH))
    return dq_BTNH, dk_BTKH, dv_BTKH


causal_attention.defvjp(_forward, _backward)


def cached_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    positions_BT: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T N H"]:
    """softmax(scale q k^T, over cache slots no later than the query's position) v, in q's dtype."""
    batch, length, _, _ = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q_ZGTH, k_ZG1SH, v_ZG1SH = (_fold(x, kv_heads) for x in (q_BTNH, k_BSKH, v_BSKH))
    z, groups, _, h = q_ZGTH.shape
    scores_ZMS = dot_nt(q_ZGTH.reshape(z, groups * length, h), k_ZG1SH[:, 0]) * scale
    slots_S = jnp.arange(k_BSKH.shape[1], dtype=positions_BT.dtype)
    visible_BTS = slots_S[None, None, :] <= positions_BT[:, :, None]
    visible_ZMS = jnp.tile(jnp.repeat(visible_BTS, kv_heads, axis=0), (1, groups, 1))
    weights = jax.nn.softmax(jnp.where(visible_ZMS, scores_ZMS, MASKED), axis=-1)
    out_ZMH = dot_nn(weights.astype(v_BSKH.dtype), v_ZG1SH[:, 0]).astype(q_BTNH.dtype)
    return _unfold(out_ZMH.reshape(z, groups, length, h), batch)
