"""Maps a function of hidden states and head over chunks of tokens, without those that nobody wants.

Dimension key: M tokens, D embed, C tokens of a chunk, I chunks.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.devices import target_device
from qlora_jax.nn.lm_head.head import Head, HeadWithRows
from qlora_jax.nn.lm_head.sharded_vocabulary import ShardedHead
from qlora_jax.nn.lm_head.tiles import tile_size


def chunk_size(tokens: int, shards: int = 1) -> int:
    """Returns the number of `tokens` that this device adds to a chunk, which `shards` devices compute together."""
    return max(1, tile_size(target_device().platform, tokens * shards, 1).tokens // shards)


def map_token_chunks[AnyHead: Head | ShardedHead | HeadWithRows, Result](
    of_chunk: Callable[[jax.Array, AnyHead, jax.Array], Result],
    hidden_MD: jax.Array,
    head: AnyHead,
    targets_M: jax.Array,
    wanted_M: jax.Array,
) -> Result:
    """Maps of_chunk over chunks of wanted tokens; results are in the original order, and zero for unwanted tokens.

    Wanted tokens are sorted to the front, so only their chunks are computed. With a ShardedHead a chunk is computed if
    any device of the group wants one of its tokens, because all of them have to take part.

    Args:
      of_chunk: (hidden_CD, head, targets_C) -> arrays with a leading axis C.
    """
    sharded = isinstance(head, ShardedHead)
    size = chunk_size(hidden_MD.shape[0], head.shards if sharded else 1)
    any_wanted = head.any_in_group if sharded else jnp.any
    order_M = jnp.argsort(~wanted_M, stable=True)
    chunks = split_chunks((hidden_MD, targets_M, wanted_M), order_M, size)
    shapes = jax.eval_shape(of_chunk, chunks[0][0], head, chunks[1][0])

    def one(_, chunk):
        hidden, targets, wanted = chunk
        results = jax.lax.cond(
            any_wanted(wanted),
            lambda: of_chunk(hidden, head, targets),
            lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
        )
        return None, jax.tree.map(lambda r: _masked(r, wanted), results)

    _, results = jax.lax.scan(one, None, chunks)
    place_M = jnp.argsort(order_M)
    return jax.tree.map(lambda r: r.reshape(-1, *r.shape[2:])[place_M], results)


def split_chunks(arrays: tuple[jax.Array, ...], order_M: jax.Array, size: int) -> tuple[jax.Array, ...]:
    """Reorders each [M, ...] and splits it to [I, size, ...]; the last chunk is padded with zeros."""
    padding = -order_M.shape[0] % size

    def one(x: jax.Array) -> jax.Array:
        return jnp.pad(x[order_M], ((0, padding),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, size, *x.shape[1:])

    return jax.tree.map(one, arrays)


def _masked(result: jax.Array, wanted_C: jax.Array) -> jax.Array:
    keep = wanted_C.reshape(wanted_C.shape + (1,) * (result.ndim - 1))
    return jnp.where(keep, result, jnp.zeros((), result.dtype))
