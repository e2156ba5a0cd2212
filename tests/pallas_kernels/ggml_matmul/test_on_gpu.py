"""Tests on an NVIDIA GPU: codes of files by every implementation that the card supports, with their gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.devices import target_device
from pallas_kernels.dispatch import DIRECTIONS, refusal
from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS
from pallas_kernels.ggml_matmul import ggml_matmul
from pallas_kernels.ggml_matmul.api import IMPLEMENTATIONS, call_of
from tests.ggml_codes import dequantized, in_split_k, random_ggml
from tests.pallas_kernels.nf4_matmul.tolerances import relative_error, tolerance

ROWS, DTYPES = (1, 7, 16, 65, 128, 300), (jnp.bfloat16, jnp.float16)
SHAPES = ((192, 320), (576, 1536))  # halves of tiles and rounds, several blocks of the grid
CODES = [name for name, block in BLOCK_FORMATS.items() if block.code is not None]
KERNELS = [name for name, one in IMPLEMENTATIONS.items() if one.fused]
LAYER = 1


def errors(implementation, ggml_type, shape, rows=ROWS, layer=LAYER):
    """Yields (call, relative error, allowed) of the supported calls; products use `layer`, expected values LAYER."""
    stack = in_split_k(random_ggml(ggml_type, (2,), shape))
    dense = dequantized(stack)[LAYER].astype(np.float64)
    for direction, m, dtype in itertools.product(DIRECTIONS, rows, DTYPES):
        call = call_of(direction, m, dtype, stack)
        if refusal(IMPLEMENTATIONS[implementation].capabilities, target_device(), call) is None:
            right = dense.T if direction == "forward" else dense
            given = jnp.asarray(np.random.default_rng(m).standard_normal((m, len(right))), dtype)
            found = product(given, stack, layer, implementation, direction)
            error = relative_error(found, np.asarray(given, np.float64) @ right)
            yield call, error, tolerance(dtype, len(right), found.size)


def product(given, weights, layer, implementation, direction):
    """Computes one product with a traced layer."""

    def run(given, layer):
        if direction == "forward":
            return ggml_matmul(given, weights, layer, implementation)
        x = jnp.zeros((len(given), weights.shape[1]), given.dtype)
        return jax.vjp(lambda x: ggml_matmul(x, weights, layer, implementation), x)[1](given)[0]

    return jax.jit(run)(given, jnp.int32(layer))


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("ggml_type", CODES)
def test_products_and_gradients(implementation, ggml_type):
    if not set(IMPLEMENTATIONS[implementation].capabilities.devices) & set(target_device().names):
        pytest.skip(f"{implementation} does not run on {target_device()}")
    shapes = SHAPES if BLOCK_FORMATS[ggml_type].weights < 256 else SHAPES[1:]
    found = [one for shape in shapes for one in errors(implementation, ggml_type, shape)]
    assert found and [one for one in found if not one[1] <= one[2]] == []


def test_a_wrong_layer_is_an_error_and_a_right_one_is_not():
    """Runs the helpers on any device."""
    right = list(errors("reference", "NVFP4_64", (64, 192), (7,)))
    assert len(right) == 4 and all(error <= allowed for _, error, allowed in right)
    wrong = errors("reference", "NVFP4_64", (64, 192), (7,), layer=0)
    assert all(error > 100 * allowed for _, error, allowed in wrong)
