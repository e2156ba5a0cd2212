"""Tests on an NVIDIA GPU: the contract of every implementation that the card supports, and every real shape.

A real shape's product is compared with a product of the dequantized weight on the card, in f32 without TF32. That
product is compared with NumPy's in float64.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dense_matmul import dot
from pallas_kernels.devices import target_device
from pallas_kernels.dispatch import DIRECTIONS, Call, refusal
from pallas_kernels.formats.dequantize import dequantize, dequantize_numpy
from pallas_kernels.kernel_report import abstract_weight
from pallas_kernels.nf4_matmul import IMPLEMENTATIONS, nf4_matmul
from pallas_kernels.nf4_matmul.shapes import SHAPES
from pallas_kernels.synthetic_weights import synthetic_like
from tests.pallas_kernels.nf4_matmul import contract as contract
from tests.pallas_kernels.nf4_matmul.tolerances import relative_error, tolerance

ROWS = (1, 7, 16, 65, 128, 300, 2048)
BF16, F16 = jnp.bfloat16, jnp.float16
DTYPES = (BF16, F16)
NAMES = [name for name, one in IMPLEMENTATIONS.items() if one.capabilities.devices != ("cpu",)]
REAL = sorted({shape.nk for shape in SHAPES.values()})
LAYOUT = "split_k"  # layout of weights on GPUs
LAYER, LAYERS = 1, 2


@pytest.fixture(params=NAMES)
def implementation(request):
    """Yields each implementation that the card supports; skips the others with the reason."""
    devices, here = IMPLEMENTATIONS[request.param].capabilities.devices, target_device()
    if devices is not None and not set(devices) & set(here.names):
        pytest.skip(f"{request.param} runs on {', '.join(devices)}, not on {here}")
    if missing := IMPLEMENTATIONS[request.param].missing():
        pytest.fail(f"{request.param} {missing}")
    return request.param


def stack(shape):
    """Makes a stack of two different layers."""
    one = abstract_weight(shape, LAYOUT)
    return synthetic_like(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((LAYERS, *leaf.shape), leaf.dtype), one))


@functools.partial(jax.jit, static_argnames="contracted")
def exact(rows, dense, contracted):
    """Computes the product in f32, without TF32."""
    with jax.default_matmul_precision("highest"):
        return dot(rows.astype(jnp.float32), dense, contracted, jnp.float32)


@jax.jit
def difference(actual, expected):
    """Computes |actual - expected| / |expected| in the Frobenius norm; NaN if there is one."""
    return jnp.linalg.norm(actual.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)


@jax.jit
def dequantized(weights, layer):
    """Dequantizes one layer of a stack to f32."""
    return dequantize(weights.layer(layer), jnp.float32)


def errors(implementation, shape, rows=ROWS, layer=LAYER):
    """Yields (name, relative error, allowed) for each M and supported direction, alternating between two dtypes.

    The products use `layer`, the expected values LAYER.
    """
    weights = stack(shape)
    dense = dequantized(weights, jnp.int32(LAYER))
    for direction in DIRECTIONS:
        contracted = (1, 1) if direction == "forward" else (1, 0)
        given = jax.random.normal(jax.random.key(0), (sum(rows), dense.shape[contracted[1]]), BF16)
        expected = exact(given, dense, contracted)
        starts = itertools.accumulate(rows, initial=0)
        for m, dtype, start in zip(rows, itertools.cycle(DTYPES), starts, strict=False):
            call = Call.of(direction, m, jnp.dtype(dtype), weights)
            if refusal(IMPLEMENTATIONS[implementation].capabilities, target_device(), call) is None:
                actual = product(given[start : start + m].astype(dtype), weights, layer, implementation, direction)
                assert actual.shape == (m, expected.shape[1]) and actual.dtype == dtype
                error = float(difference(actual, expected[start : start + m]))
                yield (direction, m, dtype), error, tolerance(dtype, given.shape[1], actual.size)


@functools.partial(jax.jit, static_argnames=("implementation", "direction"))
def product(given, weights, layer, implementation, direction):
    """Computes one product with a traced layer; dx by autodiff if the implementation has a forward pass."""
    if direction == "forward":
        return nf4_matmul(given, weights, layer, implementation)
    x = jnp.zeros((given.shape[0], weights.shape[1]), given.dtype)
    (dx,) = jax.vjp(lambda x: nf4_matmul(x, weights, layer, implementation), x)[1](given)
    return dx


@pytest.mark.gpu
def test_values_and_input_gradients(implementation):
    layouts = IMPLEMENTATIONS[implementation].capabilities.layouts or ("bnb", LAYOUT)
    with jax.default_matmul_precision("highest"):  # the reference's f32 would be TF32 otherwise
        for layout, case in itertools.product(layouts, contract.cases()):
            contract.check(implementation, layout, *case)


@pytest.mark.gpu
def test_stacks_and_transforms(implementation):
    with jax.default_matmul_precision("highest"):
        contract.check_stack(implementation, LAYOUT)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL, ids=lambda shape: "x".join(map(str, shape)))
def test_real_shapes(implementation, shape):
    found = list(errors(implementation, shape))
    assert found and [one for one in found if not one[1] <= one[2]] == []


@pytest.mark.gpu
def test_what_the_card_computes_in_f32_is_what_numpy_does():
    check_exact((1536, 576))


# The helpers above, on any device


def check_exact(shape):
    weight = synthetic_like(abstract_weight(shape, LAYOUT))
    x = np.random.default_rng(4).standard_normal((65, shape[1]), np.float32)
    dense = dequantize_numpy(jax.tree.map(np.asarray, weight), np.float32).astype(np.float64)
    actual = exact(jnp.asarray(x), dequantize(weight, jnp.float32), (1, 1))
    assert relative_error(actual, x.astype(np.float64) @ dense.T) <= np.sqrt(shape[1]) * 2.0**-23


def test_the_exact_product_anywhere():
    check_exact((192, 320))


def test_a_wrong_layer_is_an_error_and_a_right_one_is_not():
    right = list(errors("reference", (192, 320), (7, 65)))
    assert len(right) == 4 and all(error <= allowed for _, error, allowed in right)
    wrong = errors("reference", (192, 320), (7, 65), layer=0)
    assert all(error > 100 * allowed for _, error, allowed in wrong)


def test_the_shapes_are_those_of_published_models():
    assert (14336, 4096) in REAL and (576, 1536) in REAL and len(REAL) == len(set(REAL))
