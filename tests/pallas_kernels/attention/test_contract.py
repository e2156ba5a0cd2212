"""The contract of causal attention, for all loops: a plain softmax and its autodiff, each feature, bf16, properties."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import causal_attention
from tests.pallas_kernels.attention.loops import TILES, loops, using  # noqa: F401

SCALE = 0.3


def _random(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)).astype(dtype)


def _inputs(length, heads, kv_heads, batch=2, head_dim=16, dtype=jnp.float32):
    """Draws q, k, v and a cotangent of the result."""
    counts = (heads, kv_heads, kv_heads, heads)
    return tuple(_random(batch, length, n, head_dim, seed=i, dtype=dtype) for i, n in enumerate(counts))


def _segments(length, *rows):
    """Returns segment ids of packed texts by their lengths, and an id for the rest of the row."""
    ids = [np.repeat(np.arange(len(row) + 1), [*row, length - sum(row)]) for row in rows]
    return jnp.asarray(np.stack(ids), jnp.int32)


def _plain(q, k, v, window=None, segments_BT=None, softcap=None):
    """Computes attention by transformers' definition: key <= query, key > query - window, equal segments; softcap
    tanh(score / softcap)."""
    return _of_visible(q, k, v, _visible(q.shape[1], window, segments_BT), softcap)


def _visible(length, window=None, segments_BT=None):
    at = np.arange(length)
    visible = (at[None, :] <= at[:, None])[None]
    if window is not None:
        visible = visible & (at[None, :] > at[:, None] - window)[None]
    if segments_BT is None:
        return visible
    ids = np.asarray(segments_BT)
    return visible & (ids[:, :, None] == ids[:, None, :])


def _of_visible(q, k, v, visible_BTS, softcap):
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * SCALE
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible_BTS[:, None], scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradients(attention, q, k, v, cotangent):
    value, vjp = jax.vjp(attention, q, k, v)
    return value, *vjp(cotangent)


@functools.partial(jax.jit, static_argnames="softcap")  # compiled once for all masks
def _plain_value_and_gradients(q, k, v, cotangent, visible_BTS, softcap):
    value, vjp = jax.vjp(lambda *qkv: _of_visible(*qkv, visible_BTS, softcap), q, k, v)
    return value, *vjp(cotangent)


def _plain_results(inputs, softcap=None, **visible):
    """Returns the value, dq, dk and dv in f32."""
    visible_BTS = np.broadcast_to(_visible(inputs[0].shape[1], **visible), (len(inputs[0]), *[inputs[0].shape[1]] * 2))
    return _plain_value_and_gradients(*(x.astype(jnp.float32) for x in inputs), visible_BTS, softcap=softcap)


def _largest_errors(ours, plain):
    """Returns the largest error of each result, relative to its largest entry."""
    pairs = zip(ours, plain, strict=True)
    # If a query sees only itself, dq is 0, and rounding errors are relative to 1.
    return [float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b), initial=1.0)) for a, b in pairs]


def _errors(length, heads, kv_heads, dtype=jnp.float32, batch=2, head_dim=16, **visible):
    inputs = _inputs(length, heads, kv_heads, batch, head_dim, dtype)
    ours = _value_and_gradients(lambda *qkv: causal_attention(*qkv, SCALE, **visible), *inputs)
    assert {x.dtype for x in ours} == {jnp.dtype(dtype)}
    return _largest_errors(ours, _plain_results(inputs, **visible))


# Lengths below a chunk, unrolled, ragged, and in a loop over tiles of 256 and (batch x heads above 16) of 128; below,
# at and past a block of 64, and odd and even numbers of blocks.
SHAPES = [
    (1, 2, 2),
    (5, 2, 1),
    (64, 3, 1),
    (256, 4, 2),
    (300, 6, 2),
    (512, 3, 3),
    (800, 4, 1),
    (700, 9, 3),
    (400, 10, 2),
]


@pytest.mark.parametrize(("length", "heads", "kv_heads"), SHAPES)
def test_causal(length, heads, kv_heads):
    assert max(_errors(length, heads, kv_heads)) < 5e-6


@pytest.mark.parametrize("head_dim", [20, 1, 16, 80, 96, 256])
def test_head_dims(head_dim):
    assert max(_errors(150, 2, 1, head_dim=head_dim)) < 5e-6


@pytest.mark.parametrize(("length", "heads"), [(300, 2), (900, 2), (700, 10)])
@pytest.mark.parametrize("window", [1, 64, 65, 256, 258])
def test_window(length, heads, window):
    assert max(_errors(length, heads, heads // 2, window=window)) < 5e-6


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize(("length", "heads"), [(300, 2), (900, 2), (700, 10)])
def test_a_window_that_is_traced(length, heads, segments):
    ids = _segments(length, (40, 2, 200), (256, 1, 30)) if segments else None
    inputs = _inputs(length, heads, heads // 2)

    @jax.jit
    def ours(window):
        attention = functools.partial(causal_attention, scale=SCALE, window=window, segments_BT=ids)
        value, vjp = jax.vjp(attention, *inputs[:3])
        return value, *vjp(inputs[3])

    for window in (1, 70, 258, 900):
        plain = _plain_results(inputs, window=window, segments_BT=ids)
        assert max(_largest_errors(ours(jnp.int32(window)), plain)) < 5e-6


@pytest.mark.parametrize(("length", "heads"), [(300, 2), (900, 2)])
@pytest.mark.parametrize("window", [None, 70])
def test_softcap(length, heads, window):
    assert max(_errors(length, heads, heads // 2, softcap=0.7, window=window)) < 5e-6


@pytest.mark.parametrize(("length", "heads"), [(300, 2), (900, 2), (700, 10)])
@pytest.mark.parametrize("window", [None, 70])
def test_segments(length, heads, window):
    ids = _segments(length, (40, 2, 200), (256, 1, 30))
    assert max(_errors(length, heads, heads // 2, window=window, segments_BT=ids)) < 5e-6


def test_segments_in_any_order():
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 600)), jnp.int32)
    assert max(_errors(600, 2, 2, segments_BT=ids)) < 5e-6


# At most four values are rounded, each by 2^-9: weight, gradient of the score, output in the mean, result.
ROUNDINGS = 4 * 2**-9
# Heads of odd and even numbers of pairs, and of parts of a vector.
BFLOAT16 = [
    (300, 6, 2, 16, None),
    (900, 2, 2, 16, None),
    (150, 2, 1, 33, None),
    (130, 2, 1, 256, 70),
    (70, 9, 3, 64, 9),
]


@pytest.mark.parametrize(("length", "heads", "kv_heads", "head_dim", "window"), BFLOAT16)
def test_bfloat16(loops, length, heads, kv_heads, head_dim, window):  # noqa: F811
    shape = (length, heads, kv_heads, jnp.bfloat16, 2, head_dim)
    errors = _errors(*shape, window=window)
    assert max(errors) < (2 if head_dim > 64 else 1) * ROUNDINGS  # wide heads round sums of more terms
    if loops != TILES:  # all round the same values, so errors are of the same size
        for _ in using(TILES):
            assert all(a < 1.25 * b + 2**-10 for a, b in zip(errors, _errors(*shape, window=window), strict=True))


@pytest.mark.parametrize("length", [300, 800])
def test_large_scores_neither_overflow_nor_vanish(length):
    q, k, v, _ = _inputs(length, 2, 2)
    np.testing.assert_allclose(causal_attention(100 * q, k, v, SCALE), _plain(100 * q, k, v), atol=5e-4)


@pytest.mark.parametrize("length", [300, 800])
def test_the_future_has_no_influence(length):
    q, k, v, _ = _inputs(length, 2, 2)
    cut = length // 2 + 3
    before = causal_attention(q, k, v, SCALE)
    after = causal_attention(q, k.at[:, cut:].add(7.0), v.at[:, cut:].add(7.0), SCALE)
    np.testing.assert_array_equal(after[:, :cut], before[:, :cut])


def test_packed_equals_unpacked():
    q, k, v, _ = _inputs(900, 2, 1, batch=1)
    cuts = [0, 130, 131, 600, 900]
    packed = causal_attention(q, k, v, SCALE, segments_BT=_segments(900, np.diff(cuts)[:-1]))
    pairs = itertools.pairwise(cuts)
    alone = [causal_attention(*(x[:, start:end] for x in (q, k, v)), SCALE) for start, end in pairs]
    np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), atol=2e-6)


@pytest.mark.parametrize("length", [300, 800])
def test_a_window_of_the_whole_length_is_none(length):
    q, k, v, _ = _inputs(length, 2, 2)
    np.testing.assert_array_equal(causal_attention(q, k, v, SCALE, window=length), causal_attention(q, k, v, SCALE))


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"scale": 1.0, "window": 0}, {"scale": 1.0, "softcap": 0.0}])
def test_what_is_not_above_zero_is_refused(wrong):
    with pytest.raises(ValueError, match="above zero"):
        causal_attention(*_inputs(5, 2, 2)[:3], **wrong)


def test_rows_in_bf16_do_not_depend_on_the_number_of_rows():
    """XLA for CPUs would leave out the rounding of weights for eight rows, and not for one."""
    q, k, v, _ = _inputs(64, 8, 4, batch=8, dtype=jnp.bfloat16)
    attention = jax.jit(lambda *qkv: causal_attention(*qkv, SCALE))
    alone = [attention(*(x[row : row + 1] for x in (q, k, v))) for row in range(8)]
    np.testing.assert_array_equal(attention(q, k, v), jnp.concatenate(alone))
