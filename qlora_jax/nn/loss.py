"""Cross-entropy of the next token through a frozen head, never holding [tokens, vocab] in f32.

Dimension key: M tokens, D embed, V vocab, C tokens of a chunk, I chunks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.nn.dots import dot_nn, dot_nt

CHUNK = 256  # tokens whose logits exist at once


@jax.custom_vjp
def token_nll(
    hidden_MD: Float[Array, "M D"],
    head_VD: Float[Array, "V D"],
    targets_M: Int[Array, " M"],
    supervised_M: Bool[Array, " M"],
) -> Float[Array, " M"]:
    """-log softmax(hidden head^T)[target] in f32 nats where supervised, 0 elsewhere.

    Supervised tokens are moved together first, so the head's products are done for them alone (rounded up to CHUNK).
    Differentiable in `hidden_MD`: the gradient is made while the logits exist, not from logits made again.
    """
    return _in_chunks(_nll_of_chunk, hidden_MD, head_VD, targets_M, supervised_M)


def _nll_of_chunk(hidden_CD, head_VD, targets_C):
    logits_CV = dot_nt(hidden_CD, head_VD)
    lse_C = jax.nn.logsumexp(logits_CV, axis=-1)
    return lse_C - jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]


def _nll_and_grad_of_chunk(hidden_CD, head_VD, targets_C):
    logits_CV = dot_nt(hidden_CD, head_VD)
    lse_C = jax.nn.logsumexp(logits_CV, axis=-1)
    nll_C = lse_C - jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
    is_target = jnp.arange(logits_CV.shape[1], dtype=targets_C.dtype)[None, :] == targets_C[:, None]
    d_logits_CV = jnp.exp(logits_CV - lse_C[:, None]) - is_target.astype(jnp.float32)
    return nll_C, dot_nn(d_logits_CV.astype(hidden_CD.dtype), head_VD, hidden_CD.dtype)


def _in_chunks(of_chunk, hidden_MD, head_VD, targets_M, supervised_M):
    """of_chunk over the supervised tokens, its results put back in place, zero where not supervised."""
    m = hidden_MD.shape[0]
    size = min(CHUNK, m)
    order_M = jnp.argsort(~supervised_M, stable=True)
    padding = -m % size
    chunks = jax.tree.map(
        lambda x: jnp.pad(x[order_M], ((0, padding),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, size, *x.shape[1:]),
        (hidden_MD, targets_M, supervised_M),
    )
    shapes = jax.eval_shape(of_chunk, chunks[0][0], head_VD, chunks[1][0])

    def one(_, chunk):
        hidden, targets, supervised = chunk
        results = jax.lax.cond(
            jnp.any(supervised),
            lambda: of_chunk(hidden, head_VD, targets),
            lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
        )
        return None, jax.tree.map(lambda r: _masked(r, supervised), results)

    _, results = jax.lax.scan(one, None, chunks)
    place_M = jnp.argsort(order_M)
    return jax.tree.map(lambda r: r.reshape(-1, *r.shape[2:])[place_M], results)


def _masked(result: jax.Array, supervised_C: jax.Array) -> jax.Array:
    keep = supervised_C.reshape(supervised_C.shape + (1,) * (result.ndim - 1))
    return jnp.where(keep, result, jnp.zeros((), result.dtype))


def _forward(hidden_MD, head_VD, targets_M, supervised_M):
    nll_M, grad_MD = _in_chunks(_nll_and_grad_of_chunk, hidden_MD, head_VD, targets_M, supervised_M)
    return nll_M, grad_MD


def _backward(grad_MD, d_nll_M):
    return (grad_MD.astype(jnp.float32) * d_nll_M[:, None]).astype(grad_MD.dtype), None, None, None


token_nll.defvjp(_forward, _backward)
