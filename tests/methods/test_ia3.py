"""Tests (IA)^3 against its equation: values, every gradient, and merged weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.methods.ia3 import IA3
from tests.nn.frozen_linears import LAYER, K, M, N, dequantized_layer, random_linear
from tests.nn.gradients import check_vjp, random_array


@pytest.mark.parametrize("on_input", [False, True])
def test_ia3(on_input):
    linear = random_linear(quantized=True)
    weight, bias = dequantized_layer(linear), linear.bias[...][1]

    def ours(x, vector):
        return IA3.apply([IA3(vector, on_input)], x, [linear.select_layer(LAYER)], [None])[0]

    def plain(x, vector):
        return (x * vector[None]) @ weight.T + bias[None] if on_input else (x @ weight.T + bias[None]) * vector[None]

    vector = random_array(K if on_input else N)
    check_vjp(ours, plain, random_array(M, K), vector)
    one = IA3(jnp.stack([vector, vector]), on_input).select_layer(1)
    merged = random_array(M, K) @ one.merge(weight).T + one.merge_bias(bias)[None]
    np.testing.assert_allclose(ours(random_array(M, K), vector), merged, rtol=2e-5, atol=2e-5)
