"""The contract of attention sinks, for all loops: a softmax with one more logit and its autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import causal_attention
from tests.marks import some_in_ci
from tests.nn.trees import visible_keys
from tests.pallas_kernels.attention.loops import TILES, loops  # noqa: F401
from tests.pallas_kernels.attention.test_branching import rows_of_trees, spans_of
from tests.pallas_kernels.attention.test_contract import SCALE, _inputs, _largest_errors, _segments, _visible

SLOW = pytest.mark.slow
F32, BF16 = jnp.float32, jnp.bfloat16
ROUNDINGS = 5 * 2**-9  # as without sinks, and once more when the result is scaled


def _plain(q, k, v, sinks_N, visible_BTS, softcap):
    """Computes transformers' definition: the sink is the last logit of each row, and its weight is dropped."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * SCALE
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible_BTS[:, None], scores, -jnp.inf)
    sinks = jnp.broadcast_to(sinks_N[None, :, None, None], (*scores.shape[:3], 1))
    weights = jax.nn.softmax(jnp.concatenate([scores, sinks], axis=3), axis=3)[..., :-1]
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


@functools.partial(jax.jit, static_argnames="softcap")
def _plain_results(q, k, v, sinks_N, cotangent, visible_BTS, softcap=None):
    value, vjp = jax.vjp(lambda *args: _plain(*args, visible_BTS, softcap), q, k, v, sinks_N)
    return value, *vjp(cotangent)


def _drawn(length, heads, dtype=F32, head_dim=16):
    """Draws q, k, v, sinks that take a twentieth to most of the weight, and a cotangent."""
    q, k, v, cotangent = _inputs(length, heads, heads // 2, 2, head_dim, dtype)
    return q, k, v, jnp.linspace(0, 7, heads).astype(dtype), cotangent


def _errors(inputs, visible_BTS, softcap=None, **how):
    """Returns the largest relative errors of value, dq, dk, dv and the gradient of the sinks."""

    @jax.jit
    def ours(q, k, v, sinks_N, cotangent):
        attention = functools.partial(causal_attention, scale=SCALE, softcap=softcap, **how)
        value, vjp = jax.vjp(lambda q, k, v, sinks_N: attention(q, k, v, sinks_N=sinks_N), q, k, v, sinks_N)
        return value, *vjp(cotangent)

    f32 = [x.astype(F32) for x in inputs]
    shape = (2, inputs[0].shape[1], inputs[0].shape[1])
    expected = _plain_results(*f32, np.broadcast_to(visible_BTS, shape), softcap=softcap)
    found = ours(*inputs)
    assert {x.dtype for x in found} == {inputs[0].dtype}
    return _largest_errors(found, expected)


IDS = ((40, 2, 200), (256, 1, 30))


# In a loop of 256, unrolled, in a loop of 128 with heads that share keys, and with a soft cap.
@pytest.mark.parametrize(
    ("length", "heads", "window", "softcap", "packed"),
    some_in_ci(
        [(900, 2, 70, None, True), (300, 4, None, None, False), (700, 10, None, None, False), (300, 2, 70, 0.7, True)],
        lambda i: i == 0,
    ),
)
def test_f32(length, heads, window, softcap, packed):
    ids = _segments(length, *IDS) if packed else None
    visible = _visible(length, window, ids)
    assert max(_errors(_drawn(length, heads), visible, softcap, window=window, segments_BT=ids)) < 5e-6


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_window_that_is_traced():
    window = jnp.int32(70)
    assert max(_errors(_drawn(700, 10), _visible(700, 70), window=window)) < 5e-6


@pytest.mark.parametrize("dtype", some_in_ci([(BF16,), (F32,)], lambda i: i == 0))
def test_branches(dtype):
    rows_B4T = rows_of_trees(3, 2, 300)
    errors = _errors(_drawn(300, 4, dtype, 64), visible_keys(rows_B4T, 70), spans=spans_of(rows_B4T), window=70)
    assert max(errors) < (5e-6 if dtype == F32 else 2 * ROUNDINGS)


@pytest.mark.parametrize("window", [None, pytest.param(70, marks=SLOW)])
def test_bfloat16(window):
    ids = _segments(300, *IDS)
    errors = _errors(_drawn(300, 4, BF16, 64), _visible(300, window, ids), window=window, segments_BT=ids)
    assert max(errors) < 2 * ROUNDINGS


def test_sinks_far_above_and_below_the_scores():
    q, k, v, _, _ = _drawn(70, 4)
    out = causal_attention(q, k, v, SCALE, sinks_N=jnp.asarray([-1e4, -200.0, 200.0, 1e4]))
    np.testing.assert_allclose(out[:, :, :2], causal_attention(q, k, v, SCALE)[:, :, :2], atol=2e-6)
    np.testing.assert_allclose(out[:, :, 2:], 0.0, atol=1e-30)


def test_a_remat_policy_that_saves_the_named_residuals_computes_attention_once(loops):  # noqa: F811
    if loops == TILES:
        pytest.skip("tiles are not one operation")
    inputs = _drawn(70, 4)[:4]
    policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    loss = jax.checkpoint(lambda *args: jnp.sum(causal_attention(*args[:3], SCALE, sinks_N=args[3])), policy=policy)
    jaxpr = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 3)))(*inputs))
    assert jaxpr.count("target_name=attention_forward_") == 1
