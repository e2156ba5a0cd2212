"""Tests stacks of several types of blocks in one array: windows of layers, and their products."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.ggml_blocks import row_bytes
from pallas_kernels.grouped_matmul import combine_rows, gather_rows, group_rows
from qlora_jax.nn.joined_stack import JoinedStack, joined_grouped
from qlora_jax.nn.mixed_stack import MixedStack, mixed_grouped
from tests.ggml_codes import joined_stack, random_ggml

TYPES = ("Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q5_K")
EXPERTS, N, K = 3, 32, 256


def mixed_stack() -> MixedStack:
    """Returns random blocks of TYPES."""
    layers = {kind: tuple(at for at, each in enumerate(TYPES) if each == kind) for kind in dict.fromkeys(TYPES)}
    parts = (random_ggml(kind, (len(rows), EXPERTS), (N, K), seed=len(kind)) for kind, rows in layers.items())
    return MixedStack(parts=tuple(parts), layers=tuple(layers.values()))


def window(joined: JoinedStack, layer: int) -> JoinedStack:
    """Returns the window that a scan fetches."""
    codes = jax.lax.dynamic_slice_in_dim(joined.codes, joined.start(layer), joined.window_rows)
    return dataclasses.replace(joined, codes=codes)


def test_a_window_has_the_blocks_of_its_layer():
    mixed = mixed_stack()
    joined = joined_stack(mixed)
    assert joined.codes.size == EXPERTS * N * sum(row_bytes(kind, K) for kind in TYPES)  # nothing is padded
    for layer, kind in enumerate(TYPES):
        part, at = mixed.locate(layer)
        found = window(joined, layer).in_window(kind)
        np.testing.assert_array_equal(found.codes[0], mixed.parts[part].codes[at])
        assert found.codes.shape == joined.part_of(layer).codes.shape
    assert [int(joined.start(at)) for at in (-1, len(TYPES))] == [joined.starts[0], joined.starts[-1]]


def test_products_and_gradients_equal_those_of_a_mixed_stack():
    mixed, rng = mixed_stack(), np.random.default_rng(0)
    joined, x_MK = joined_stack(mixed), jnp.asarray(rng.normal(size=(5, K)), jnp.float32)
    groups = group_rows(jnp.asarray(rng.integers(0, EXPERTS, (5, 2))), EXPERTS)

    @jax.jit
    def of_joined(x_MK, layer):
        y_PN = joined_grouped(gather_rows(x_MK, groups), window(joined, layer), groups, layer)
        return jnp.sum(combine_rows(y_PN, groups) ** 2)

    @jax.jit
    def of_mixed(x_MK, layer):
        return jnp.sum(combine_rows(mixed_grouped(gather_rows(x_MK, groups), mixed, groups, layer), groups) ** 2)

    for layer in range(len(TYPES)):
        found, expected = (jax.value_and_grad(each)(x_MK, jnp.int32(layer)) for each in (of_joined, of_mixed))
        np.testing.assert_array_equal(found[1], expected[1], strict=True)
        assert found[0] == expected[0] != 0
