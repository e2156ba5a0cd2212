"""Tests VeRA against its equation: values, every gradient, and merged weights; its draw against torch's generator."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.methods.vera import VeRA, draw_projections
from qlora_jax.nn.dropout import apply_dropout
from qlora_jax.nn.variables import Frozen
from tests.nn.frozen_linears import LAYER, K, M, N, R, dequantized_layer, random_linear
from tests.nn.gradients import check_vjp, random_array

LARGER_N, LARGER_K = N + 8, K + 16  # sizes of another projection, which shares A and B
A, B = random_array(LARGER_K, R), random_array(LARGER_N, R)


def _vera(lambda_d, lambda_b, dropout: float = 0.0) -> VeRA:
    return VeRA(lambda_d, lambda_b, Frozen(A), Frozen(B), dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_vera(dropout):
    """Two projections of one x share the product with A; masks differ."""
    linear = random_linear(quantized=True)
    weight, bias = dequantized_layer(linear), linear.bias[...][1]
    keys = [jax.random.split(jax.random.key(seed), 3) if dropout else None for seed in (3, 4)]

    def ours(x, *vectors):
        adapters = [_vera(*vectors[:2], dropout), _vera(*vectors[2:], dropout)]
        return jnp.stack(VeRA.apply(adapters, x, [linear.select_layer(LAYER)] * 2, keys))

    def plain(x, *vectors):
        def one(d, b, key):
            narrow = d[None] * (apply_dropout(x, dropout, key) @ A[:K])
            return x @ weight.T + bias[None] + b[None] * (narrow @ B[:N].T)

        return jnp.stack([one(*vectors[:2], keys[0]), one(*vectors[2:], keys[1])])

    check_vjp(ours, plain, random_array(M, K), *(random_array(size, seed=n) for n, size in enumerate((R, N, R, N))))


def test_merge_does_what_the_adapter_does():
    linear, x = random_linear(quantized=True), random_array(M, K)
    weight, bias = dequantized_layer(linear), linear.bias[...][1]
    stack = _vera(random_array(2, R), random_array(2, N))
    one = stack.select_layer(1)
    (y,) = VeRA.apply([one], x, [linear.select_layer(LAYER)], [None])
    merged = x @ one.merge(weight).T + one.merge_bias(bias)[None]
    np.testing.assert_allclose(y, merged, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_adapter_changes_no_bit(dtype):
    linear, x = random_linear(quantized=True), random_array(M, K).astype(dtype)
    fresh = VeRA.init(2, N, Frozen(A), Frozen(B), d_initial=0.1, dropout=0.0)
    np.testing.assert_array_equal(fresh.lambda_d[...], np.full((2, R), 0.1, np.float32))
    layer = linear.select_layer(LAYER)
    np.testing.assert_array_equal(fresh.apply([fresh.select_layer(1)], x, [layer], [None])[0], layer(x))


def test_the_draw_is_kaimings_and_never_changes():
    """The first numbers of the Mersenne Twister with seed 5489 are published with it; tests/parity compares torch's."""
    a, b = draw_projections(5489, 2, (300, 200))
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((2, 200), (300, 2), np.float32, np.float32)
    bound = math.sqrt(6 / 200)
    published = np.array([3499211612, 581869302, 3890346734, 3586334585]) % (1 << 24) / (1 << 24)
    np.testing.assert_allclose(a[0, :4], bound * (2 * published - 1), rtol=1e-6)
    for matrix, limit in ((a, bound), (b, math.sqrt(3))):
        assert np.abs(matrix).max() <= limit and matrix.std() == pytest.approx(limit / math.sqrt(3), rel=0.1)
    assert not np.array_equal(a, draw_projections(0, 2, (300, 200))[0])
