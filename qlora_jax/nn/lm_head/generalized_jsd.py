"""Divergence of a student's predictions from a teacher's, for distillation, without [tokens, vocab] logits.

With p of the student and q of the teacher, the generalized Jensen-Shannon divergence (Agarwal et al. 2024, GKD) is

  J = beta KL(q || m) + (1 - beta) KL(p || m),    m = (1 - beta) p + beta q

and its limits, scaled as in TRL, are KL(q || p) for beta 0 and KL(p || q) for beta 1. By the student's logits,

  dJ / dl_v = a_v - p_v sum_u a_u,    a = (1 - beta) p log(p / m), or -q, or p log(p / q)

A first pass over the tiles of both heads gives the log-sum-exps, and sum_v p_v w_v. A second one sums J and a_v w_v.

Dimension key: M tokens, D and E embed of student and teacher, C tokens of a chunk, W rows of the heads in a tile.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from pallas_kernels.dense_matmul import dot_nn
from qlora_jax.nn.lm_head.chunks import map_token_chunks
from qlora_jax.nn.lm_head.head import Head
from qlora_jax.nn.lm_head.sharded_vocabulary import at_temperature
from qlora_jax.nn.lm_head.tiles import fold_tiles, sum_over_tiles


def generalized_jsd(
    hidden_MD: Float[Array, "M D"],
    head: Head,
    teacher_ME: Float[Array, "M E"],
    teacher_head: Head,
    wanted_M: Bool[Array, " M"],
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Float[Array, " M"]:
    """Returns the divergence of each wanted token's predictions in f32 nats, and 0 for others.

    Differentiable in `hidden_MD`. Both heads are frozen, and have the same vocabulary.

    Args:
      temperature: divides the logits of both.
    """
    heads = at_temperature(head, temperature), at_temperature(teacher_head, temperature)
    return _divergence(hidden_MD, teacher_ME, heads, wanted_M, beta)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _divergence(hidden_MD, teacher_ME, heads: tuple[Head, Head], wanted_M, beta: float):
    """Computes the gradient by `hidden_MD` in the forward pass, while the logits exist."""
    return _forward(hidden_MD, teacher_ME, heads, wanted_M, beta)[0]


def _forward(hidden_MD, teacher_ME, heads: tuple[Head, Head], wanted_M, beta: float):
    width = hidden_MD.shape[1]

    def of_chunk(both_CX: jax.Array, head: Head, _: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden_CD, teacher_CE = both_CX[:, :width], both_CX[:, width:]
        value_C, grad_CD = _of_chunk(hidden_CD, head, teacher_CE.astype(teacher_ME.dtype), heads[1], beta)
        return value_C, grad_CD.astype(hidden_MD.dtype)

    both_MX = jnp.concatenate([hidden_MD, teacher_ME.astype(hidden_MD.dtype)], axis=1)
    return map_token_chunks(of_chunk, both_MX, heads[0], jnp.zeros(len(hidden_MD), jnp.int32), wanted_M)


def _backward(_, grad_MD, d_value_M):
    return (grad_MD.astype(jnp.float32) * d_value_M[:, None]).astype(grad_MD.dtype), None, None, None


_divergence.defvjp(_forward, _backward)


class _Sums(NamedTuple):
    """Sums over the tiles so far: of J, of a_v, and of a_v w_v with the slope of the logit."""

    value_C: jax.Array
    a_C: jax.Array
    weighted_CD: jax.Array


def _of_chunk(hidden_CD: jax.Array, head: Head, teacher_CE: jax.Array, teacher_head: Head, beta: float):
    """Returns (J, dJ / d hidden) of each token."""
    nowhere_C = jnp.zeros(len(hidden_CD), jnp.int32)
    run = sum_over_tiles(hidden_CD, head, nowhere_C, weighted=True)
    teacher_lse_C = sum_over_tiles(teacher_CE, teacher_head, nowhere_C).lse_C
    assert run.weighted_CD is not None

    def add(sums: _Sums, tiles: Sequence[Head], _: ArrayLike) -> _Sums:
        logits_CW = tiles[0].logits(hidden_CD)
        terms = logits_CW - run.lse_C[:, None], tiles[1].logits(teacher_CE) - teacher_lse_C[:, None]
        value_CW, a_CW = _terms(*terms, beta)
        slope_CW = tiles[0].slope(logits_CW)
        factors_CW = a_CW if slope_CW is None else a_CW * slope_CW
        weighted_CD = sums.weighted_CD + dot_nn(factors_CW.astype(hidden_CD.dtype), tiles[0].weight_VD)
        return _Sums(sums.value_C + jnp.sum(value_CW, axis=1), sums.a_C + jnp.sum(a_CW, axis=1), weighted_CD)

    zeros_C = jnp.zeros(len(hidden_CD), jnp.float32)
    start = _Sums(zeros_C, zeros_C, jnp.zeros(hidden_CD.shape, jnp.float32))
    sums = fold_tiles(add, start, (head, teacher_head), len(hidden_CD))
    mean_CD = run.weighted_CD / run.sum_C[:, None]
    return sums.value_C, sums.weighted_CD - sums.a_C[:, None] * mean_CD


def _terms(log_p_CW: jax.Array, log_q_CW: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    """Returns (the parts of J, a) of each token of the vocabulary."""
    p_CW, q_CW = jnp.exp(log_p_CW), jnp.exp(log_q_CW)
    if beta == 0.0:
        return q_CW * (log_q_CW - log_p_CW), -q_CW
    if beta == 1.0:
        reverse_CW = p_CW * (log_p_CW - log_q_CW)
        return reverse_CW, reverse_CW
    log_m_CW = jnp.logaddexp(log_p_CW + math.log1p(-beta), log_q_CW + math.log(beta))
    a_CW = (1 - beta) * p_CW * (log_p_CW - log_m_CW)
    return a_CW + beta * q_CW * (log_q_CW - log_m_CW), a_CW
