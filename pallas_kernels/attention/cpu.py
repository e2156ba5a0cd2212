"""Attention on CPUs by the C++ loops of pallas_kernels.native, in f32 and bf16.

Definition, roundings and residuals are those of `tiles`. Tiles have 64 queries, so that scores stay in the caches of
one core. Packed operands and sums are results of the handlers, so that XLA counts their memory. Per position these are
8 bytes per feature of a key head forward, and 12 per feature of a query head backward; 4 and 8 if numbers are
multiplied in pairs.

Dimension key: L layers, B batch, T positions, S cache slots, N q-heads, K kv-heads, H head_dim, I blocks of 64
positions, P = 64 I.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.branching import Spans
from pallas_kernels.attention.pages import KVPages
from pallas_kernels.attention.sinks import add_sinks, sinks_gradient
from pallas_kernels.attention.tiles import ScoreScaling, Texts
from pallas_kernels.native.library import handler, multiplies_bfloat16, problem

BLOCK = 64  # positions, as in attention_cpu.cc
WIDTH = 16  # packed rows are padded to a multiple of as many features
FEW_QUERIES = 8  # up to this many per row, the loop over a cache is faster than products with all slots
DTYPES = ("bfloat16", "float32")


def unsupported_reason(platform: str, dtype: DTypeLike) -> str | None:
    """Returns the reason why the loops cannot compute attention, or None if they can and are built.

    Args:
      platform: `cpu`, `gpu` or `tpu`, as JAX names it.
      dtype: dtype of queries, keys and values.
    """
    if platform != "cpu":
        return "C++ loops are for CPUs"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"C++ loops are for {' and '.join(DTYPES)}, not {jnp.dtype(dtype)}"
    return (missing := problem()) and f"C++ loops: {missing}"


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
    return _attention(q_BTNH, k_BTKH, v_BTKH, (_texts(texts), _window(window)), scores, sinks_N)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q_BTNH, k_BTKH, v_BTKH, limits, scores, sinks_N):
    return _forward(q_BTNH, k_BTKH, v_BTKH, limits, scores, sinks_N)[0]


def _forward(q_BTNH, k_BTKH, v_BTKH, limits, scores, sinks_N):
    (batch, length, heads, _), kv_heads = q_BTNH.shape, k_BTKH.shape[2]
    results = (
        _shaped(q_BTNH),
        jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        *(_packed(q_BTNH, kv_heads),) * 2,
    )
    out_BTNH, lse_BNT, *_ = _call("attention_forward", results, scores)(q_BTNH, k_BTKH, v_BTKH, *limits)
    if sinks_N is not None:
        out_BTNH, lse_BTN = add_sinks(out_BTNH, jnp.swapaxes(lse_BNT, 1, 2), sinks_N)
        lse_BNT = jnp.swapaxes(lse_BTN, 1, 2)
    # Named here, because a remat policy has to save what the backward pass reads.
    out_BTNH, lse_BNT = checkpoint_name(out_BTNH, "attention_out"), checkpoint_name(lse_BNT, "attention_lse")
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, limits, out_BTNH, lse_BNT, sinks_N)


def _backward(scores, residuals, do_BTNH):
    q_BTNH, k_BTKH, v_BTKH, limits, out_BTNH, lse_BNT, sinks_N = residuals
    batch, length, heads, width = q_BTNH.shape
    padded = -(-length // BLOCK) * BLOCK
    results = (
        *(_shaped(x) for x in (q_BTNH, k_BTKH, v_BTKH)),
        jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, padded, _padded(width)), jnp.float32),
        *(_packed(q_BTNH, heads),) * 2,
    )
    operands = (q_BTNH, k_BTKH, v_BTKH, *limits, out_BTNH, lse_BNT, do_BTNH)
    dq_BTNH, dk_BTKH, dv_BTKH, mean_BNP, *_ = _call("attention_backward", results, scores)(*operands)
    d_sinks_N = None
    if sinks_N is not None:
        d_sinks_N = sinks_gradient(sinks_N, *(jnp.swapaxes(x, 1, 2) for x in (mean_BNP[..., :length], lse_BNT)))
    return dq_BTNH, dk_BTKH, dv_BTKH, None, d_sinks_N


_attention.defvjp(_forward, _backward)


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
    """Returns softmax(scores, over visible cache slots) v; arguments as in `api.cached_attention`.

    The loop receives the whole cache, so that no slice is copied, and reads only the slots that are visible.
    """
    sinks = jnp.zeros(0) if sinks_N is None else sinks_N.astype(jnp.float32)
    limits = (positions_BT.astype(jnp.int32), _window(window))
    call = _call("attention_cached", [jax.ShapeDtypeStruct(q_BTNH.shape, jnp.float32)], scores)
    return call(q_BTNH, k_LBKSH, v_LBKSH, jnp.asarray(layer, jnp.int32), *limits, sinks)[0].astype(q_BTNH.dtype)


def unsupported_pages(platform: str, dtype: DTypeLike, pages: KVPages) -> str | None:
    """Returns the reason why the loops cannot attend over these pages with queries of a dtype, or None."""
    reason = unsupported_reason(platform, dtype)
    if reason is None and pages.k_scale is None:
        return unsupported_reason(platform, pages.k.dtype)
    return reason


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

    The loop receives all pages, so that no slice is copied, and reads only the positions that are visible.
    """
    none = jnp.zeros(0)
    scales = [none if x is None else x for x in (pages.k_scale, pages.v_scale)]
    sinks = none if sinks_N is None else sinks_N.astype(jnp.float32)
    places = (jnp.asarray(x, jnp.int32) for x in (pages.pages_LRI, layer, rows_BT, positions_BT))
    call = _call("attention_paged", [jax.ShapeDtypeStruct(q_BTNH.shape, jnp.float32)], scores)
    return call(q_BTNH, pages.k, pages.v, *scales, *places, _window(window), sinks)[0].astype(q_BTNH.dtype)


def _call(
    name: str, results: Sequence[jax.ShapeDtypeStruct], scores: ScoreScaling
) -> Callable[..., Sequence[jax.Array]]:
    call = jax.ffi.ffi_call(handler(name), results, vmap_method="sequential")
    return functools.partial(call, scale=np.float64(scores.scale), cap=np.float64(scores.softcap or 0.0))


def _shaped(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _padded(width: int) -> int:
    return -(-width // WIDTH) * WIDTH


def _packed(q_BTNH: jax.Array, heads: int) -> jax.ShapeDtypeStruct:
    """Returns the form of packed rows of so many heads: words of one number, or of a pair."""
    batch, length, _, width = q_BTNH.shape
    numbers = 2 if q_BTNH.dtype == jnp.bfloat16 and multiplies_bfloat16() else 1
    shape = (batch, heads, -(-length // BLOCK), BLOCK // numbers * _padded(width))
    return jax.ShapeDtypeStruct(shape, jnp.uint32)


def _texts(texts: Texts) -> jax.Array:
    """Returns [B, T], spans as [3, B, T], or [0, 0] if each row is one text, in int32."""
    if texts is None:
        return jnp.zeros((0, 0), jnp.int32)
    return (jnp.stack(texts) if isinstance(texts, Spans) else texts).astype(jnp.int32)


def _window(window: int | jax.Array | None) -> jax.Array:
    return jnp.asarray(0 if window is None else window, jnp.int32)  # 0: no window
