"""Divergence of two models' predictions of the next token, exactly, without [tokens, vocab] logits.

KL(p || q) = sum_v p_v (log p_v - log q_v) = E_p[l - m] - log sum exp(l) + log sum exp(m), with the logits l of p and m
of q. All sums are running ones over tiles of the head, as in tiles.py.

Dimension key: M tokens, D embed, C tokens of a chunk, W rows of the head in a tile.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float

from qlora_jax.nn.lm_head.chunks import map_token_chunks
from qlora_jax.nn.lm_head.head import Head, HeadWithRows, TrainableHead
from qlora_jax.nn.lm_head.sharded_vocabulary import ShardedHead, gather_tokens, own_tokens, sum_own_tokens
from qlora_jax.nn.lm_head.tiles import fold_tiles
from qlora_jax.sharding import FSDP

AnyHead = Head | ShardedHead | HeadWithRows | TrainableHead


class DivergenceSums(NamedTuple):
    """Statistics of the logits l of p and m of q over the tiles so far.

    Fields:
      largest_C, sum_C: max l, and sum exp(l - largest).
      weighted_C: sum exp(l - largest) (l - m).
      other_largest_C, other_sum_C: max m, and sum exp(m - other_largest).
    """

    largest_C: jax.Array
    sum_C: jax.Array
    weighted_C: jax.Array
    other_largest_C: jax.Array
    other_sum_C: jax.Array

    @property
    def divergence_C(self) -> jax.Array:
        """KL(p || q) in nats; rounding may make that of equal predictions slightly negative."""
        lse_C, other_lse_C = (
            jnp.log(sum_C) + largest_C
            for sum_C, largest_C in ((self.sum_C, self.largest_C), (self.other_sum_C, self.other_largest_C))
        )
        return self.weighted_C / self.sum_C - lse_C + other_lse_C


def token_divergence(
    hidden_MD: Float[Array, "M D"],
    head: AnyHead,
    other_MD: Float[Array, "M D"],
    other_head: AnyHead,
    wanted_M: Bool[Array, " M"],
) -> Float[Array, " M"]:
    """Returns KL(p || q) in nats, in f32, where p is the prediction of `head` and q that of `other_head`.

    Not differentiable. Both heads are of one type, with the same trainable rows. Tokens that are not wanted have 0.
    """
    if isinstance(head, TrainableHead):
        head = head.cast(hidden_MD.dtype)
    if isinstance(other_head, TrainableHead):
        other_head = other_head.cast(other_MD.dtype)

    def of_chunk(both_C2D: jax.Array, head: Head | ShardedHead | HeadWithRows, _: jax.Array) -> jax.Array:
        return _sums(head, other_head, *jnp.split(both_C2D, 2, axis=1)).divergence_C

    both_M2D = jnp.concatenate([hidden_MD, other_MD], axis=1)
    return map_token_chunks(of_chunk, both_M2D, head, jnp.zeros_like(wanted_M, jnp.int32), wanted_M)


def _sums(head: AnyHead, other_head: AnyHead, hidden_CD: jax.Array, other_CD: jax.Array) -> DivergenceSums:
    if isinstance(head, HeadWithRows) and isinstance(other_head, HeadWithRows):
        run = _over_tiles(head.frozen, other_head.frozen, hidden_CD, other_CD)
        return _add(run, head.trained_logits(hidden_CD), other_head.trained_logits(other_CD))
    if isinstance(head, ShardedHead) and isinstance(other_head, ShardedHead):
        return _merged(_over_tiles(head.own, other_head.own, gather_tokens(hidden_CD), gather_tokens(other_CD)))
    assert isinstance(head, Head) and isinstance(other_head, Head)
    return _over_tiles(head, other_head, hidden_CD, other_CD)


def _over_tiles(head: Head, other_head: Head, hidden_CD: jax.Array, other_CD: jax.Array) -> DivergenceSums:
    zeros_C = jnp.zeros(hidden_CD.shape[0], jnp.float32)
    start = DivergenceSums(zeros_C - jnp.inf, zeros_C, zeros_C, zeros_C - jnp.inf, zeros_C)

    def add(run: DivergenceSums, tiles: Sequence[Head], _: ArrayLike) -> DivergenceSums:
        return _add(run, tiles[0].logits(hidden_CD), tiles[1].logits(other_CD))

    return fold_tiles(add, start, (head, other_head), hidden_CD.shape[0])


def _add(run: DivergenceSums, logits_CW: jax.Array, others_CW: jax.Array) -> DivergenceSums:
    """Adds one tile. A masked row has logits of -inf in both, and adds nothing."""
    largest_C = jnp.maximum(run.largest_C, jnp.max(logits_CW, axis=1))
    other_largest_C = jnp.maximum(run.other_largest_C, jnp.max(others_CW, axis=1))
    exp_CW = jnp.exp(logits_CW - largest_C[:, None])
    shrink_C = jnp.exp(run.largest_C - largest_C)
    weighted_CW = jnp.where(jnp.isneginf(logits_CW), 0.0, exp_CW * (logits_CW - others_CW))
    other_sum_C = jnp.sum(jnp.exp(others_CW - other_largest_C[:, None]), axis=1)
    return DivergenceSums(
        largest_C=largest_C,
        sum_C=run.sum_C * shrink_C + jnp.sum(exp_CW, axis=1),
        weighted_C=run.weighted_C * shrink_C + jnp.sum(weighted_CW, axis=1),
        other_largest_C=other_largest_C,
        other_sum_C=run.other_sum_C * jnp.exp(run.other_largest_C - other_largest_C) + other_sum_C,
    )


def _merged(run: DivergenceSums) -> DivergenceSums:
    """Adds up the group's sums over its rows, and returns those of this device's tokens."""
    largest_G, other_largest_G = (lax.pmax(one, FSDP) for one in (run.largest_C, run.other_largest_C))
    shrink_G = jnp.exp(run.largest_C - largest_G)
    return DivergenceSums(
        largest_C=own_tokens(largest_G),
        sum_C=sum_own_tokens(run.sum_C * shrink_G),
        weighted_C=sum_own_tokens(run.weighted_C * shrink_G),
        other_largest_C=own_tokens(other_largest_G),
        other_sum_C=sum_own_tokens(run.other_sum_C * jnp.exp(run.other_largest_C - other_largest_G)),
    )
