"""Stacks of layers are filled in place."""

import jax
import numpy as np

from qlora_jax.io.loading.stacks import set_layer
from qlora_jax.quant import quantize_numpy


def test_layers_are_put_into_the_stack_in_place() -> None:
    stack = jax.tree.map(jax.numpy.asarray, quantize_numpy(np.ones((64, 64), np.float32)))
    layer = jax.tree.map(lambda leaf: leaf + leaf, stack)
    stack = jax.tree.map(lambda leaf: jax.numpy.stack([leaf] * 3), stack)
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(stack)]
    after = set_layer(stack, layer, (np.int32(1),))
    # A buffer of one f32 per layer may be passed on or not; the codes must be.
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after)][:2] == before[:2]
    np.testing.assert_array_equal(after.codes[1], layer.codes)
