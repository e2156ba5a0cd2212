"""The contract of attention over a cache, for all loops: the definition, for slots that a query sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import cached_attention
from pallas_kernels.attention import cpu as attention_cpu
from tests.pallas_kernels.attention.loops import loops  # noqa: F401
from tests.pallas_kernels.attention.test_contract import SCALE, _random

SLOTS, LAYERS = 150, 3


def _plain(q, k, v, positions, window=None, softcap=None, sinks_N=None):
    """Computes transformers' definition of one layer in f32; the sink is one more logit, whose weight is dropped."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[1], axis=1) for x in (k, v))
    scores = jnp.einsum("btnh,bnsh->bnts", q, k) * SCALE
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    behind = np.asarray(positions)[:, None, :, None] - np.arange(k.shape[2])
    visible = (behind >= 0) & (behind < (k.shape[2] if window is None else window))
    scores = jnp.where(visible, scores, -jnp.inf)
    if sinks_N is not None:
        sinks = jnp.broadcast_to(sinks_N[None, :, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, sinks], axis=3)
    return jnp.einsum("bnts,bnsh->btnh", jax.nn.softmax(scores)[..., : k.shape[2]], v)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("queries", "heads", "head_dim", "how"),
    [
        (1, (9, 3), 64, {}),
        (3, (4, 2), 20, {"window": 5, "sinks": True}),
        (8, (2, 1), 33, {"softcap": 0.7, "sinks": True}),
        (9, (2, 2), 16, {"window": 40, "softcap": 0.7}),
    ],
)
def test_equals_the_definition(dtype, queries, heads, head_dim, how):
    """Rows at other positions; in bf16 weights and result are rounded, each by 2^-9."""
    q = _random(2, queries, heads[0], head_dim, dtype=dtype)
    k, v = (_random(LAYERS, 2, heads[1], SLOTS, head_dim, seed=i, dtype=dtype) for i in (1, 2))
    positions = jnp.asarray(np.array([[0], [SLOTS - queries]]) + np.arange(queries))
    sinks_N = jnp.linspace(0, 3, heads[0]) if how.get("sinks") else None
    chosen = {"window": how.get("window"), "softcap": how.get("softcap"), "sinks_N": sinks_N}
    ours = jax.jit(functools.partial(cached_attention, scale=SCALE, **chosen))(q, k, v, 1, positions)
    assert ours.dtype == dtype
    plain = _plain(*(x.astype(jnp.float32) for x in (q, k[1], v[1])), positions, **chosen)
    tolerance = 2e-6 if dtype == jnp.float32 else 2 * 2**-9 * float(jnp.max(jnp.abs(v)))
    np.testing.assert_allclose(ours.astype(jnp.float32), plain, atol=tolerance)


def test_a_window_that_is_traced():
    q, cache = _random(2, 1, 4, 16), [_random(1, 2, 2, SLOTS, 16, seed=i) for i in (1, 2)]
    positions = jnp.asarray([[70], [149]])
    ours = jax.jit(lambda window: cached_attention(q, *cache, 0, positions, SCALE, window=window))
    for window in (1, 40, 200):
        plain = _plain(q, *(x[0] for x in cache), positions, window)
        np.testing.assert_allclose(ours(jnp.int32(window)), plain, atol=2e-6)


def test_few_queries_equal_many():
    """Up to FEW_QUERIES are computed by a loop that others do not take."""
    count = attention_cpu.FEW_QUERIES + 1
    q, cache = _random(1, count, 4, 16), [_random(1, 1, 2, SLOTS, 16, seed=i) for i in (1, 2)]
    positions = jnp.arange(60, 60 + count)[None]
    many = cached_attention(q, *cache, 0, positions, SCALE)
    few = cached_attention(q[:, :1], *cache, 0, positions[:, :1], SCALE)
    np.testing.assert_allclose(few, many[:, :1], atol=2e-6)
