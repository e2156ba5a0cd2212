"""Attention by the Mosaic kernels of `mosaic` on NVIDIA GPUs, in bf16 and f16: of whole rows, and of pages.

There are two sets of kernels for whole rows, by the instruction that multiplies. `mma` has mma.sync, for many cards.
`wgmma` is for Hopper; its backward pass is that of `mma` where its sums would spill (`bounds.wgmma_blocks`).

Definition and residuals are those of `tiles`. Rows are padded to whole blocks. No query of a row sees its padding.

Dimension key: B batch, T positions, N q-heads, K kv-heads, H head_dim.
"""

import functools
import importlib
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.bounds import BLOCKS, Blocks, Bounds, Kernels, Visible
from pallas_kernels.attention.pages import KVPages
from pallas_kernels.attention.sinks import sinks_gradient
from pallas_kernels.attention.tiles import ScoreScaling, Texts
from pallas_kernels.devices import target_device


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    texts: Texts | Bounds,
    window: int | Int[Array, ""] | None,
    scores: ScoreScaling,
    sinks_N: Float[Array, " N"] | None = None,
    *,
    kernels: Kernels,
) -> Float[Array, "B T N H"]:
    """Returns softmax(scores, over visible keys) v; arguments as in `causal_attention`; bounds include the window."""
    batch, length, _, head_dim = q_BTNH.shape
    how = kernels, BLOCKS[kernels](head_dim, capped=scores.softcap is not None)
    bounds = texts if isinstance(texts, Bounds) else bounds_of(batch, length, texts, window, how[1])
    return _attention(q_BTNH, k_BTKH, v_BTKH, bounds, scores, how, sinks_N)


def bounds_of(batch: int, length: int, texts: Texts, window: int | Int[Array, ""] | None, blocks: Blocks) -> Bounds:
    """Returns what the kernels read about rows of `length` positions."""
    visible = Visible.of(batch, length, texts, window).padded(length + -length % blocks.longest)
    return Bounds.of(visible, blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q_BTNH, k_BTKH, v_BTKH, bounds, scores, how, sinks_N):
    return _forward(q_BTNH, k_BTKH, v_BTKH, bounds, scores, how, sinks_N)[0]


def _forward(q_BTNH, k_BTKH, v_BTKH, bounds, scores, how, sinks_N):
    length, (kernels, blocks) = q_BTNH.shape[1], how
    arrays = (_padded(x, 1, blocks) for x in (q_BTNH, k_BTKH, v_BTKH))
    forward = _module({"mma": "forward", "wgmma": "hopper"}[kernels]).forward
    do = instructions(q_BTNH.dtype, kernels)
    out_BTNH, lse_BNT = forward(*arrays, bounds, sinks_N, scores, do, blocks.forward)
    # Named here, because a remat policy has to save what the backward pass reads.
    out_BTNH = checkpoint_name(out_BTNH[:, :length], "attention_out")
    lse_BNT = checkpoint_name(lse_BNT[..., :length], "attention_lse")
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, bounds, out_BTNH, lse_BNT, sinks_N)


def _backward(scores, how, residuals, do_BTNH):
    q_BTNH, k_BTKH, v_BTKH, bounds, out_BTNH, lse_BNT, sinks_N = residuals
    length, (_, blocks), passes = q_BTNH.shape[1], how, _module("backward")
    do = instructions(q_BTNH.dtype, blocks.backward)
    *qkv, padded_out, padded_do = (_padded(x, 1, blocks) for x in (q_BTNH, k_BTKH, v_BTKH, out_BTNH, do_BTNH))
    padded_lse = _padded(lse_BNT, 2, blocks)
    dq_BTNH, mean_BNT = passes.dq(*qkv, padded_out, padded_do, padded_lse, bounds, scores, do, blocks.dq)
    dk_BTKH, dv_BTKH = passes.dkv(*qkv, padded_do, padded_lse, mean_BNT, bounds, scores, do, blocks.dkv)
    d_sinks_N = None
    if sinks_N is not None:
        d_sinks_N = sinks_gradient(sinks_N, *(jnp.swapaxes(x, 1, 2) for x in (mean_BNT[..., :length], lse_BNT)))
    return *(x[:, :length] for x in (dq_BTNH, dk_BTKH, dv_BTKH)), None, d_sinks_N


_attention.defvjp(_forward, _backward)


def paged_attention(
    q_BTNH: Float[Array, "B 1 N H"],
    pages: KVPages,
    layer: Int[Array, ""] | int,
    rows_BT: Int[Array, "B 1"],
    positions_BT: Int[Array, "B 1"],
    window: int | Int[Array, ""] | None,
    scores: ScoreScaling,
    sinks_N: Float[Array, " N"] | None,
) -> Float[Array, "B 1 N H"]:
    """Returns softmax(scores, over visible positions) v of one token per row; arguments as in `api.paged_attention`.

    A query's result depends only on its keys and values, to the bit.
    """
    decode, how = _module("decode").decode, (window, scores, sinks_N, decoding_instructions())
    return decode(q_BTNH[:, 0], pages, layer, rows_BT[:, 0], positions_BT[:, 0], *how)[:, None]


def _padded(x: jax.Array, axis: int, blocks: Blocks) -> jax.Array:
    """Returns an array whose positions, along `axis`, fill whole blocks; those at the end are zeros."""
    more = -x.shape[axis] % blocks.longest
    return jnp.pad(x, [(0, more if at == axis else 0) for at in range(x.ndim)]) if more else x


def _module(name: str) -> ModuleType:
    """Imports a module of `mosaic` on its first call: importing Mosaic takes most of a second."""
    return importlib.import_module(f"pallas_kernels.attention.mosaic.{name}")


def instructions(dtype: DTypeLike, kernels: Kernels) -> object:
    """Returns the instructions of the target device."""
    kinds = _module("instructions")
    if kernels == "wgmma":
        return kinds.Wgmma(dtype)
    capability = target_device().compute_capability or (0, 0)
    return (kinds.Tma if capability >= (9, 0) else kinds.CpAsync)(dtype)


def decoding_instructions() -> object:
    """Returns the maker of a decoding kernel's instructions, which are those of every card."""
    return _module("decode_instructions").Machine
