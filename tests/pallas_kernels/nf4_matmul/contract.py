"""The contract that every implementation of nf4_matmul must pass, as functions that raise on a violation.

The oracle is NumPy in float64: table * absmax, then a product.
"""

import contextlib
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.devices import target_device
from pallas_kernels.dispatch import Call, refusal
from pallas_kernels.formats.dequantize import dequantize_numpy
from pallas_kernels.formats.layouts import repack
from pallas_kernels.nf4_matmul import IMPLEMENTATIONS, nf4_matmul
from qlora_jax.quant import quantize_numpy
from tests.pallas_kernels.nf4_matmul.tolerances import FUSED, UNFUSED, relative_error, tolerance

ROWS = (1, 3, 7, 16, 65, 128, 300)
SHAPES = ((64, 128), (128, 192), (192, 576))  # 576 = 4.5 x 128, as in SmolLM2
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def assert_close(actual, expected, terms: int, fused: bool = False) -> None:
    """Asserts an error within the roundings of a kernel, or of dequantizing first."""
    allowed = tolerance(actual.dtype, terms, actual.size, FUSED if fused else UNFUSED)
    error = relative_error(actual, expected)
    assert error <= allowed, (error, allowed, actual.dtype)


def weight(shape, *, layout="bnb", quant_type="nf4", double_quant=True, seed=0):
    """Makes a random quantized weight in a layout."""
    w = np.random.default_rng(seed).standard_normal(shape, np.float32) * 0.05
    packed = repack(quantize_numpy(w, quant_type=quant_type, double_quant=double_quant), layout)
    return jax.tree.map(jnp.asarray, packed)


def cases():
    """Yields (rows, shape, dtype, quant_type, double_quant): every value of each, but not every combination."""
    for (m, shape), dtype in itertools.product(itertools.product(ROWS, SHAPES[:2]), DTYPES[:2]):
        yield m, shape, dtype, "nf4", True
    for quant_type, double_quant in (("fp4", True), ("int4", False), ("nf4", False)):
        yield 65, SHAPES[2], jnp.float16, quant_type, double_quant


def check(implementation, layout, rows, shape, dtype, quant_type, double_quant):
    """Checks values and dx of one call against float64, or that an unsupported call raises an error with the reason."""
    one = IMPLEMENTATIONS[implementation]
    w = weight(shape, layout=layout, quant_type=quant_type, double_quant=double_quant)
    dense = dequantize_numpy(jax.tree.map(np.asarray, w), np.float32).astype(np.float64)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((rows, shape[1]), np.float32), dtype)
    dy = jnp.asarray(rng.standard_normal((rows, shape[0]), np.float32), dtype)
    with refused(implementation, "forward", rows, dtype, w) as can_forward:
        y, vjp = jax.vjp(lambda x: nf4_matmul(x, w, implementation=implementation), x)
    if not can_forward:
        return
    assert y.dtype == dtype
    assert_close(y, np.asarray(x, np.float64) @ dense.T, shape[1], one.fused)
    with refused(implementation, "backward", rows, dtype, w) as can_backward:
        (dx,) = vjp(dy)
    if can_backward:
        assert dx.dtype == dtype
        assert_close(dx, np.asarray(dy, np.float64) @ dense, shape[0], one.fused)


@contextlib.contextmanager
def refused(implementation, direction, rows, dtype, w):
    """Yields True if the implementation supports a call; otherwise the body must raise an error with the reason."""
    call = Call.of(direction, rows, jnp.dtype(dtype), w)
    reason = refusal(IMPLEMENTATIONS[implementation].capabilities, target_device(), call)
    if reason is None:
        yield True
        return
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        yield False


def check_stack(implementation, layout):
    """Checks that a traced layer index, leading axes of x, vmap, and scan with checkpoint equal single calls.

    Bit for bit on a CPU; on GPUs, libraries may sum in another order in another program.
    """
    dtype = dtype_of(implementation)
    layers = [weight((64, 128), layout=layout, seed=i) for i in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 5, 128), np.float32), dtype)
    for i, single in enumerate(layers):
        expected = nf4_matmul(x.reshape(10, 128), single, implementation=implementation).reshape(2, 5, 64)
        expected = np.asarray(expected, np.float32)
        at = jax.jit(lambda x, i: nf4_matmul(x, stack, i, implementation=implementation))
        mapped = jax.vmap(lambda x, i=i: nf4_matmul(x, stack, i, implementation=implementation))(x)
        if target_device().platform == "cpu":
            np.testing.assert_array_equal(at(x, jnp.int32(i)), expected)
            np.testing.assert_allclose(mapped, expected, rtol=1e-6, atol=1e-6)
        else:
            assert_close(at(x, jnp.int32(i)), expected, 128)
            assert_close(mapped, expected, 128)


def dtype_of(implementation):
    """Returns the first dtype of DTYPES that an implementation supports."""
    taken = IMPLEMENTATIONS[implementation].capabilities.dtypes
    return next(dtype for dtype in DTYPES if taken is None or jnp.dtype(dtype).name in taken)
