"""Tests the C++ forward pass of attention in f32, and the backward pass from its residuals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.native.library import attention_problem
from qlora_jax.nn.attention import cpu as attention_cpu
from qlora_jax.nn.attention.causal import causal_attention
from tests.nn.attention.test_branching import branching_errors, rows_of_trees
from tests.nn.attention.test_causal import SCALE, _errors, _inputs, _plain, _segments

pytestmark = pytest.mark.skipif(
    attention_problem("float32") is not None, reason=f"C++ attention in f32: {attention_problem('float32')}"
)


# Below, at, and past a block of 64; odd and even numbers of blocks; heads that share keys.
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads"), [(1, 2, 2), (64, 3, 1), (130, 4, 4), (300, 6, 2), (512, 9, 3)]
)
def test_causal(length, heads, kv_heads):
    assert max(_errors(length, heads, kv_heads, head_dim=64)) < 5e-6


@pytest.mark.parametrize("head_dim", [16, 48, 80, 128, 256])
def test_head_dims(head_dim):
    assert max(_errors(150, 2, 1, head_dim=head_dim)) < 5e-6


@pytest.mark.parametrize("window", [1, 64, 65, 100, 299])
def test_window(window):
    assert max(_errors(300, 4, 2, window=window)) < 5e-6


@pytest.mark.parametrize("window", [None, 70])
def test_segments(window):
    ids = _segments(300, (40, 2, 200), (256, 1, 30))
    assert max(_errors(300, 4, 2, window=window, segments_BT=ids)) < 5e-6


@pytest.mark.parametrize("window", [None, *(pytest.param(each, marks=pytest.mark.slow) for each in (1, 70, 200))])
def test_random_trees(window):
    inputs, handler = _inputs(300, 4, 2), functools.partial(causal_attention)
    for seed in range(4):
        assert max(branching_errors(inputs, rows_of_trees(seed, 2, 300), window, attention=handler)) < 5e-6, seed


def test_segments_in_any_order():
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 300)), jnp.int32)
    assert max(_errors(300, 2, 2, segments_BT=ids)) < 5e-6


def test_large_scores_neither_overflow_nor_vanish():
    q, k, v, _ = _inputs(300, 2, 2)
    np.testing.assert_allclose(causal_attention(100 * q, k, v, SCALE), _plain(100 * q, k, v), atol=5e-4)


def test_a_row_does_not_depend_on_the_others():
    q, k, v, _ = _inputs(300, 4, 2, batch=3)
    attention = jax.jit(functools.partial(causal_attention, scale=SCALE))
    np.testing.assert_array_equal(attention(q, k, v)[1:2], attention(q[1:2], k[1:2], v[1:2]))


def test_it_runs_where_it_is_at_home():
    def runs(dtype=jnp.float32, head_dim=16, **visible):
        q, k, v, _ = _inputs(70, 2, 2, head_dim=head_dim, dtype=dtype)
        text = jax.jit(lambda q, k, v: causal_attention(q, k, v, SCALE, **visible)).lower(q, k, v).as_text()
        return "attention_forward_f32" in text

    assert runs() and runs(window=8)
    assert not runs(jnp.float16) and not runs(head_dim=20)
    assert not runs(softcap=2.0) and not runs(window=jnp.int32(8))
    assert not attention_cpu.supports_forward_f32("gpu", jnp.float32, 64, plain=True)
