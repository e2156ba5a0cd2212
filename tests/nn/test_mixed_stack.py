"""Tests stacks of several formats: the product, its gradient, and what a scan saves."""

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.nn.linear import frozen_linear
from qlora_jax.nn.mixed_stack import MixedStack, dense_weight
from qlora_jax.quant import quantize
from tests.ggml_codes import dequantized, random_ggml

LAYERS, N, K, M = 7, 128, 256, 16
LAYERS_OF_PARTS = (0, 3), (2,), (5, 6), (1, 4)


def weights() -> tuple[MixedStack, jax.Array]:
    """Returns a stack of 4-bit, Q4_1, Q6_K and dense layers, and its dequantized layers."""
    dense = jnp.asarray(np.random.default_rng(0).normal(size=(2, N, K)).astype(np.float32))
    codes = [quantize(w_NK) for w_NK in np.random.default_rng(1).normal(size=(2, N, K)).astype(np.float32)]
    quantized = jax.tree.map(lambda *leaves: jnp.stack(leaves), *codes)
    blocks = random_ggml("Q4_1", (1,), (N, K)), random_ggml("Q6_K", (2,), (N, K))
    mixed = MixedStack(parts=(quantized, *blocks, dense), layers=LAYERS_OF_PARTS)
    return mixed, mixed.in_layer_order([dense_weight(part, jnp.float32) for part in mixed.parts])


def through(x_MK, stack):
    """Applies all layers in sequence, each to the first K columns of the result before."""

    def layer(x_MK, index):
        y_MN = frozen_linear(x_MK, stack, index)
        return jnp.sin(jnp.concatenate([y_MN, y_MN], axis=1)), None

    return jnp.sum(jax.lax.scan(layer, x_MK, jnp.arange(LAYERS))[0])


def test_layers_and_their_gradients_are_those_of_the_dense_stack():
    mixed, w_LNK = weights()
    assert mixed.shape == (N, K) and mixed.num_layers == LAYERS
    assert [mixed.locate(layer) for layer in range(LAYERS)] == [(0, 0), (3, 0), (1, 0), (0, 1), (3, 1), (2, 0), (2, 1)]
    np.testing.assert_array_equal(w_LNK[5:], dequantized(mixed.parts[2]))
    x_MK = jax.random.normal(jax.random.key(0), (M, K)) * 0.1
    for layer in range(LAYERS):
        expected = x_MK @ w_LNK[layer].T
        np.testing.assert_allclose(frozen_linear(x_MK, mixed, layer), expected, rtol=1e-4, atol=1e-4)
    found, expected = (jax.jit(jax.value_and_grad(through))(x_MK, stack) for stack in (mixed, w_LNK))
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-3, atol=1e-3)


def test_a_scan_keeps_no_layer_of_it():
    mixed, _ = weights()
    compiled = jax.jit(jax.grad(through)).lower(jnp.ones((M, K)), mixed).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * N * K * LAYERS
