"""`causal_attention` on CPUs with AVX-512, by the C++ handlers of pallas_kernels.native.

Definition, roundings and residuals are the same. Tiles have 64 queries, so that scores stay in the caches of one core.
In bf16 both passes run here if the processor has bf16 products; in f32 only the forward pass does. Packed operands and
sums are results of the handlers, so that XLA counts their memory. Per position these are 4 K H bytes forward (8 in f32)
and 8 N H bytes backward.

Dimension key: B batch, T positions, N q-heads, K kv-heads, H head_dim, I blocks of 64 positions, P = 64 I.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.native.library import attention_problem
from qlora_jax.nn.attention.branching import Spans
from qlora_jax.nn.attention.sinks import add_sinks, sinks_gradient

Texts = Int[Array, "B T"] | Spans | None  # ids of segments; spans if rows have branches; None: each row is one text
BLOCK = 64  # positions, as in attention_cpu.cc
WIDTHS = range(32, 257, 32)  # supported head_dim


def unsupported_reason(platform: str, dtype: DTypeLike, width: int, *, plain: bool) -> str | None:
    """Returns the reason why the handlers cannot compute these heads, or None if they can and are built.

    Args:
      platform: `cpu`, `gpu` or `tpu`, as JAX names it.
      dtype: dtype of queries, keys and values.
      width: features per head.
      plain: True for scores without soft cap and one window for all layers.
    """
    if platform != "cpu":
        return "C++ loops are for CPUs"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"C++ loops are for bfloat16, not {jnp.dtype(dtype)}"
    if width not in WIDTHS:
        return f"C++ loops are for heads of 32, 64, ... {WIDTHS[-1]} features, not {width}"
    if not plain:
        return "C++ loops are for attention without a soft cap, and with one window for all layers"
    return (missing := attention_problem()) and f"C++ loops: {missing}"


def supports_forward_f32(platform: str, dtype: DTypeLike, width: int, *, plain: bool) -> bool:
    """True if `forward_f32` computes heads of this dtype and width on this platform; `plain` as above."""
    at_home = platform == "cpu" and jnp.dtype(dtype) == jnp.float32 and plain
    return at_home and width % 16 == 0 and width <= WIDTHS[-1] and attention_problem("float32") is None


def visited_pairs(length: int, window: int) -> int:
    """Counts the (query, key) pairs of the blocks that the handlers visit: 64^2 I (I + 1) / 2 without a window."""
    firsts = [max(i * BLOCK - window + 1, 0) // BLOCK if window < length else 0 for i in range(-(-length // BLOCK))]
    return BLOCK**2 * sum(i + 1 - first for i, first in enumerate(firsts))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    texts: Texts,
    scale: float,
    window: int | None,
    sinks_N: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N H"]:
    """Returns softmax(scale q k^T, over visible keys) v; arguments as in `causal_attention`."""
    return _forward(q_BTNH, k_BTKH, v_BTKH, texts, scale, window, sinks_N)[0]


def _forward(q_BTNH, k_BTKH, v_BTKH, texts, scale, window, sinks_N):
    (batch, length, heads, width), kv_heads = q_BTNH.shape, k_BTKH.shape[2]
    blocks = -(-length // BLOCK)
    results = (
        _shaped(q_BTNH),
        jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        *(jax.ShapeDtypeStruct((batch, kv_heads, blocks, BLOCK // 2 * width), jnp.uint32),) * 2,
    )
    call = jax.ffi.ffi_call("attention_forward", results, vmap_method="sequential")
    ids = _operand(texts)
    out_BTNH, lse_BNT, *_ = call(q_BTNH, k_BTKH, v_BTKH, ids, scale=np.float64(scale), window=np.int64(window or 0))
    if sinks_N is not None:
        out_BTNH, lse_BTN = add_sinks(out_BTNH, jnp.swapaxes(lse_BNT, 1, 2), sinks_N)
        lse_BNT = jnp.swapaxes(lse_BTN, 1, 2)
    # Named here, because a remat policy has to save what the backward pass reads.
    out_BTNH, lse_BNT = checkpoint_name(out_BTNH, "attention_out"), checkpoint_name(lse_BNT, "attention_lse")
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, texts, out_BTNH, lse_BNT, sinks_N)


def _backward(scale, window, residuals, do_BTNH):
    q_BTNH, k_BTKH, v_BTKH, texts, out_BTNH, lse_BNT, sinks_N = residuals
    batch, length, heads, width = q_BTNH.shape
    blocks = -(-length // BLOCK)
    results = (
        *(_shaped(x) for x in (q_BTNH, k_BTKH, v_BTKH)),
        jax.ShapeDtypeStruct((batch, heads, blocks * BLOCK), jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, blocks * BLOCK, width), jnp.float32),
        *(jax.ShapeDtypeStruct((batch, heads, blocks, BLOCK // 2 * width), jnp.uint32),) * 2,
    )
    call = jax.ffi.ffi_call("attention_backward", results, vmap_method="sequential")
    operands = (q_BTNH, k_BTKH, v_BTKH, _operand(texts), out_BTNH, lse_BNT, do_BTNH)
    how = dict(scale=np.float64(scale), window=np.int64(window or 0))
    dq_BTNH, dk_BTKH, dv_BTKH, mean_BNP, *_ = call(*operands, **how)
    d_sinks_N = None
    if sinks_N is not None:
        d_sinks_N = sinks_gradient(sinks_N, *(jnp.swapaxes(x, 1, 2) for x in (mean_BNP[..., :length], lse_BNT)))
    return dq_BTNH, dk_BTKH, dv_BTKH, None, d_sinks_N


def forward_f32(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    texts: Texts,
    scale: float,
    window: int | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Returns (softmax(scale q k^T, over visible keys) v, log2-sum-exp2 of each query's scores); not differentiable."""
    (batch, length, heads, width), kv_heads = q_BTNH.shape, k_BTKH.shape[2]
    packed = jax.ShapeDtypeStruct((batch, kv_heads, -(-length // BLOCK), BLOCK * width), jnp.float32)
    results = _shaped(q_BTNH), jax.ShapeDtypeStruct((batch, heads, length), jnp.float32), packed, packed
    call = jax.ffi.ffi_call("attention_forward_f32", results, vmap_method="sequential")
    how = dict(scale=np.float64(scale), window=np.int64(window or 0))
    out_BTNH, lse_BNT, *_ = call(q_BTNH, k_BTKH, v_BTKH, _operand(texts), **how)
    return out_BTNH, lse_BNT


def _shaped(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _operand(texts: jax.Array | Spans | None) -> jax.Array:
    """Returns [B, T], spans as [3, B, T], or [0, 0] if each row is one text, in int32."""
    if texts is None:
        return jnp.zeros((0, 0), jnp.int32)
    return (jnp.stack(texts) if isinstance(texts, Spans) else texts).astype(jnp.int32)


attention.defvjp(_forward, _backward)
