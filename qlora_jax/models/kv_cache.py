"""The key-value cache of decoding: keys and values of earlier positions, for all layers.

Dimension key: L layers, B batch, T positions of a call, K kv-heads, S cache slots, H head_dim.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.formats.qtensor import Leaf
from qlora_jax.models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of earlier positions: k, v [L, B, K, S, H], with rotated keys.

    Leaves may be ShapeDtypeStructs, for programs that are compiled before a cache exists.
    """

    k: Leaf
    v: Leaf

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int, dtype: DTypeLike) -> "KVCache":
        """Returns zeros for `slots` positions in each of `batch` rows."""
        shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
        return cls(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))

    def write(self, layer: jax.Array, k: jax.Array, v: jax.Array, index_BT: jax.Array) -> "KVCache":
        """Writes each row's keys and values [B, T, K, H] at that row's positions, in place inside a scan."""
        rows_B1 = jnp.arange(index_BT.shape[0])[:, None]
        put = [x.at[layer, rows_B1, :, index_BT].set(new.astype(x.dtype)) for x, new in ((self.k, k), (self.v, v))]
        return KVCache(k=put[0], v=put[1])
