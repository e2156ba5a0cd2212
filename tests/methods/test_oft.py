"""Tests OFT against dense rotations: values, every gradient, orthogonality, and merged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.methods.oft import OFT, InferenceOFT, block_elements, block_size, rotation_change, skew_symmetric
from tests.marks import SLOW
from tests.nn.frozen_linears import LAYER, K, M, dequantized_layer, random_linear
from tests.nn.gradients import check_vjp, random_array

SIZE = 8
IDENTITY = np.eye(SIZE, dtype=np.float32)


def _dense_rotation(upper_CE: jax.Array, terms: int | None) -> jax.Array:
    """Returns the [K, K] matrix, by scatters, powers and inverses of whole matrices."""
    rows, columns = np.triu_indices(SIZE, 1)
    half = jnp.zeros((len(upper_CE), SIZE, SIZE)).at[:, rows, columns].set(upper_CE)
    blocks = []
    for skew in half - jnp.swapaxes(half, 1, 2):
        if terms is None:
            blocks.append((IDENTITY - skew) @ jnp.linalg.inv(IDENTITY + skew))
        else:
            powers = [jnp.linalg.matrix_power(skew, n) for n in range(max(terms, 4))]
            last = {2: 1, 3: 3, 4: 3, 5: 4, 7: 6}[terms]  # PEFT's loop gives 3 and 4 terms the same powers
            blocks.append(IDENTITY + sum((1 if 1 < n == last else 2) * powers[n] for n in range(1, last + 1)))
    return jax.scipy.linalg.block_diag(*blocks * (K // SIZE // len(blocks)))


CASES = [(5, False), (None, False), (None, True)]
OTHERS = [(5, True), (2, False), (3, False), (4, False), (7, False)]


@pytest.mark.parametrize(("terms", "shared"), [*CASES, *(pytest.param(*case, marks=SLOW) for case in OTHERS)])
def test_oft(terms, shared):
    linear = random_linear(quantized=True)
    weight, bias = dequantized_layer(linear), linear.bias[...][1]

    def ours(x, upper):
        return OFT.apply([OFT(upper, terms)], x, [linear.select_layer(LAYER)], [None])[0]

    def plain(x, upper):
        return (x @ _dense_rotation(upper, terms)) @ weight.T + bias[None]

    x, upper = random_array(M, K), random_array(1 if shared else K // SIZE, block_elements(SIZE)) / 4
    check_vjp(ours, plain, x, upper)
    one = OFT(jnp.stack([0 * upper, upper]), terms).select_layer(1)
    merged = x @ one.merge(weight).T + one.merge_bias(bias)[None]
    np.testing.assert_allclose(ours(x, upper), merged, rtol=2e-5, atol=2e-5)


def test_the_exact_rotation_is_orthogonal_and_the_series_nearly():
    skew = skew_symmetric(random_array(5, block_elements(SIZE)) / 16)
    exact = IDENTITY + np.asarray(rotation_change(skew, None))
    np.testing.assert_allclose(np.swapaxes(exact, 1, 2) @ exact, np.broadcast_to(IDENTITY, exact.shape), atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(exact), 1.0, rtol=1e-5)
    # The series approaches the inverse rotation.
    errors = [jnp.max(jnp.abs(rotation_change(-skew, terms) - rotation_change(skew, None))) for terms in (5, 9, 33)]
    assert errors[0] > 4 * errors[1] > 16 * errors[2] and errors[2] < 2e-6


def test_small_angles_survive_bf16():
    """R itself would round a turn by 1e-4 to the identity's 1."""
    change = rotation_change(skew_symmetric(jnp.full((1, 1), 1e-4)), None)
    np.testing.assert_allclose(change[0], [[-2e-8, -2e-4], [2e-4, -2e-8]], rtol=1e-5)
    np.testing.assert_allclose(change.astype(jnp.bfloat16).astype(jnp.float32), change, rtol=2**-8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_adapter_changes_no_bit(dtype):
    linear, x = random_linear(quantized=True), random_array(M, K).astype(dtype)
    fresh = OFT.init(2, K // SIZE, SIZE, neumann_terms=5, dtype="float32")
    assert fresh.oft_r[...].shape == (2, K // SIZE, 28)
    layer = linear.select_layer(LAYER)
    np.testing.assert_array_equal(fresh.apply([fresh.select_layer(1)], x, [layer], [None])[0], layer(x))


def test_rotations_computed_once_are_the_same():
    linear, x = random_linear(quantized=True), random_array(M, K)
    adapter = OFT(random_array(2, K // SIZE, block_elements(SIZE)) / 4, 5)
    once = InferenceOFT(adapter)
    one = InferenceOFT(adapter.select_layer(1))
    np.testing.assert_array_equal(once.rotation[...][1], one.rotation[...])
    layer = linear.select_layer(LAYER)
    found, expected = (each.apply([each], x, [layer], [None])[0] for each in (one, adapter.select_layer(1)))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_sizes_of_blocks_follow_from_their_elements():
    assert [block_size(block_elements(size)) for size in range(2, 300)] == list(range(2, 300))
