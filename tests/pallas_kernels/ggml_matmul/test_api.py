"""Tests ggml_matmul: products and gradients of every block format, what is saved, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ggml_matmul import ggml_matmul
from tests.ggml_codes import dequantized, random_ggml

LAYERS, M, N, K = 3, 4, 24, 512


@pytest.mark.parametrize("ggml_type", ["Q4_1", "Q6_K"])
def test_product_and_gradient_are_those_of_the_dequantized_weight(ggml_type):
    stack = random_ggml(ggml_type, (LAYERS,), (N, K))
    w_LNK = dequantized(stack)
    x_MK = jnp.asarray(np.random.default_rng(1).standard_normal((M, K), np.float32))

    def loss(product):
        return lambda x_MK, layer: jnp.sum(jnp.sin(product(x_MK, layer)))

    expected = jax.jit(jax.value_and_grad(loss(lambda x_MK, layer: x_MK @ w_LNK[layer].T)), static_argnums=1)(x_MK, 1)
    found = jax.jit(jax.value_and_grad(loss(lambda x_MK, layer: ggml_matmul(x_MK, stack, layer))))(x_MK, 1)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_scan_saves_the_bytes_once_and_no_weight():
    stack = random_ggml("Q4_1", (12,), (256, 256))

    def loss(x_MK, stack):
        def layer(x_MK, index):
            return jnp.tanh(ggml_matmul(x_MK, stack, index)), None

        return jnp.sum(jax.lax.scan(layer, x_MK, jnp.arange(12))[0])

    compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((8, 256)), stack).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 256 * 256 * 4


def test_all_problems_are_listed():
    stack = random_ggml("Q4_K", (LAYERS,), (N, K))
    with pytest.raises(ValueError, match=r"K=256 as its last axis.*layer=5 is out of range"):
        ggml_matmul(jnp.ones((M, 256)), stack, 5)
