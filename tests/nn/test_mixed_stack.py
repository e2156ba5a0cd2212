"""Tests partly dense stacks: the product, its gradient, and what a scan saves."""

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.nn.linear import frozen_linear
from qlora_jax.nn.mixed_stack import MixedStack
from qlora_jax.quant import dequantize, quantize

LAYERS, N, K, M = 5, 128, 256, 16
DENSE = (1, 4)


def weights() -> tuple[MixedStack, jax.Array]:
    """Returns a mixed stack, and its dequantized layers."""
    w_LNK = np.random.default_rng(0).normal(size=(LAYERS, N, K)).astype(np.float32)
    codes = [quantize(w_NK) for layer, w_NK in enumerate(w_LNK) if layer not in DENSE]
    quantized = jax.tree.map(lambda *leaves: jnp.stack(leaves), *codes)
    mixed = MixedStack(quantized=quantized, dense=jnp.asarray(w_LNK[list(DENSE)]), dense_layers=DENSE)
    return mixed, mixed.in_layer_order(jnp.stack([dequantize(one, jnp.float32) for one in codes]), mixed.dense)


def through(x_MK, stack):
    """Applies all layers in sequence, each to the first K columns of the result before."""

    def layer(x_MK, index):
        y_MN = frozen_linear(x_MK, stack, index)
        return jnp.sin(jnp.concatenate([y_MN, y_MN], axis=1)), None

    return jnp.sum(jax.lax.scan(layer, x_MK, jnp.arange(LAYERS))[0])


def test_layers_and_their_gradients_are_those_of_the_dense_stack():
    mixed, w_LNK = weights()
    assert mixed.shape == (N, K) and mixed.num_layers == LAYERS
    assert [mixed.locate(layer)[0] for layer in range(LAYERS)] == [
        "quantized",
        "dense",
        "quantized",
        "quantized",
        "dense",
    ]
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
