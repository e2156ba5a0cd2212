"""Tests stacks of several formats: the product, its gradient, and what a scan saves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import combine_rows, gather_rows, group_rows
from qlora_jax.nn.frozen_weight import MixedStack, dense_weight, mixed_grouped
from qlora_jax.nn.linear import frozen_linear
from qlora_jax.quant import quantize
from tests.ggml_codes import dequantized, random_ggml

LAYERS, N, K, M = 7, 128, 256, 24
EXPERTS = 3
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


@pytest.mark.slow
def test_experts_of_several_formats_equal_a_loop_over_experts():
    parts = random_ggml("Q4_1", (1, EXPERTS), (32, 64)), random_ggml("Q8_0", (2, EXPERTS), (32, 64))
    mixed = MixedStack(parts=parts, layers=((1,), (0, 2)))
    w_LENK = jnp.concatenate([jnp.asarray(dequantized(part)) for part in parts])[np.array([1, 0, 2])]
    chosen_Mk = jnp.array([[0, 2], [2, 1], [1, 2], [0, 1]], jnp.int32)
    x_MK = jnp.asarray(np.random.default_rng(0).standard_normal((4, 64), np.float32))

    def grouped(x_MK, layer):
        groups = group_rows(chosen_Mk, EXPERTS)
        y_PN = mixed_grouped(gather_rows(x_MK, groups), mixed, groups, layer)
        return combine_rows(y_PN, groups)

    def loop(x_MK, layer):
        return jnp.einsum("mk,mcnk->mn", x_MK, w_LENK[layer][chosen_Mk])

    def with_gradient(function):
        return jax.jit(jax.value_and_grad(lambda x_MK, layer: jnp.sum(jnp.sin(function(x_MK, layer)))))

    found, expected = with_gradient(grouped), with_gradient(loop)
    for layer in range(3):
        for one, other in zip(found(x_MK, layer), expected(x_MK, layer), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
