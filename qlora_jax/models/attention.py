"""The decoder's attention: projections, norms and rotations of queries and keys, and an optional key-value cache.

Dimension key: B batch, T positions, D embed, N q-heads, K kv-heads, H head_dim, J frequencies, L
layers, R distinct rotations, M = B T.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from pallas_kernels.attention import KVPages, causal_attention, paged_attention, shared_bounds
from pallas_kernels.attention.bounds import Bounds
from pallas_kernels.attention.branching import Spans
from qlora_jax.models.config import ModelConfig
from qlora_jax.nn.linear import ModuleAdapter, QLinear, project
from qlora_jax.nn.norm import LayerNorm, RMSNorm
from qlora_jax.nn.rope import Rope, rotate, rotate_by_row, rotations
from qlora_jax.nn.variables import Frozen, select_layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions:
    """Positions, texts and rotations of the tokens of a call.

    Attributes:
      index_BT: position in its text, from 0; -1 for padding of a call with a cache.
      segments_BT: id of the text of each token; None if each row is one text, or has `spans`.
      spans: positions that each token sees, if rows have branches.
      cos, sin: rotation of each position, [B, T, J], or [R, B, T, J] if layers differ.
      query_scale_BT: factor of the queries of each position; None: 1.
      rows_BT: row of the cache of each token; None without a cache.
      bounds: of attention, if it computes them once for all layers.
    """

    index_BT: jax.Array
    segments_BT: jax.Array | None
    spans: Spans | None
    cos: jax.Array
    sin: jax.Array
    query_scale_BT: jax.Array | None = None
    rows_BT: jax.Array | None = None
    bounds: Bounds | None = None

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        index_BT: jax.Array,
        segments_BT: jax.Array | None,
        length: int,
        spans: Spans | None = None,
    ) -> "Positions":
        """Creates positions with the rotations of up to `length` positions."""
        kinds = list(dict.fromkeys(config.ropes)) or [config.rope]
        each = [_rotations(rope, config, index_BT, length) for rope in kinds]
        cos, sin = each[0] if len(each) == 1 else (jnp.stack(x) for x in zip(*each, strict=True))
        growth = config.query_position_scale
        return cls(index_BT, segments_BT, spans, cos, sin, None if growth is None else growth.factors(index_BT))

    def with_bounds(self, config: ModelConfig, dtype: DTypeLike) -> "Positions":
        """Returns positions with what the attention of whole rows shares among layers.

        Args:
          dtype: of the queries.
        """
        batch, length = self.index_BT.shape
        counts = set(config.visible_counts(length))
        if len(counts) > 1:
            return self
        bounds = shared_bounds(
            (batch, length, config.num_heads, config.head_dim),
            dtype,
            window=_one_window(counts.pop(), length),
            segments_BT=self.segments_BT,
            spans=self.spans,
            softcap=config.attention_softcap,
        )
        return dataclasses.replace(self, bounds=bounds)

    def kind_of(self, config: ModelConfig, layer: jax.Array) -> jax.Array | None:
        """Returns the index of a layer's rotation, or None if all layers share one."""
        if self.cos.ndim == 3:
            return None
        kinds = list(dict.fromkeys(config.ropes))
        return jnp.asarray([kinds.index(rope) for rope in config.ropes], jnp.int32)[layer]


def _rotations(rope: Rope | None, config: ModelConfig, index_BT: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    cos_BTJ, sin_BTJ = rotations(rope or config.rope, index_BT, length)
    return (cos_BTJ, sin_BTJ) if rope else (jnp.ones_like(cos_BTJ), jnp.zeros_like(sin_BTJ))


def _window(config: ModelConfig, layer: jax.Array, length: int) -> jax.Array | int | None:
    """Returns the window of a layer: traced if layers differ, and None if all see all `length` positions."""
    seen = config.visible_counts(length)
    if len(set(seen)) > 1:
        return jnp.asarray(seen, jnp.int32)[layer]
    return _one_window(seen[0], length)


def _one_window(seen: int, length: int) -> int | None:
    return seen if seen < length else None


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; its projections and its result accept adapters."""

    q_proj: QLinear
    k_proj: QLinear
    v_proj: QLinear
    qkv_proj: QLinear  # in place of the three above if fused
    o_proj: QLinear

    def __init__(
        self,
        linears: dict[str, QLinear],
        norms: dict[str, RMSNorm | LayerNorm],
        config: ModelConfig,
        dtype: DTypeLike,
    ):
        for name, module in {**linears, **norms}.items():
            setattr(self, name, module)
        heads = (config.num_layers, config.num_heads)
        self.sinks = Frozen(jnp.zeros(heads, dtype)) if config.attention_sinks else None
        self.config = config
        self.adapter: ModuleAdapter | None = nnx.data(None)  # data: an adapter may be set later

    def __call__(self, x_MD, positions: Positions, layer, keys_B, cache: KVPages | None):
        q, k, v = self._projected(x_MD, positions.index_BT.shape, layer, keys_B)
        q, k = (
            self._normed_and_rotated("q_norm", "query", q, positions, layer),
            self._normed_and_rotated("k_norm", "key", k, positions, layer),
        )
        length = q.shape[1] if cache is None else self.config.max_positions
        seen = {"window": _window(self.config, layer, length), "softcap": self.config.attention_softcap}
        sinks_N = None if self.sinks is None else select_layer(self.sinks.get_value(), layer)
        scale = self.config.query_scale or self.config.head_dim**-0.5
        if cache is None:
            v = self._clipped(checkpoint_name(v, "value"))
            with jax.named_scope("attention"):
                texts = {"segments_BT": positions.segments_BT, "spans": positions.spans, "bounds": positions.bounds}
                out_BTNH = causal_attention(q, k, v, scale, **texts, **seen, sinks_N=sinks_N)
        else:
            assert positions.rows_BT is not None, "`CausalLM.extend` sets it"
            places = positions.rows_BT, positions.index_BT
            cache = cache.write(layer, k, self._clipped(v), *places)
            out_BTNH = paged_attention(q, cache, layer, *places, scale, **seen, sinks_N=sinks_N)
        out_MD = out_BTNH.reshape(x_MD.shape[0], -1)
        result_MD = self.o_proj(out_MD, layer, keys_B)
        return result_MD if self.adapter is None else self.adapter(result_MD), cache

    def _projected(self, x_MD, shape_BT, layer, keys_B) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns q [B, T, N, H], k and v [B, T, K, H]."""
        config = self.config
        heads = (*shape_BT, -1, config.head_dim)
        if config.fused_qkv is None:
            q, k, v = (y.reshape(heads) for y in project([self.q_proj, self.k_proj, self.v_proj], x_MD, layer, keys_B))
            return q, k, v
        fused = self.qkv_proj(x_MD, layer, keys_B).reshape(heads)
        if config.fused_qkv == "heads":
            by_head = fused.reshape(*shape_BT, config.num_heads, 3, config.head_dim)
            return by_head[..., 0, :], by_head[..., 1, :], by_head[..., 2, :]
        q, k, v = jnp.split(fused, [config.num_heads, config.num_heads + config.num_kv_heads], axis=2)
        return q, k, v

    def _normed_and_rotated(self, norm: str, kept_as: str, x_BTNH: jax.Array, positions: Positions, layer) -> jax.Array:
        """Normalizes and clips queries or keys if the model does, and rotates them.

        Names the norm's input for remat, or the result if the model has no such norm.
        """
        if self.config.qk_norm is not None:
            x_BTNH = checkpoint_name(x_BTNH, kept_as)
            wide = x_BTNH if self.config.qk_norm == "head" else x_BTNH.reshape(*x_BTNH.shape[:2], -1)
            x_BTNH = getattr(self, norm)(wide, layer).reshape(x_BTNH.shape)
        x_BTNH = self._clipped(x_BTNH)
        with jax.named_scope("rope"):
            kind = positions.kind_of(self.config, layer)
            turn = rotate if positions.rows_BT is None else rotate_by_row
            x_BTNH = turn(x_BTNH, positions.cos, positions.sin, kind, self.config.rope_interleaved)
            if norm == "q_norm" and positions.query_scale_BT is not None:
                x_BTNH *= positions.query_scale_BT[:, :, None, None].astype(x_BTNH.dtype)
        return checkpoint_name(x_BTNH, kept_as) if self.config.qk_norm is None else x_BTNH

    def _clipped(self, x_BTNH: jax.Array) -> jax.Array:
        limit = self.config.clip_qkv
        return x_BTNH if limit is None else jnp.clip(x_BTNH, -limit, limit)
