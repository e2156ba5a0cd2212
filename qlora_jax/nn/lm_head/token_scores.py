"""Scores of target tokens for evaluation: negative log-likelihood, and agreement with greedy decoding.

Dimension key: M tokens, D embed, C tokens of a chunk, N trainable rows of the head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.nn.lm_head.chunks import map_token_chunks
from qlora_jax.nn.lm_head.head import Head, HeadWithRows, TrainableHead
from qlora_jax.nn.lm_head.sharded_vocabulary import ShardedHead, sum_over_head
from qlora_jax.nn.lm_head.tiles import first_id_where, sum_over_tiles


class TokenScores(NamedTuple):
    """Scores per token.

    Fields:
      nll_M: -log softmax(logits)[target] in nats.
      likeliest_M: argmax(logits) == target; the smallest id wins a tie.
    """

    nll_M: jax.Array
    likeliest_M: jax.Array


def token_scores(
    hidden_MD: Float[Array, "M D"],
    head: Head | ShardedHead | HeadWithRows | TrainableHead,
    targets_M: Int[Array, " M"],
    wanted_M: Bool[Array, " M"],
) -> TokenScores:
    """Scores targets by the head's f32 logits, which never exist for all tokens and ids at once.

    Not differentiable, unlike `token_nll`. Tokens that are not wanted score 0 and False.
    """
    if isinstance(head, TrainableHead):
        head = head.cast(hidden_MD.dtype)
    if isinstance(head, HeadWithRows):
        return map_token_chunks(_with_rows, hidden_MD, head, targets_M, wanted_M)
    return map_token_chunks(_frozen, hidden_MD, head, targets_M, wanted_M)


def _frozen(hidden_CD: jax.Array, head: Head | ShardedHead, targets_C: jax.Array) -> TokenScores:
    run = sum_over_head(hidden_CD, head, targets_C, first=True)
    return TokenScores(run.nll_C, run.first_C == targets_C)


def _with_rows(hidden_CD: jax.Array, head: HeadWithRows, targets_C: jax.Array) -> TokenScores:
    """Treats the trainable rows as one more tile, whose ids may lie anywhere."""
    run = sum_over_tiles(hidden_CD, head.frozen, targets_C, first=True)
    assert run.first_C is not None
    own_CN, hot_CN = head.trained_logits(hidden_CD), head.one_hot(targets_C)
    own_C = jnp.max(own_CN, axis=1)
    own_first_C = first_id_where(own_CN == own_C[:, None], jnp.asarray(head.ids))
    # A masked row is never the argmax: its logit is -inf.
    first_C = jnp.where(own_C > run.largest_C, own_first_C, run.first_C)
    first_C = jnp.where(own_C == run.largest_C, jnp.minimum(own_first_C, run.first_C), first_C)
    target_C = jnp.where(jnp.any(hot_CN, axis=1), jnp.sum(jnp.where(hot_CN, own_CN, 0.0), axis=1), run.target_C)
    lse_C = jnp.logaddexp(run.lse_C, jax.nn.logsumexp(own_CN, axis=1))
    return TokenScores(lse_C - target_C, first_C == targets_C)
