"""Logits of some chosen tokens per position and the log-sum-exp of all others, and the likeliest tokens.

Both read the head tile by tile, so [tokens, vocab] logits never exist. The rest is summed over the entries that are not
chosen, so nothing cancels where the chosen ones have almost all of the mass. With the softmax r over the rest,

  d rest / d hidden = sum_v r_v w_v,    d chosen_k / d hidden = w_k

times the slopes of the logits. The first is computed in the forward pass, while the logits exist.

Dimension key: M tokens, D embed, K chosen tokens, C tokens of a chunk, W rows of the head in a tile, G tokens of a
group of devices, N trainable rows, V vocab.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from pallas_kernels.dense_matmul import dot_nn, dot_tn
from qlora_jax.nn.lm_head.chunks import chunk_size, map_token_chunks, split_chunks
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

NO_TOKEN = -1  # an id that chooses nothing
LOWEST = -1e30  # in place of -inf, whose differences are nan


class ChosenLogits(NamedTuple):
    """Logits of each position, in f32; 0 for positions that are not wanted.

    Fields:
      chosen_MK: those of the chosen tokens; -inf for NO_TOKEN.
      rest_M: the log-sum-exp of all other logits; -inf if there are none.
    """

    chosen_MK: jax.Array
    rest_M: jax.Array


class LikeliestTokens(NamedTuple):
    """The likeliest tokens of each position, in descending order; 0 for positions that are not wanted.

    Fields:
      ids_MK: the tokens; the smallest id wins a tie.
      logps_MK: log p of each, in nats.
      rest_M: the log of the probability of all others; -inf if there are none.
    """

    ids_MK: jax.Array
    logps_MK: jax.Array
    rest_M: jax.Array


def chosen_logits(
    hidden_MD: Float[Array, "M D"], head: AnyHead, ids_MK: Int[Array, "M K"], wanted_M: Bool[Array, " M"]
) -> ChosenLogits:
    """Returns the logits of tokens `ids_MK`; differentiable in `hidden_MD` and in the head's trainable parts."""
    if isinstance(head, TrainableHead):
        chosen_MK, rest_M = _whole(hidden_MD, head, ids_MK, wanted_M)
    elif isinstance(head, HeadWithRows):
        chosen_MK, rest_M = _with_rows(hidden_MD, head, ids_MK, wanted_M)
    else:
        chosen_MK, rest_M = _frozen(hidden_MD, head, ids_MK, wanted_M)
    return ChosenLogits(jnp.where(wanted_M[:, None], chosen_MK, 0.0), jnp.where(wanted_M, rest_M, 0.0))


def _with_rows(hidden_MD, head: HeadWithRows, ids_MK, wanted_M):
    """Adds the trainable rows, whose ids may lie anywhere, to the sums of the frozen rows."""
    hot_MKN = head.one_hot(ids_MK.reshape(-1)).reshape(*ids_MK.shape, -1)
    is_own_MK = jnp.any(hot_MKN, axis=2)
    chosen_MK, rest_M = _frozen(hidden_MD, head.frozen, jnp.where(is_own_MK, NO_TOKEN, ids_MK), wanted_M)
    own_MN = head.trained_logits(hidden_MD)
    own_MK = jnp.sum(jnp.where(hot_MKN, own_MN[:, None], 0.0), axis=2)
    own_rest_M = jax.nn.logsumexp(jnp.where(jnp.any(hot_MKN, axis=1), -jnp.inf, own_MN), axis=1)
    return jnp.where(is_own_MK, own_MK, chosen_MK), jnp.logaddexp(rest_M, own_rest_M)


# Cotangents of the custom VJPs are 0 for positions that are not wanted, because `chosen_logits` masks the results.
@jax.custom_vjp
def _frozen(hidden_MD, head: Head | ShardedHead, ids_MK, wanted_M):
    found = map_token_chunks(functools.partial(_of_chunk, weighted=False), hidden_MD, head, ids_MK, wanted_M)
    return found.chosen_CK, found.rest_C


@jax.custom_vjp
def _whole(hidden_MD, head: TrainableHead, ids_MK, wanted_M):
    """Recomputes logits chunk by chunk in the backward pass; the gradient by the head is summed in f32."""
    return _frozen(hidden_MD, head.cast(hidden_MD.dtype), ids_MK, wanted_M)


class _Sums(NamedTuple):
    """Statistics of a chunk: logits of the chosen tokens, and of the rest the log-sum-exp and the mean row."""

    chosen_CK: jax.Array
    rest_C: jax.Array
    mean_CD: jax.Array | None


class _Run(NamedTuple):
    """Sums over the tiles so far: of exp(l - largest), and of exp(l - largest) w if a gradient is required."""

    chosen_CK: jax.Array
    largest_C: jax.Array
    sum_C: jax.Array
    weighted_CD: jax.Array | None


def _of_chunk(hidden_CD: jax.Array, head: Head | ShardedHead, ids_CK: jax.Array, *, weighted: bool) -> _Sums:
    if isinstance(head, Head):
        run = _over_tiles(hidden_CD, head, ids_CK, weighted)
    else:
        run = _over_shards(hidden_CD, head, ids_CK, weighted)
    rest_C = jnp.log(run.sum_C) + run.largest_C
    mean_CD = None
    if run.weighted_CD is not None:
        mean_CD = (run.weighted_CD / jnp.maximum(run.sum_C, 1e-30)[:, None]).astype(hidden_CD.dtype)
    return _Sums(run.chosen_CK, jnp.where(run.sum_C > 0, rest_C, -jnp.inf), mean_CD)


def _over_tiles(hidden_CD: jax.Array, head: Head, ids_CK: jax.Array, weighted: bool) -> _Run:
    tokens = hidden_CD.shape[0]

    def add(run: _Run, tiles: Sequence[Head], first: ArrayLike) -> _Run:
        logits_CW = tiles[0].logits(hidden_CD)
        rows, place_CK = logits_CW.shape[1], ids_CK - first
        inside_CK = (place_CK >= 0) & (place_CK < rows)
        found_CK = jnp.take_along_axis(logits_CW, jnp.clip(place_CK, 0, rows - 1), axis=1)
        rest_CW = _without(logits_CW, jnp.where(inside_CK, place_CK, rows))
        largest_C = jnp.maximum(run.largest_C, jnp.max(rest_CW, axis=1))
        exp_CW, shrink_C = jnp.exp(rest_CW - largest_C[:, None]), jnp.exp(run.largest_C - largest_C)
        weighted_CD = run.weighted_CD
        if weighted_CD is not None:
            slope_CW = tiles[0].slope(logits_CW)
            factors_CW = exp_CW if slope_CW is None else exp_CW * slope_CW
            weighted_CD = weighted_CD * shrink_C[:, None] + dot_nn(
                factors_CW.astype(hidden_CD.dtype), tiles[0].weight_VD
            )
        return _Run(
            chosen_CK=jnp.where(inside_CK, found_CK, run.chosen_CK),
            largest_C=largest_C,
            sum_C=run.sum_C * shrink_C + jnp.sum(exp_CW, axis=1),
            weighted_CD=weighted_CD,
        )

    start = _Run(
        chosen_CK=jnp.full(ids_CK.shape, -jnp.inf, jnp.float32),
        largest_C=jnp.full(tokens, LOWEST, jnp.float32),
        sum_C=jnp.zeros(tokens, jnp.float32),
        weighted_CD=jnp.zeros(hidden_CD.shape, jnp.float32) if weighted else None,
    )
    return fold_tiles(add, start, (head,), tokens)


def _without(logits_CX: jax.Array, places_CK: jax.Array) -> jax.Array:
    """Returns the logits with -inf at the places; those outside are ignored."""
    return logits_CX.at[jnp.arange(len(logits_CX))[:, None], places_CK].set(-jnp.inf, mode="drop")


def _over_shards(hidden_CD: jax.Array, head: ShardedHead, ids_CK: jax.Array, weighted: bool) -> _Run:
    """Adds up the group's sums over its rows, and returns those of this device's tokens."""
    places_GK = gather_tokens(ids_CK) - head.weight_VD.start
    run = _over_tiles(gather_tokens(hidden_CD), head.own, places_GK, weighted)
    largest_G = lax.pmax(run.largest_C, FSDP)
    shrink_G = jnp.exp(run.largest_C - largest_G)
    weighted_GD = None if run.weighted_CD is None else run.weighted_CD * shrink_G[:, None]
    return _Run(
        chosen_CK=own_tokens(lax.pmax(run.chosen_CK, FSDP)),  # -inf where the token is another device's row
        largest_C=own_tokens(largest_G),
        sum_C=sum_own_tokens(run.sum_C * shrink_G),
        weighted_CD=None if weighted_GD is None else sum_own_tokens(weighted_GD),
    )


def _forward(hidden_MD, head: Head | ShardedHead, ids_MK, wanted_M):
    found = map_token_chunks(functools.partial(_of_chunk, weighted=True), hidden_MD, head, ids_MK, wanted_M)
    return (found.chosen_CK, found.rest_C), (head, ids_MK, found.chosen_CK, found.mean_CD)


def _backward(residuals, cotangents):
    head, ids_MK, chosen_MK, mean_MD = residuals
    d_chosen_MK, d_rest_M = cotangents
    d_MK = _by_logits(head, chosen_MK, d_chosen_MK)

    def add(d_MD: jax.Array, chosen: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        ids_M, d_M = chosen
        return d_MD + d_M[:, None] * head.token_rows(ids_M).astype(jnp.float32), None

    start_MD = d_rest_M[:, None] * mean_MD.astype(jnp.float32)
    d_MD, _ = lax.scan(add, start_MD, (ids_MK.T, d_MK.T))
    return d_MD.astype(mean_MD.dtype), None, None, None


def _by_logits(head: Head | ShardedHead, chosen: jax.Array, d_chosen: jax.Array) -> jax.Array:
    """Returns the cotangents of the chosen logits before scale and cap; 0 where no token is chosen."""
    slope = head.slope(chosen)
    return jnp.where(jnp.isneginf(chosen), 0.0, d_chosen if slope is None else d_chosen * slope)


_frozen.defvjp(_forward, _backward)


def _whole_forward(hidden_MD, head: TrainableHead, ids_MK, wanted_M):
    found, (*_, chosen_MK, mean_MD) = _forward(hidden_MD, head.cast(hidden_MD.dtype), ids_MK, wanted_M)
    return found, (hidden_MD, head, ids_MK, wanted_M, found[1], chosen_MK, mean_MD)


def _whole_backward(residuals, cotangents):
    hidden_MD, head, ids_MK, wanted_M, rest_M, chosen_MK, mean_MD = residuals
    frozen: Head = head.cast(hidden_MD.dtype)
    d_MD, *_ = _backward((frozen, ids_MK, chosen_MK, mean_MD), cotangents)
    arrays = hidden_MD, ids_MK, chosen_MK, rest_M, *cotangents, wanted_M
    chunks = split_chunks(arrays, jnp.argsort(~wanted_M, stable=True), chunk_size(hidden_MD.shape[0]))

    def add(d_VD: jax.Array, chunk: tuple[jax.Array, ...]) -> jax.Array:
        hidden_CD, ids_CK, chosen_CK, rest_C, d_chosen_CK, d_rest_C, _ = chunk
        logits_CV = frozen.logits(hidden_CD)
        places_CK = jnp.where(ids_CK < 0, logits_CV.shape[1], ids_CK)
        shares_CV = jnp.exp(_without(logits_CV, places_CK) - jnp.maximum(rest_C, LOWEST)[:, None])
        slope_CV = frozen.slope(logits_CV)
        d_CV = shares_CV * d_rest_C[:, None] * (1.0 if slope_CV is None else slope_CV)
        at = jnp.arange(len(logits_CV))[:, None], places_CK
        d_CV = d_CV.at[at].add(_by_logits(frozen, chosen_CK, d_chosen_CK), mode="drop")
        return d_VD + dot_tn(d_CV.astype(hidden_CD.dtype), hidden_CD)

    def one(d_VD, chunk):
        return lax.cond(jnp.any(chunk[-1]), add, lambda d_VD, _: d_VD, d_VD, chunk), None

    with jax.named_scope("whole_head"):
        d_VD, _ = lax.scan(one, jnp.zeros(frozen.weight_VD.shape, jnp.float32), chunks)
    return d_MD, dataclasses.replace(head, weight_VD=d_VD.astype(head.weight_VD.dtype)), None, None


_whole.defvjp(_whole_forward, _whole_backward)


def likeliest_tokens(
    hidden_MD: Float[Array, "M D"], head: AnyHead, wanted_M: Bool[Array, " M"], count: int
) -> LikeliestTokens:
    """Returns the `count` likeliest tokens of each position, at most the vocabulary. Not differentiable."""
    if isinstance(head, TrainableHead):
        head = head.cast(hidden_MD.dtype)

    def of_chunk(hidden_CD: jax.Array, head: Head | ShardedHead | HeadWithRows, _: jax.Array) -> LikeliestTokens:
        ids_CK, logits_CK, rest_C = _top(hidden_CD, head, count)
        lse_C = jnp.logaddexp(jax.nn.logsumexp(logits_CK, axis=1), rest_C)
        return LikeliestTokens(ids_CK, logits_CK - lse_C[:, None], rest_C - lse_C)

    return map_token_chunks(of_chunk, hidden_MD, head, jnp.zeros(len(hidden_MD), jnp.int32), wanted_M)


def _top(hidden_CD: jax.Array, head: Head | ShardedHead | HeadWithRows, count: int) -> LikeliestTokens:
    """Returns the tokens with the largest logits, these logits, and the log-sum-exp of the others."""
    if isinstance(head, HeadWithRows):
        found = _top(hidden_CD, head.frozen, count)
        return _with_more(found, head.trained_logits(hidden_CD), jnp.asarray(head.ids, jnp.int32)[None])
    if isinstance(head, ShardedHead):
        found = _top(gather_tokens(hidden_CD), head.own, count)
        of_all = LikeliestTokens(found.ids_MK + head.weight_VD.start, *found[1:])
        ids_SCK, logits_SCK, rest_SC = (jax.vmap(own_tokens)(lax.all_gather(each, FSDP)) for each in of_all)
        first, *others = (LikeliestTokens(*each) for each in zip(ids_SCK, logits_SCK, rest_SC, strict=True))
        for other in others:
            first = _with_more(first, other.logps_MK, other.ids_MK)
            first = first._replace(rest_M=jnp.logaddexp(first.rest_M, other.rest_M))
        return first
    tokens = hidden_CD.shape[0]

    def add(found: LikeliestTokens, tiles: Sequence[Head], start: ArrayLike) -> LikeliestTokens:
        logits_CW = tiles[0].logits(hidden_CD)
        return _with_more(found, logits_CW, jnp.arange(logits_CW.shape[1], dtype=jnp.int32)[None] + start)

    nothing_CK = jnp.full((tokens, count), NO_TOKEN, jnp.int32), jnp.full((tokens, count), -jnp.inf, jnp.float32)
    return fold_tiles(add, LikeliestTokens(*nothing_CK, jnp.full(tokens, -jnp.inf, jnp.float32)), (head,), tokens)


def _with_more(found: LikeliestTokens, logits_CX: jax.Array, ids_CX: jax.Array) -> LikeliestTokens:
    """Returns the largest of those found and more logits, the others added to the rest."""
    count = found.ids_MK.shape[1]
    both_CY = jnp.concatenate([found.logps_MK, logits_CX], axis=1)
    ids_CY = jnp.concatenate([found.ids_MK, jnp.broadcast_to(ids_CX, logits_CX.shape)], axis=1)
    logits_CK, places_CK = lax.top_k(both_CY, count)
    rest_C = jnp.logaddexp(found.rest_M, jax.nn.logsumexp(_without(both_CY, places_CK), axis=1))
    return LikeliestTokens(jnp.take_along_axis(ids_CY, places_CK, axis=1), logits_CK, rest_C)
