"""Causal attention in tiles of queries and keys, in plain JAX, for every device.

Scores exist for one tile at a time, as in flash attention (Dao et al., 2022). The softmax is summed tile by tile
against the largest score so far, and the backward pass recomputes each tile from the log-sum-exp. So memory is linear
in T, and no [T, T] array exists. Products have the form that is fast on CPUs (docs/cpu.md).

The same code runs on GPUs for calls that the kernels of `mma` do not support.

Dimension key: B batch, T query, N q-heads, K kv-heads, G = N / K q-heads a kv-head, H head_dim, Z = B K,
C positions of a chunk, M = G C, I chunks of queries, J chunks of P keys.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.branching import BranchingMask, Spans
from pallas_kernels.attention.sinks import add_sinks, sinks_gradient
from pallas_kernels.attention.tile_mask import AttentionMask, Tiling
from pallas_kernels.dense_matmul import dot_nn, dot_nt, dot_tn

MASKED = -1e30  # finite: a row of nothing but -inf would give NaN
Texts = Int[Array, "B T"] | Spans | None  # ids of segments; spans if rows have branches; None: each row is one text


class ScoreScaling(NamedTuple):
    """The map from products of queries and keys to scores."""

    scale: float
    softcap: float | None

    @property
    def to_log2(self) -> float:
        """Factor from a result of `capped` to the base-2 logarithm of a weight."""
        return (self.scale if self.softcap is None else 1.0) * math.log2(math.e)

    def capped(self, product: jax.Array) -> jax.Array:
        """Returns softcap tanh(scale product / softcap), or the product unchanged without a softcap."""
        if self.softcap is None:
            return product
        return self.softcap * jnp.tanh(product * (self.scale / self.softcap))

    def capped_by_exp2(self, product: jax.Array) -> jax.Array:
        """Computes `capped` in a kernel: its tanh.approx would err by 5e-4, which a softcap of 50 makes 0.025."""
        if self.softcap is None:
            return product
        factor = 2 * math.log2(math.e) * self.scale / self.softcap
        return self.softcap - (2 * self.softcap) / (1 + jnp.exp2(product * factor))

    def uncapped(self, d_capped: jax.Array, capped: jax.Array) -> jax.Array:
        """Returns the gradient of scale * product from the gradient of `capped`'s result."""
        if self.softcap is None:
            return d_capped
        return d_capped * (1 - jnp.square(capped / self.softcap))


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    texts: Texts,
    window: int | Int[Array, ""] | None,
    scores: ScoreScaling,
    sinks_N: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N H"]:
    """Returns softmax(scores, over visible keys) v; arguments as in `causal_attention`."""
    fixed, traced = (window, None) if window is None or isinstance(window, int) else (None, window)
    return _attention(q_BTNH, k_BTKH, v_BTKH, (texts, traced), scores, fixed, sinks_N)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q_BTNH, k_BTKH, v_BTKH, limits, scores, window, sinks_N):
    return _forward(q_BTNH, k_BTKH, v_BTKH, limits, scores, window, sinks_N)[0]


def _visibility(tiling: Tiling, limits, window: int | None) -> AttentionMask | BranchingMask:
    texts, traced = limits
    window = window if traced is None else traced
    if isinstance(texts, Spans):
        return BranchingMask.of(tiling, window, texts)
    return AttentionMask.of(tiling, window, texts)


def _forward(q_BTNH, k_BTKH, v_BTKH, limits, scores, window, sinks_N):
    tiling = Tiling.of(q_BTNH, k_BTKH)
    visibility = _visibility(tiling, limits, window)
    k_JZPH, v_JZPH = (tiling.key_tiling.split(x) for x in (k_BTKH, v_BTKH))
    step = functools.partial(_forward_chunk, k_JZPH, v_JZPH, visibility, scores)
    _, (out_IZMH, lse_IZM) = tiling.over_chunks(step, None, (tiling.split(q_BTNH),))
    out_BTNH = tiling.join(out_IZMH)
    if sinks_N is not None:
        out_BTNH, lse_BTN = add_sinks(out_BTNH, tiling.join(lse_IZM[..., None])[..., 0], sinks_N)
        lse_IZM = tiling.split(lse_BTN[..., None])[..., 0]
    # Named here, because a remat policy has to save what the backward pass reads.
    out_BTNH = checkpoint_name(out_BTNH, "attention_out")
    lse_IZM = checkpoint_name(lse_IZM, "attention_lse")
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, limits, out_BTNH, lse_IZM, sinks_N)


def _forward_chunk(k_JZPH, v_JZPH, visibility, scores, _, chunk):
    """Returns (None, (out, log2-sum-exp2)) of one chunk of queries, in the form of a scan's body."""
    i, q_ZMH = chunk
    to_log2 = scores.to_log2

    def tile(keys, carry):
        top_ZM, total_ZM, sum_ZMH = carry
        scores_ZMC = visibility.mask(scores.capped(dot_nt(q_ZMH, keys.of(k_JZPH))), i, keys, MASKED)
        new_ZM = jnp.maximum(top_ZM, jnp.max(scores_ZMC, axis=2))
        weights_ZMC = _rounded(exp2_of_scores((scores_ZMC - new_ZM[..., None]) * to_log2), q_ZMH.dtype)
        # If a query sees no key of a tile, its weights are 1; its own key, in the last tile, fades them to 0.
        fade_ZM = exp2_of_scores((top_ZM - new_ZM) * to_log2)
        total_ZM = total_ZM * fade_ZM + jnp.sum(weights_ZMC.astype(jnp.float32), axis=2)
        return new_ZM, total_ZM, sum_ZMH * fade_ZM[..., None] + dot_nn(weights_ZMC, keys.of(v_JZPH))

    zeros_ZMH = jnp.zeros(q_ZMH.shape, jnp.float32)
    start = (jnp.full(q_ZMH.shape[:2], MASKED, jnp.float32), zeros_ZMH[..., 0], zeros_ZMH)
    top_ZM, total_ZM, sum_ZMH = visibility.fold_tiles(tile, start, i)
    return None, ((sum_ZMH / total_ZM[..., None]).astype(q_ZMH.dtype), top_ZM * to_log2 + jnp.log2(total_ZM))


def _rounded(weights_ZMC: jax.Array, dtype: np.dtype) -> jax.Array:
    """Rounds weights; on CPUs, XLA would leave this out where it fuses it into a product with many rows."""
    weights_ZMC = weights_ZMC.astype(dtype)
    return jax.lax.platform_dependent(weights_ZMC, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def _backward(scores, window, residuals, do_BTNH):
    q_BTNH, k_BTKH, v_BTKH, limits, out_BTNH, lse_IZM, sinks_N = residuals
    tiling = Tiling.of(q_BTNH, k_BTKH)
    visibility = _visibility(tiling, limits, window)
    # sum over keys of weight x d_weight = sum over features of out x d_out: a pass over [T, H], not over the scores.
    mean_BTN1 = jnp.sum(do_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=3, keepdims=True)
    k_JZPH, v_JZPH = (tiling.key_tiling.split(x) for x in (k_BTKH, v_BTKH))
    step = functools.partial(_backward_chunk, k_JZPH, v_JZPH, visibility, scores)
    sums = (jnp.zeros_like(jnp.swapaxes(k_JZPH, 2, 3), jnp.float32),) * 2
    by_chunk = (*(tiling.split(x) for x in (q_BTNH, do_BTNH, mean_BTN1)), lse_IZM)
    (dk_JZHP, dv_JZHP), dq_IZMH = tiling.over_chunks(step, sums, by_chunk)
    dk_JZPH, dv_JZPH = (jnp.swapaxes(x, 2, 3).astype(k_BTKH.dtype) for x in (dk_JZHP * scores.scale, dv_JZHP))
    d_sinks_N = None
    if sinks_N is not None:
        d_sinks_N = sinks_gradient(sinks_N, mean_BTN1[..., 0], tiling.join(lse_IZM[..., None])[..., 0])
    return tiling.join(dq_IZMH), tiling.key_tiling.join(dk_JZPH), tiling.key_tiling.join(dv_JZPH), None, d_sinks_N


def _backward_chunk(k_JZPH, v_JZPH, visibility, scores, sums, chunk):
    """Adds the gradients from one chunk of queries to (dk^T / scale, dv^T) of all keys, and returns its dq."""
    i, q_ZMH, do_ZMH, mean_ZM1, lse_ZM = chunk

    def tile(keys, carry):
        dq_ZMH, dk_JZHP, dv_JZHP = carry
        k_ZCH = keys.of(k_JZPH)
        capped_ZMC = scores.capped(dot_nt(q_ZMH, k_ZCH))
        scores_ZMC = visibility.mask(capped_ZMC, i, keys, MASKED)
        weights_ZMC = exp2_of_scores(scores_ZMC * scores.to_log2 - lse_ZM[..., None]).astype(q_ZMH.dtype)
        d_weights_ZMC = dot_nt(do_ZMH, keys.of(v_JZPH))
        d_capped_ZMC = weights_ZMC.astype(jnp.float32) * (d_weights_ZMC - mean_ZM1)
        d_scores_ZMC = scores.uncapped(d_capped_ZMC, capped_ZMC).astype(q_ZMH.dtype)
        dk_JZHP = keys.add(dk_JZHP, dot_tn(q_ZMH, d_scores_ZMC))
        dv_JZHP = keys.add(dv_JZHP, dot_tn(do_ZMH, weights_ZMC))
        return dq_ZMH + dot_nn(d_scores_ZMC, k_ZCH), dk_JZHP, dv_JZHP

    start = (jnp.zeros(q_ZMH.shape, jnp.float32), *sums)
    dq_ZMH, dk_JZHP, dv_JZHP = visibility.fold_tiles(tile, start, i)
    return (dk_JZHP, dv_JZHP), (dq_ZMH * scores.scale).astype(q_ZMH.dtype)


_attention.defvjp(_forward, _backward)


# 2^f for |f| <= 1/2 by the polynomial that meets it at the Chebyshev points: 2e-7 relative in f32.
_DEGREE = 5
_INTERPOLANT = np.polynomial.chebyshev.Chebyshev.interpolate(np.exp2, _DEGREE, domain=[-0.5, 0.5])
_COEFFICIENTS = [float(c) for c in _INTERPOLANT.convert(kind=np.polynomial.Polynomial).coef]
_SMALLEST = -126.0  # 2^-126 is the smallest normal number


def exp2_of_scores(x: jax.Array) -> jax.Array:
    """Returns 2^x in f32 for x <= 0, within 3e-7 relative, and 0 below 2^-126; on CPUs in 0.6 of jnp.exp2's time."""
    return jax.lax.platform_dependent(x, cpu=_exp2_cpu, default=jnp.exp2)


def _exp2_cpu(x: jax.Array) -> jax.Array:
    """Returns 2^n p(f) with n the nearest integer, which is added to the exponent's bits."""
    clipped = jnp.maximum(x, _SMALLEST)
    nearest = jnp.round(clipped)  # jax 0.11 would remove an addition and subtraction of 1.5 * 2^23
    fraction = clipped - nearest
    power = jnp.full_like(x, _COEFFICIENTS[-1])
    for coefficient in _COEFFICIENTS[-2::-1]:
        power = power * fraction + coefficient
    exponent = nearest.astype(jnp.int32) << 23
    bits = jax.lax.bitcast_convert_type(power, jnp.int32) + exponent
    return jnp.where(x < _SMALLEST, 0.0, jax.lax.bitcast_convert_type(bits, jnp.float32))
