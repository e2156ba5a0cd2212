"""Tests stacks of several types of blocks with as many bytes for each layer, and their products."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.ggml_blocks import row_bytes
from pallas_kernels.grouped_matmul import combine_rows, gather_rows, group_rows
from qlora_jax.nn.frozen_weight import MixedStack, PaddedStack, mixed_grouped, padded_grouped
from tests.ggml_codes import padded_stack, random_ggml

TYPES = ("Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q5_K")
EXPERTS, N, K = 3, 32, 256


def mixed_stack() -> MixedStack:
    """Returns random blocks of TYPES."""
    layers = {kind: tuple(at for at, each in enumerate(TYPES) if each == kind) for kind in dict.fromkeys(TYPES)}
    parts = (random_ggml(kind, (len(rows), EXPERTS), (N, K), seed=len(kind)) for kind, rows in layers.items())
    return MixedStack(parts=tuple(parts), layers=tuple(layers.values()))


def fetched(padded: PaddedStack, layer: jax.Array | int) -> PaddedStack:
    """Returns the layer as a scan fetches it."""
    return jax.tree.map(lambda codes: codes[layer], padded)


def test_a_fetched_layer_has_its_blocks():
    mixed = mixed_stack()
    padded = padded_stack(mixed)
    assert padded.codes.shape == (len(TYPES), EXPERTS * N * row_bytes("Q6_K", K))
    for layer, kind in enumerate(TYPES):
        part, at = mixed.locate(layer)
        found = fetched(padded, layer).fetched_as(kind)
        np.testing.assert_array_equal(found.codes[0], mixed.parts[part].codes[at])
        assert found.codes.shape == padded.part_of(layer).codes.shape


def test_products_and_gradients_equal_those_of_a_mixed_stack():
    mixed, rng = mixed_stack(), np.random.default_rng(0)
    padded, x_MK = padded_stack(mixed), jnp.asarray(rng.normal(size=(5, K)), jnp.float32)
    groups = group_rows(jnp.asarray(rng.integers(0, EXPERTS, (5, 2))), EXPERTS)

    @jax.jit
    def of_padded(x_MK, layer):
        y_PN = padded_grouped(gather_rows(x_MK, groups), fetched(padded, layer), groups, layer)
        return jnp.sum(combine_rows(y_PN, groups) ** 2)

    @jax.jit
    def of_mixed(x_MK, layer):
        return jnp.sum(combine_rows(mixed_grouped(gather_rows(x_MK, groups), mixed, groups, layer), groups) ** 2)

    for layer in range(len(TYPES)):
        found, expected = (jax.value_and_grad(each)(x_MK, jnp.int32(layer)) for each in (of_padded, of_mixed))
        np.testing.assert_array_equal(found[1], expected[1], strict=True)
        assert found[0] == expected[0] != 0
