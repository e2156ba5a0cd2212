"""Causal attention for training, and attention over a key-value cache for decoding, by the best loops of each device.

Dimension key: B batch, T query, N q-heads, K kv-heads, H head_dim.
"""

import math

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import cpu, gpu, reference
from pallas_kernels.attention.bounds import BLOCKS, Bounds
from pallas_kernels.attention.branching import Spans
from pallas_kernels.attention.dispatch import IMPLEMENTATIONS, choose, choose_decoding
from pallas_kernels.attention.pages import KVPages
from pallas_kernels.attention.tiles import ScoreScaling
from pallas_kernels.devices import target_device


def causal_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    scale: float,
    *,
    window: int | Int[Array, ""] | None = None,
    segments_BT: Int[Array, "B T"] | None = None,
    spans: Spans | None = None,
    softcap: float | None = None,
    sinks_N: Float[Array, " N"] | None = None,
    bounds: Bounds | None = None,
) -> Float[Array, "B T N H"]:
    """Returns softmax(scale q k^T, over visible keys) v in q's dtype; scores and sums are in f32.

    `dispatch.choose` returns the implementation that runs it on a device, and why others do not.

    With a softcap c the scores are c tanh(scale q k^T / c).

    Query head n reads key head n // G. A key is visible if 0 <= query's position - key's position < window, as in
    transformers' sliding windows, and if both have the same segment.

    Args:
      scale: factor of the scores, above zero.
      window: number of positions that a query sees, including its own; None: all earlier positions. A traced value,
        above zero, serves layers with different windows.
      segments_BT: id of the text that each position belongs to, for packed rows. Ids should ascend: chunks of keys
        before the first one with the queries' ids are then skipped.
      spans: positions that each query sees, for packed rows with branches, in place of `segments_BT`.
      softcap: cap of the scores; None: no cap.
      sinks_N: logit per head that takes part in each softmax and has no value; None: no sinks.
      bounds: of `shared_bounds` for the same keys, which layers share; None: computed here.

    Raises:
      ValueError: `scale`, `window` or `softcap` is not above zero; or `spans` with `segments_BT`.
    """
    _check(scale, window, softcap)
    if spans is not None and segments_BT is not None:
        raise ValueError("attention: found spans and segments_BT, expected one of them. Spans include the segments.")
    chosen = IMPLEMENTATIONS[str(choose(target_device(), q_BTNH.dtype, q_BTNH.shape[3], q_BTNH.size).name)]
    texts = bounds or (segments_BT if spans is None else spans)
    return chosen(q_BTNH, k_BTKH, v_BTKH, texts, window, ScoreScaling(scale, softcap), sinks_N)


def shared_bounds(
    shape_BTNH: tuple[int, int, int, int],
    dtype: DTypeLike,
    *,
    window: int | None,
    segments_BT: Int[Array, "B T"] | None,
    spans: Spans | None,
    softcap: float | None,
) -> Bounds | None:
    """Returns what `causal_attention` would compute in every layer of equal windows; None if that is nothing.

    A layer that is rematerialized would compute it again, because nothing that it computes leaves the loop.

    Args:
      shape_BTNH: of the queries.
      dtype: of the queries.
    """
    batch, length, _, head_dim = shape_BTNH
    name = str(choose(target_device(), dtype, head_dim, math.prod(shape_BTNH)).name)
    if name not in BLOCKS:
        return None
    texts = segments_BT if spans is None else spans
    return gpu.bounds_of(batch, length, texts, window, BLOCKS[name](head_dim, capped=softcap is not None))


def _check(scale: float, window: int | jax.Array | None, softcap: float | None) -> None:
    if scale <= 0 or (isinstance(window, int) and window <= 0) or (softcap is not None and softcap <= 0):
        raise ValueError(f"attention: found {scale=}, {window=}, {softcap=}, expected numbers above zero.")


def paged_attention(
    q_BTNH: Float[Array, "B T N H"],
    pages: KVPages,
    layer: Int[Array, ""] | int,
    rows_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    scale: float,
    *,
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
    sinks_N: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N H"]:
    """Returns softmax(scale q k^T, over visible positions) v of a layer in q's dtype.

    By the C++ loops, a query's result depends only on its keys and values, to the bit: not on other queries or page
    numbers. This holds among calls of one token per row, and among calls of several tokens per row. Codes of pages are
    multiplied by their factors in f32, and attention is then that of pages in f32.
    The kernel of NVIDIA cards computes calls of one token per row, and the same holds.

    Args:
      rows_BT: the row of the pages' table that each query belongs to.
      positions_BT: its position there. It sees that position and those before it. -1: it sees nothing and gets zeros.
      scale, window, softcap, sinks_N: as in `causal_attention`.

    Raises:
      ValueError: as `causal_attention`.
    """
    _check(scale, window, softcap)
    device, scores = target_device(), ScoreScaling(scale, softcap)
    loops = cpu if cpu.unsupported_pages(device.platform, q_BTNH.dtype, pages) is None else reference
    if q_BTNH.shape[1] == 1 and choose_decoding(device, q_BTNH.dtype, q_BTNH.shape[3], pages.k.dtype).name == "mma":
        loops = gpu
    return loops.paged_attention(q_BTNH, pages, layer, rows_BT, positions_BT, window, scores, sinks_N)
