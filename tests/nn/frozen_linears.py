"""Random frozen linear layers for tests of adapters."""

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.nn.linear import QLinear
from qlora_jax.quant import dequantize, quantize
from tests.nn.gradients import random_array

N, K, R, M = 24, 64, 4, 30
LAYER = jnp.int32(1)


def random_linear(*, quantized: bool, bias: bool = True) -> QLinear:
    """Creates a stack of two layers [N, K], 4-bit or dense."""
    weights = [np.asarray(random_array(N, K, seed=seed)) / 8 for seed in range(2)]
    if quantized:
        stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(quantize, weights))
    else:
        stack = jnp.stack(weights)
    return QLinear("name", stack, random_array(2, N) if bias else None)


def dequantized_layer(linear: QLinear) -> jax.Array:
    """Returns layer 1 of the stack, dequantized to f32."""
    weight = jax.tree.map(lambda leaf: leaf[1], linear.weight.get_value())
    return weight if isinstance(weight, jax.Array) else dequantize(weight, jnp.dtype("float32"))
