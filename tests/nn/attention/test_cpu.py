"""Tests the C++ handlers of attention against a plain softmax and against the tiled definition."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.native.library import attention_problem
from qlora_jax.nn.attention import causal
from qlora_jax.nn.attention import cpu as attention_cpu
from qlora_jax.nn.attention.causal import causal_attention
from tests.nn.attention.test_branching import branching_errors, rows_of_trees, spans_of
from tests.nn.attention.test_causal import SCALE, _inputs, _plain, _segments, _value_and_gradients

pytestmark = pytest.mark.skipif(attention_problem() is not None, reason=str(attention_problem()))

BF16 = jnp.bfloat16
# The tiles round weight, gradient of the score, output in the mean, and result.
ROUNDINGS = 4 * 2**-9


def _all(function, inputs):
    return [np.asarray(x, np.float32) for x in _value_and_gradients(function, *inputs)]


def _errors(length, heads, kv_heads, head_dim, batch=2, **visible):
    """Returns the largest relative errors of value, dq, dk and dv against f32, and those of the tiles."""
    inputs = _inputs(length, heads, kv_heads, batch, head_dim, BF16)
    ids, window = visible.get("segments_BT"), visible.get("window")
    ours = _all(functools.partial(attention_cpu.attention, texts=ids, scale=SCALE, window=window), inputs)
    tiles = _all(
        lambda q, k, v: causal._attention(q, k, v, (ids, None), causal.ScoreScaling(SCALE, None), window),
        inputs,
    )
    plain = _all(lambda *qkv: _plain(*qkv, **visible), [x.astype(jnp.float32) for x in inputs])
    return [
        [float(np.max(np.abs(a - b)) / np.max(np.abs(b), initial=1.0)) for a, b in zip(each, plain, strict=True)]
        for each in (ours, tiles)
    ]


def _check(*args, **kwargs):
    ours, tiles = _errors(*args, **kwargs)
    assert max(ours) < 2 * ROUNDINGS  # wide heads round sums of more terms
    # Both round the same values, so errors are of the same size.
    assert all(a < 1.25 * b + 2**-10 for a, b in zip(ours, tiles, strict=True))


# Below, at, and past a block of 64; odd and even numbers of blocks; heads that share keys.
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads"), [(1, 2, 2), (64, 3, 1), (130, 4, 4), (300, 6, 2), (512, 9, 3)]
)
def test_causal(length, heads, kv_heads):
    _check(length, heads, kv_heads, 64)


@pytest.mark.parametrize("head_dim", [32, 80 + 16, 128, 160, 256])
def test_head_dims(head_dim):
    _check(150, 2, 1, head_dim)


@pytest.mark.parametrize("window", [1, 63, 64, 65, 100, 299])
def test_window(window):
    _check(300, 4, 2, 64, window=window)


@pytest.mark.parametrize("window", [None, 70])
def test_segments(window):
    _check(300, 4, 2, 64, window=window, segments_BT=_segments(300, (40, 2, 200), (256, 1, 30)))


def _handler(q, k, v, scale, *, spans, window, softcap):
    assert softcap is None
    return attention_cpu.attention(q, k, v, spans, scale, window)


def _tiles(q, k, v, scale, *, spans, window, softcap):
    return causal._attention(q, k, v, (spans, None), causal.ScoreScaling(scale, softcap), window)


@pytest.mark.parametrize("window", [70, *(pytest.param(each, marks=pytest.mark.slow) for each in (None, 1, 200))])
def test_random_trees(window):
    inputs = _inputs(300, 4, 2, 2, 64, BF16)
    for seed in range(4):
        rows_B4T = rows_of_trees(seed, 2, 300)
        ours, tiles = (branching_errors(inputs, rows_B4T, window, attention=each) for each in (_handler, _tiles))
        assert max(ours) < 2 * ROUNDINGS
        assert all(a < 1.25 * b + 2**-10 for a, b in zip(ours, tiles, strict=True)), seed


def test_every_run_with_branches_gives_the_same_bits():
    inputs, spans = _inputs(700, 6, 2, 2, 64, BF16), spans_of(rows_of_trees(5, 2, 700))
    function = functools.partial(attention_cpu.attention, texts=spans, scale=SCALE, window=130)
    first = _all(function, inputs)
    for _ in range(3):
        for again, before in zip(_all(function, inputs), first, strict=True):
            np.testing.assert_array_equal(again, before)


def test_segments_in_any_order():
    _check(300, 2, 2, 64, segments_BT=jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 300)), jnp.int32))


def test_large_scores_neither_overflow_nor_vanish():
    q, k, v, d_out = _inputs(300, 2, 2, 2, 64, BF16)
    ours = _all(
        functools.partial(attention_cpu.attention, texts=None, scale=SCALE, window=None), (100 * q, k, v, d_out)
    )
    plain = _all(_plain, [x.astype(jnp.float32) for x in (100 * q, k, v, d_out)])
    assert all(np.isfinite(x).all() for x in ours)
    np.testing.assert_allclose(ours[0], plain[0], atol=0.05)


def test_every_run_gives_the_same_bits():
    """Results are bit-identical for any number of threads, because each adds to dq in the order of keys."""
    inputs = _inputs(700, 6, 2, 2, 64, BF16)
    function = functools.partial(attention_cpu.attention, texts=None, scale=SCALE, window=None)
    first = _all(function, inputs)
    for _ in range(5):
        for again, before in zip(_all(function, inputs), first, strict=True):
            np.testing.assert_array_equal(again, before)


def test_causal_attention_takes_them_where_they_are_at_home():
    def calls(dtype, head_dim):
        shapes = [jax.ShapeDtypeStruct((1, 64, 2, head_dim), dtype)] * 3
        text = jax.jit(lambda q, k, v: causal_attention(q, k, v, SCALE)).lower(*shapes).as_text()
        return re.findall(r"custom_call @(attention_\w+)", text)

    assert calls(BF16, 64) == ["attention_forward"]
    assert calls(jnp.float32, 64) == ["attention_forward_f32"]
    assert calls(jnp.float16, 64) == calls(BF16, 20) == calls(jnp.float32, 20) == []
    assert "CPUs" in attention_cpu.unsupported_reason("gpu", BF16, 64, plain=True)
    assert "not float16" in attention_cpu.unsupported_reason("cpu", "float16", 64, plain=True)
    assert "not 20" in attention_cpu.unsupported_reason("cpu", "bfloat16", 20, plain=True)
    assert "soft cap" in attention_cpu.unsupported_reason("cpu", "bfloat16", 64, plain=False)


def test_vmap_and_checkpoint():
    q, k, v, d_out = (x.reshape(2, 1, *x.shape[1:]) for x in _inputs(70, 2, 1, 2, 32, BF16))

    def loss(q, k, v, d_out):
        out = jax.checkpoint(lambda *qkv: causal_attention(*qkv, SCALE))(q, k, v)
        return jnp.sum((out * d_out).astype(jnp.float32))

    mapped = jax.vmap(jax.grad(loss))(q, k, v, d_out)
    alone = jnp.stack([jax.grad(loss)(*(x[i] for x in (q, k, v, d_out))) for i in range(2)])
    np.testing.assert_array_equal(np.asarray(mapped, np.float32), np.asarray(alone, np.float32))


def test_packed_operands_are_counted_and_linear_in_length():
    def scratch(length):
        shapes = [jax.ShapeDtypeStruct((1, length, n, 64), BF16) for n in (9, 3, 3, 9)]

        def gradients(q, k, v, d_out):
            return jax.vjp(lambda *qkv: causal_attention(*qkv, SCALE), q, k, v)[1](d_out)

        return jax.jit(gradients).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    short, long = scratch(1024), scratch(8192)
    assert 7.5 * short < long < 8.5 * short
    assert long < 8192 * 64 * 4 * (3 * 9 + 2 * 3)  # f32 sums and two packed arrays of 16 bits a q-head, and some
