"""Compares two models' predictions of the next token, exactly, without [tokens, vocab] logits.

KL(p || q) = sum_v p_v (log p_v - log q_v) = E_p[l - m] - log sum exp(l) + log sum exp(m), with the logits l of p and m
of q. The same pass over the head gives both models' log-probabilities of the target. All sums are running ones over
tiles of the head, as in tiles.py.

Dimension key: M tokens, D embed, C tokens of a chunk, W rows of the head in a tile, P the pair of models p and q.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from qlora_jax.nn.lm_head.chunks import map_token_chunks
from qlora_jax.nn.lm_head.head import Head, HeadWithRows, TrainableHead
from qlora_jax.nn.lm_head.sharded_vocabulary import (
    AnyHead,
    ShardedHead,
    gather_tokens,
    own_tokens,
    sum_own_tokens,
)
from qlora_jax.nn.lm_head.tiles import fold_tiles
from qlora_jax.sharding import FSDP

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
    """Statistics of both models' logits over the tiles so far.

    Both are summed by one expression, so models with equal logits have equal sums on every processor: their
    log-probabilities are equal to the bit, and their divergence is 0.

    Fields:
      largest_CP, sum_CP: the largest logit, and sum exp(logit - largest).
      target_CP: the target's logit; 0 until its tile.
      weighted_C: sum exp(l - largest) (l - m), with the largest l.
    """

    largest_CP: jax.Array
    sum_CP: jax.Array
    target_CP: jax.Array
    weighted_C: jax.Array

    @property
    def comparison(self) -> TokenComparison:
        """The scores of the tokens."""
        lse_CP = jnp.log(self.sum_CP) + self.largest_CP
        nll_CP = lse_CP - self.target_CP
        divergence_C = self.weighted_C / self.sum_CP[:, 0] - (lse_CP[:, 0] - lse_CP[:, 1])
        return TokenComparison(nll_CP[:, 0], nll_CP[:, 1], jnp.maximum(divergence_C, 0.0))


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

    both_M2D = jnp.concatenate(_computed_alike(hidden_MD, other_MD), axis=1)
    return map_token_chunks(of_chunk, both_M2D, head, targets_M, wanted_M)


def _computed_alike(ours: jax.Array, others: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keeps XLA from computing the arrays within what reads them, where it might vectorize each in another way."""
    return lax.optimization_barrier((ours, others))


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
    zeros_CP = jnp.zeros((hidden_CD.shape[0], 2), jnp.float32)
    start = ComparisonSums(zeros_CP - jnp.inf, zeros_CP, zeros_CP, zeros_CP[:, 0])

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
    logits_CW, others_CW = _computed_alike(logits_CW, others_CW)
    logits_CPW = jnp.stack([logits_CW, others_CW], axis=1)
    largest_CP = jnp.maximum(run.largest_CP, jnp.max(logits_CPW, axis=2))
    exp_CPW = jnp.exp(logits_CPW - largest_CP[:, :, None])
    shrink_CP = jnp.exp(run.largest_CP - largest_CP)
    weighted_CW = jnp.where(jnp.isneginf(logits_CW), 0.0, exp_CPW[:, 0] * (logits_CW - others_CW))
    return ComparisonSums(
        largest_CP=largest_CP,
        sum_CP=run.sum_CP * shrink_CP + jnp.sum(exp_CPW, axis=2),
        target_CP=run.target_CP + jnp.sum(jnp.where(hot_CW[:, None], logits_CPW, 0.0), axis=2),
        weighted_C=run.weighted_C * shrink_CP[:, 0] + jnp.sum(weighted_CW, axis=1),
    )


def _merged(run: ComparisonSums) -> ComparisonSums:
    """Adds up the group's sums over its rows, and returns those of this device's tokens."""
    largest_GP = lax.pmax(run.largest_CP, FSDP)
    shrink_GP = jnp.exp(run.largest_CP - largest_GP)
    return ComparisonSums(
        largest_CP=own_tokens(largest_GP),
        sum_CP=sum_own_tokens(run.sum_CP * shrink_GP),
        target_CP=sum_own_tokens(run.target_CP),  # 0 where the target is another device's row
        weighted_C=sum_own_tokens(run.weighted_C * shrink_GP[:, 0]),
    )
