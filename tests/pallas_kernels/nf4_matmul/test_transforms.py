"""vmap, scan and forward mode: the calls that an implementation receives, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import frozen_product
from pallas_kernels.dispatch import Capabilities, Implementation
from pallas_kernels.nf4_matmul import api, nf4_matmul, reference
from tests.pallas_kernels.nf4_matmul.contract import weight

LAYERS = 3


@pytest.fixture
def seen(monkeypatch):
    """Records the shapes of rows that an implementation `spy` receives, in order."""
    shapes = []

    def record(product):
        def run(rows, weights, layer):
            shapes.append(rows.shape)
            return product(rows, weights, layer)

        return run

    spy = Implementation(record(reference.forward), record(reference.backward), Capabilities(rows=(1, 64)))
    monkeypatch.setitem(api.IMPLEMENTATIONS, "spy", spy)
    frozen_product._mappable.cache_clear()
    yield shapes
    frozen_product._mappable.cache_clear()


def rows(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def test_a_mapped_axis_of_the_rows_becomes_rows(seen):
    w, x = weight((64, 128), layout="split_k"), rows(3, 4, 5, 128)
    expected = nf4_matmul(x, w, implementation="reference")
    mapped = jax.vmap(jax.vmap(lambda x: nf4_matmul(x, w, implementation="spy")))(x)
    assert seen[-1] == (60, 128)
    np.testing.assert_array_equal(mapped, expected)


def test_a_mapped_axis_of_the_gradient_becomes_rows(seen):
    w, x = weight((64, 128), layout="split_k"), rows(4, 5, 128)

    def gradient(x, implementation):
        return jax.grad(lambda x: jnp.sum(nf4_matmul(x, w, implementation=implementation) ** 2))(x)

    mapped = jax.vmap(lambda x: gradient(x, "spy"))(x)
    assert {(20, 128), (20, 64)} <= set(seen)
    np.testing.assert_allclose(mapped, gradient(x, "reference"), rtol=1e-5, atol=1e-5)


def test_what_is_too_many_rows_together_is_refused(seen):
    w, x = weight((64, 128), layout="split_k"), rows(13, 5, 128)
    with pytest.raises(NotImplementedError, match="spy takes 1 to 64 rows, not 65"):
        jax.vmap(lambda x: nf4_matmul(x, w, implementation="spy"))(x)


@pytest.mark.parametrize("mapped_rows", [True, False])
def test_products_with_a_mapped_layer_or_weight_are_made_in_turn(seen, mapped_rows):
    layers = [weight((64, 128), layout="split_k", seed=i) for i in range(LAYERS)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x = rows(LAYERS, 5, 128) if mapped_rows else rows(5, 128)
    axis = 0 if mapped_rows else None
    expected = [nf4_matmul(x[i] if mapped_rows else x, layers[i], implementation="reference") for i in range(LAYERS)]
    by_layer = jax.vmap(lambda x, i: nf4_matmul(x, stack, i, implementation="spy"), (axis, 0))(x, jnp.arange(LAYERS))
    by_weight = jax.vmap(lambda x, w: nf4_matmul(x, w, implementation="spy"), (axis, 0))(x, stack)
    assert set(seen) == {(5, 128)}
    np.testing.assert_allclose(by_layer, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_weight, expected, rtol=1e-5, atol=1e-5)


def test_forward_mode_is_refused():
    w, x = weight((64, 128)), rows(5, 128)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: nf4_matmul(x, w), (x,), (x,))
