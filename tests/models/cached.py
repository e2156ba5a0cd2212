"""Rows of equal length that go through a cache."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import KVPages
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import CausalLM


def empty_cache(config: ModelConfig, rows: int, positions: int) -> KVPages:
    return KVPages.for_rows(config.num_layers, rows, positions, (config.num_kv_heads, config.head_dim), jnp.float32)


def extend(model: CausalLM, tokens_BT: jax.Array, start: int, cache: KVPages, length: int):
    """(hidden states, cache) of tokens at positions start, start + 1, ... of rows 0, 1, ..."""
    rows, count = tokens_BT.shape
    rows_BT = jnp.broadcast_to(jnp.arange(rows)[:, None], tokens_BT.shape)
    positions_BT = jnp.broadcast_to(start + jnp.arange(count), tokens_BT.shape)
    return model.extend(tokens_BT, rows_BT, positions_BT, cache, length)
