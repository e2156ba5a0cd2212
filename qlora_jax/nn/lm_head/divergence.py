"""Compares two models' predictions of the next token, exactly, without [tokens, vocab] logits.

KL(p || q) = sum_v p_v (log p_v - log q_v) = E_p[l - m] - log sum exp(l) + log sum exp(m), with the logits l of p and m
of q. The same pass over the head gives both models' log-probabilities of the target. All sums are running ones over
tiles of the head, as in tiles.py.

Dimension key: M tokens, D embed, C tokens of a chunk, W rows of the head in a tile.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from qlora_jax.nn.lm_head.chunks import map_token_chunks
from qlora_jax.nn.lm_head.head import Head, HeadWithRows, TrainableHead
from qlora_jax.nn.lm_head.sharded_vocabulary import ShardedHead, gather_tokens, own_tokens, sum_own_tokens
from qlora_jax.nn.lm_head.tiles import fold_tiles
from qlora_jax.sharding import FSDP

AnyHead = Head | ShardedHead | HeadWithRows | TrainableHead

NO_ROW = -1  # the place of a target that is not a row of the frozen head


class TokenComparison(NamedTuple):
    """Scores of each token under both models.

    Fields:
      nll_M, other_nll_M: -log p(target) and -log q(target), in nats.
      divergence_M: KL(p || q) in nats; at least 0, also where rounding would make it negative.
    """

    nll_M: jax.Array
    other_nll_M: jax.Array
    divergence_M: jax.Array


class ComparisonSums(NamedTuple):
    """Statistics of the logits l of p and m of q over the tiles so far.

    Fields:
      largest_C, sum_C: max l, and sum exp(l - largest).
      target_C: l of the target; 0 until its tile.
      weighted_C: sum exp(l - largest) (l - m).
      other_largest_C, other_sum_C, other_target_C: the same of m.
    """

    largest_C: jax.Array
    sum_C: jax.Array
    target_C: jax.Array
    weighted_C: jax.Array
    other_largest_C: jax.Array
    other_sum_C: jax.Array
    other_target_C: jax.Array

    @property
    def comparison(self) -> TokenComparison:
        """The scores of the tokens."""
        lse_C = jnp.log(self.sum_C) + self.largest_C
        other_lse_C = jnp.log(self.other_sum_C) + self.other_largest_C
        divergence_C = jnp.maximum(self.weighted_C / self.sum_C - lse_C + other_lse_C, 0.0)
        return TokenComparison(lse_C - self.target_C, other_lse_C - self.other_target_C, divergence_C)


def compare_tokens(
    hidden_MD: Float[Array, "M D"],
    head: AnyHead,
    other_MD: Float[Array, "M D"],
    other_head: AnyHead,
    targets_M: Int[Array, " M"],
    wanted_M: Bool[Array, " M"],
) -> TokenComparison:
    """Compares p, the prediction of `head`, with q, that of `other_head`, in f32.

    Not differentiable. Both heads are of one type, with the same trainable rows. Tokens that are not wanted score 0.
    """
    if isinstance(head, TrainableHead):
        head = head.cast(hidden_MD.dtype)
    if isinstance(other_head, TrainableHead):
        other_head = other_head.cast(other_MD.dtype)

    def of_chunk(both_C2D: jax.Array, head: Head | ShardedHead | HeadWithRows, targets_C: jax.Array) -> TokenComparison:
        hidden_CD, other_CD = jnp.split(both_C2D, 2, axis=1)
        return _sums(head, other_head, hidden_CD, other_CD, targets_C).comparison

    return map_token_chunks(of_chunk, jnp.concatenate([hidden_MD, other_MD], axis=1), head, targets_M, wanted_M)


def _sums(
    head: AnyHead, other_head: AnyHead, hidden_CD: jax.Array, other_CD: jax.Array, targets_C: jax.Array
) -> ComparisonSums:
    if isinstance(head, HeadWithRows) and isinstance(other_head, HeadWithRows):
        hot_CN = head.one_hot(targets_C)
        in_frozen_C = jnp.where(jnp.any(hot_CN, axis=1), NO_ROW, targets_C)
        run = _over_tiles(head.frozen, other_head.frozen, hidden_CD, other_CD, in_frozen_C)
        return _add(run, head.trained_logits(hidden_CD), other_head.trained_logits(other_CD), hot_CN)
    if isinstance(head, ShardedHead) and isinstance(other_head, ShardedHead):
        places_G = gather_tokens(targets_C) - head.weight_VD.start
        hidden_GD, other_GD = gather_tokens(hidden_CD), gather_tokens(other_CD)
        return _merged(_over_tiles(head.own, other_head.own, hidden_GD, other_GD, places_G))
    assert isinstance(head, Head) and isinstance(other_head, Head)
    return _over_tiles(head, other_head, hidden_CD, other_CD, targets_C)


def _over_tiles(
    head: Head, other_head: Head, hidden_CD: jax.Array, other_CD: jax.Array, targets_C: jax.Array
) -> ComparisonSums:
    zeros_C = jnp.zeros(hidden_CD.shape[0], jnp.float32)
    of_one = {"sum_C": zeros_C, "target_C": zeros_C, "weighted_C": zeros_C}
    of_other = {"other_sum_C": zeros_C, "other_target_C": zeros_C}
    start = ComparisonSums(largest_C=zeros_C - jnp.inf, other_largest_C=zeros_C - jnp.inf, **of_one, **of_other)

    def add(run: ComparisonSums, tiles: Sequence[Head], first: ArrayLike) -> ComparisonSums:
        logits_CW, others_CW = tiles[0].logits(hidden_CD), tiles[1].logits(other_CD)
        hot_CW = (targets_C - first)[:, None] == jnp.arange(logits_CW.shape[1])[None]
        return _add(run, logits_CW, others_CW, hot_CW)

    return fold_tiles(add, start, (head, other_head), hidden_CD.shape[0])


def _add(run: ComparisonSums, logits_CW: jax.Array, others_CW: jax.Array, hot_CW: jax.Array) -> ComparisonSums:
    """Adds one tile. A masked row has logits of -inf in both, and adds nothing.

    Args:
      hot_CW: True at each token's target, if it is in the tile.
    """
    largest_C = jnp.maximum(run.largest_C, jnp.max(logits_CW, axis=1))
    other_largest_C = jnp.maximum(run.other_largest_C, jnp.max(others_CW, axis=1))
    exp_CW = jnp.exp(logits_CW - largest_C[:, None])
    shrink_C = jnp.exp(run.largest_C - largest_C)
    weighted_CW = jnp.where(jnp.isneginf(logits_CW), 0.0, exp_CW * (logits_CW - others_CW))
    other_sum_C = jnp.sum(jnp.exp(others_CW - other_largest_C[:, None]), axis=1)
    return ComparisonSums(
        largest_C=largest_C,
        sum_C=run.sum_C * shrink_C + jnp.sum(exp_CW, axis=1),
        target_C=run.target_C + jnp.sum(jnp.where(hot_CW, logits_CW, 0.0), axis=1),
        weighted_C=run.weighted_C * shrink_C + jnp.sum(weighted_CW, axis=1),
        other_largest_C=other_largest_C,
        other_sum_C=run.other_sum_C * jnp.exp(run.other_largest_C - other_largest_C) + other_sum_C,
        other_target_C=run.other_target_C + jnp.sum(jnp.where(hot_CW, others_CW, 0.0), axis=1),
    )


def _merged(run: ComparisonSums) -> ComparisonSums:
    """Adds up the group's sums over its rows, and returns those of this device's tokens."""
    largest_G, other_largest_G = (lax.pmax(one, FSDP) for one in (run.largest_C, run.other_largest_C))
    shrink_G = jnp.exp(run.largest_C - largest_G)
    return ComparisonSums(
        largest_C=own_tokens(largest_G),
        sum_C=sum_own_tokens(run.sum_C * shrink_G),
        target_C=sum_own_tokens(run.target_C),  # 0 where the target is another device's row
        weighted_C=sum_own_tokens(run.weighted_C * shrink_G),
        other_largest_C=own_tokens(other_largest_G),
        other_sum_C=sum_own_tokens(run.other_sum_C * jnp.exp(run.other_largest_C - other_largest_G)),
        other_target_C=sum_own_tokens(run.other_target_C),
    )
