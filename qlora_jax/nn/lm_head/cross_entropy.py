"""Cross-entropy of the next token through a head, so that [tokens, vocab] never exists.

The head is read in tiles of its rows (tiles.py). Each tile's exp(logit - largest so far) is summed, and
multiplied by the tile itself. So one pass gives log-sum-exp and the gradient of the hidden states:

  nll = log sum_v exp(l_v) - l_target,    d nll / d hidden = (sum_v exp(l_v) w_v) / (sum_v exp(l_v)) - w_target

A head may add a bias, scale its logits, and cap them: l = c tanh(s z / c). Each w_v is then multiplied by its slope
dl_v / dz_v = s (1 - (l_v / c)^2).

If the head's rows are cut over devices, sharded_vocabulary.py adds up the sums of all.

The entropy of a prediction, log sum_v exp(l_v) - E[l], costs one more sum per tile. It has no gradient.

If some rows of the head train, such as those of new tokens, the custom VJP covers log-sum-exp and target of the frozen
rows. Autodiff adds the few trainable rows to them.

Dimension key: M tokens, D embed, V vocab, N trainable rows, C tokens of a chunk.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dense_matmul import dot_tn
from qlora_jax.nn.lm_head.chunks import chunk_size, map_token_chunks, split_chunks
from qlora_jax.nn.lm_head.head import Head, HeadWithRows, TrainableHead
from qlora_jax.nn.lm_head.sharded_vocabulary import AnyHead, ShardedHead, sum_over_head
from qlora_jax.nn.lm_head.tiles import RunningSums


def token_nll(
    hidden_MD: Float[Array, "M D"],
    head: AnyHead,
    targets_M: Int[Array, " M"],
    supervised_M: Bool[Array, " M"],
) -> Float[Array, " M"]:
    """Returns -log softmax(logits)[target] in f32 nats for supervised tokens, and 0 for others.

    >>> hidden = jnp.zeros((2, model.config.embed_dim))  # equal logits: each target costs the log of the vocabulary
    >>> [f"{each:.2f}" for each in q.token_nll(hidden, model.head, jnp.array([7, 9]), jnp.array([True, False]))]
    ['5.55', '0.00']

    Only chunks that have supervised tokens are computed. Differentiable in `hidden_MD` and in the head's trainable
    parts.
    """
    return _nll(hidden_MD, head, targets_M, supervised_M, entropy=False)[0]


def token_nll_and_entropy(
    hidden_MD: Float[Array, "M D"], head: AnyHead, targets_M: Int[Array, " M"], supervised_M: Bool[Array, " M"]
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """Returns `token_nll`, and the entropy of each prediction in nats, without gradient."""
    nll_M, entropy_M = _nll(hidden_MD, head, targets_M, supervised_M, entropy=True)
    assert entropy_M is not None
    return nll_M, jax.lax.stop_gradient(entropy_M)


def _nll(
    hidden_MD: jax.Array, head: AnyHead, targets_M: jax.Array, supervised_M: jax.Array, *, entropy: bool
) -> tuple[jax.Array, jax.Array | None]:
    if isinstance(head, TrainableHead):
        return _whole_nll(hidden_MD, head, targets_M, supervised_M, entropy)
    if isinstance(head, HeadWithRows):
        return _nll_with_rows(hidden_MD, head, targets_M, supervised_M, entropy)
    return _frozen_nll(hidden_MD, head, targets_M, supervised_M, entropy)


def _nll_with_rows(hidden_MD, head: HeadWithRows, targets_M, supervised_M, entropy: bool):
    """Returns log(sum over frozen rows + sum over trainable rows) - l_target, with the target in either part."""
    hot_MN = head.one_hot(targets_M)
    vocabulary = head.frozen.weight_VD.shape[0]
    in_frozen_M = jnp.where(jnp.any(hot_MN, axis=1), vocabulary, targets_M)  # out of range: not a frozen row
    lse_M, target_M, entropy_M = _frozen_sums(hidden_MD, head.frozen, in_frozen_M, supervised_M, entropy)
    own_MN = head.trained_logits(hidden_MD)
    target_M += jnp.sum(jnp.where(hot_MN, own_MN, 0.0), axis=1)
    both_M = jnp.logaddexp(lse_M, jax.nn.logsumexp(own_MN, axis=1))
    nll_M = jnp.where(supervised_M, both_M - target_M, 0.0)
    if entropy_M is None:
        return nll_M, None
    mean_M = jnp.exp(lse_M - both_M) * (lse_M - entropy_M)
    mean_M += jnp.sum(jnp.exp(own_MN - both_M[:, None]) * own_MN, axis=1)
    return nll_M, jnp.where(supervised_M, both_M - mean_M, 0.0)


# The last argument of these functions is True to return entropies, too, otherwise None in their place.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _frozen_nll(hidden_MD, head: Head | ShardedHead, targets_M, supervised_M, entropy: bool):
    """Computes the gradient by `hidden_MD` in the forward pass, while the logits exist."""
    return map_token_chunks(_of_chunk(_nll_of_chunk, entropy), hidden_MD, head, targets_M, supervised_M)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _frozen_sums(hidden_MD, head: Head, targets_M, supervised_M, entropy: bool):
    """Returns (log-sum-exp, the target's logit or 0 if it is out of range, entropy), all 0 for unsupervised tokens."""
    return map_token_chunks(_of_chunk(_sums_of_chunk, entropy), hidden_MD, head, targets_M, supervised_M)[:3]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _whole_nll(hidden_MD, head: TrainableHead, targets_M, supervised_M, entropy: bool):
    """Recomputes logits chunk by chunk in the backward pass; the gradient by the head is summed in f32."""
    frozen = head.cast(hidden_MD.dtype)
    return map_token_chunks(_of_chunk(_nll_of_chunk, entropy), hidden_MD, frozen, targets_M, supervised_M)


def _of_chunk(function, entropy: bool):
    return functools.partial(function, entropy=entropy)


def _nll_of_chunk(hidden_CD, head, targets_C, *, entropy: bool):
    run = sum_over_head(hidden_CD, head, targets_C, entropy=entropy)
    return run.nll_C, run.entropy_C


def _nll_and_grad_of_chunk(hidden_CD, head, targets_C, *, entropy: bool):
    run = sum_over_head(hidden_CD, head, targets_C, weighted=True, entropy=entropy)
    target_CD = head.token_rows(targets_C).astype(jnp.float32)
    slope_C = head.slope(run.target_C)
    if slope_C is not None:
        target_CD *= slope_C[:, None]
    return run.nll_C, run.entropy_C, (_mean_row(run) - target_CD).astype(hidden_CD.dtype)


def _sums_of_chunk(hidden_CD, head, targets_C, *, entropy: bool):
    """Returns (log-sum-exp, the target's logit, entropy, sum_v exp(l_v) w_v / sum_v exp(l_v))."""
    run = sum_over_head(hidden_CD, head, targets_C, weighted=True, entropy=entropy)
    return run.lse_C, run.target_C, run.entropy_C, _mean_row(run).astype(hidden_CD.dtype)


def _mean_row(run: RunningSums) -> jax.Array:
    assert run.weighted_CD is not None
    return run.weighted_CD / run.sum_C[:, None]


def _sums_forward(hidden_MD, head, targets_M, supervised_M, entropy: bool):
    of_chunk = _of_chunk(_sums_of_chunk, entropy)
    *sums, mean_MD = map_token_chunks(of_chunk, hidden_MD, head, targets_M, supervised_M)
    return tuple(sums), (head, targets_M, sums[1], mean_MD)


def _sums_backward(_, residuals, cotangents):
    head, targets_M, target_M, mean_MD = residuals
    d_lse_M, d_target_M, _ = cotangents
    d_target_M = jnp.where(targets_M < head.weight_VD.shape[0], d_target_M, 0.0)
    slope_M = head.slope(target_M)
    if slope_M is not None:
        d_target_M *= slope_M
    target_MD = head.weight_VD.at[targets_M].get(mode="clip").astype(jnp.float32)
    d_MD = d_lse_M[:, None] * mean_MD.astype(jnp.float32) + d_target_M[:, None] * target_MD
    return d_MD.astype(mean_MD.dtype), None, None, None


_frozen_sums.defvjp(_sums_forward, _sums_backward)


def _whole_forward(hidden_MD, head, targets_M, supervised_M, entropy: bool):
    frozen, of_chunk = head.cast(hidden_MD.dtype), _of_chunk(_sums_of_chunk, entropy)
    lse_M, target_M, entropy_M, mean_MD = map_token_chunks(of_chunk, hidden_MD, frozen, targets_M, supervised_M)
    return (lse_M - target_M, entropy_M), (hidden_MD, head, targets_M, supervised_M, lse_M, target_M, mean_MD)


def _whole_backward(entropy: bool, residuals, cotangents):
    hidden_MD, head, targets_M, supervised_M, lse_M, target_M, mean_MD = residuals
    frozen = head.cast(hidden_MD.dtype)
    d_nll_M = jnp.where(supervised_M, cotangents[0], 0.0)
    sums = frozen, targets_M, target_M, mean_MD
    (d_hidden_MD, *_) = _sums_backward(entropy, sums, (d_nll_M, -d_nll_M, None))
    with jax.named_scope("whole_head"):
        d_VD = _by_head(hidden_MD, frozen, targets_M, lse_M, d_nll_M)
    return d_hidden_MD, dataclasses.replace(head, weight_VD=d_VD.astype(head.weight_VD.dtype)), None, None


def _by_head(hidden_MD, head: Head, targets_M, lse_M, d_nll_M) -> Float[Array, "V D"]:
    """Sums d_nll (softmax - onehot) slope times hidden state over tokens; chunks without supervision are skipped."""
    size = chunk_size(hidden_MD.shape[0])
    chunks = split_chunks((hidden_MD, targets_M, lse_M, d_nll_M), jnp.argsort(d_nll_M == 0, stable=True), size)

    def add(d_VD: jax.Array, chunk: tuple[jax.Array, ...]) -> jax.Array:
        hidden_CD, targets_C, lse_C, d_nll_C = chunk
        logits_CV = head.logits(hidden_CD)
        p_CV = jnp.exp(logits_CV - lse_C[:, None]).at[jnp.arange(size), targets_C].add(-1.0, mode="drop")
        slope_CV = head.slope(logits_CV)
        d_CV = p_CV * d_nll_C[:, None] * (1.0 if slope_CV is None else slope_CV)
        return d_VD + dot_tn(d_CV.astype(hidden_CD.dtype), hidden_CD)

    def one(d_VD, chunk):
        return jax.lax.cond(jnp.any(chunk[3] != 0), add, lambda d_VD, _: d_VD, d_VD, chunk), None

    return jax.lax.scan(one, jnp.zeros(head.weight_VD.shape, jnp.float32), chunks)[0]


_whole_nll.defvjp(_whole_forward, _whole_backward)


def _forward(hidden_MD, head, targets_M, supervised_M, entropy: bool):
    of_chunk = _of_chunk(_nll_and_grad_of_chunk, entropy)
    *found, grad_MD = map_token_chunks(of_chunk, hidden_MD, head, targets_M, supervised_M)
    return tuple(found), grad_MD


def _backward(_, grad_MD, cotangents):
    d_nll_M = cotangents[0]
    return (grad_MD.astype(jnp.float32) * d_nll_M[:, None]).astype(grad_MD.dtype), None, None, None


_frozen_nll.defvjp(_forward, _backward)
