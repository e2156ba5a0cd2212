"""Interprets a kernel's twin on one layer of a stack with the race detector, and detects broken twins."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # has the race detector's result
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.formats.dequantize import dequantize_numpy
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.nf4_matmul.mosaic.operands import Operands, operands
from tests.ggml_codes import dequantized, in_split_k, random_ggml
from tests.pallas_kernels.nf4_matmul.contract import weight
from tests.pallas_kernels.nf4_matmul.tolerances import relative_error, tolerance

LAYERS = 3
ROWS = (1, 7, 16, 65, 128, 300)
IN_CI = 7  # one in this many covering cases; not a divisor of their number, so that every number of rows occurs
OTHER_TABLES = ["fp4", "int4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("e2m1", "e3m0"))]
DETECTING = plgpu.InterpretGPUParams(detect_races=True)


def covering(shapes: Sequence[Any], rows: Sequence[int], variants: Sequence[Any]) -> list[tuple[Any, int, Any]]:
    """Returns cases (shape, rows, variant) with every pair of shape and number of rows.

    Every variant meets every shape if there are at most as many variants as numbers of rows, and every number of rows
    if there are at most as many variants as shapes.
    """
    pairs = [(i, j) for i in range(len(shapes)) for j in range(len(rows))]
    return [(shapes[i], rows[j], variants[(i + j) % len(variants)]) for i, j in pairs]


@functools.cache
def stack(shape, quant_type="nf4", double_quant=True):
    """Makes a stack of different layers in `split_k`."""
    form = {"layout": "split_k", "quant_type": quant_type, "double_quant": double_quant}
    layers = [weight(shape, seed=seed, **form) for seed in range(LAYERS)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


@functools.cache
def stack_of_file(shape, ggml_type):
    """Makes a stack of different layers in blocks of a file, in `split_k`."""
    return in_split_k(random_ggml(ggml_type, (LAYERS,), shape))


def dense_of(weights, layer):
    """Returns a layer of the weights [N, K]."""
    one = jax.tree.map(np.asarray, weights.layer(layer))
    return dequantized(one) if isinstance(one, GgmlTensor) else dequantize_numpy(one, np.float32)


class Found(NamedTuple):
    """A result's relative error, the allowed error, and True if there was a race."""

    error: float
    allowed: float
    races: bool


def interpreted(
    product: Callable[[jax.Array, Operands], jax.Array],
    direction: str,
    rows: int,
    weights: Any,
    dtype: Any,
    layer: int = 1,
) -> Found:
    """Runs a twin on random rows and a layer of the weights."""
    dense = dense_of(weights, layer)
    right = dense.T if direction == "forward" else dense
    x = jnp.asarray(np.random.default_rng(5).standard_normal((rows, len(right))), dtype)
    try:
        y = jax.jit(lambda x, w, i: product(x, operands(w, i, dtype)))(x, weights, jnp.int32(layer))
        assert y.shape == (rows, right.shape[1]) and y.dtype == dtype
        error = relative_error(y, np.asarray(x, np.float64) @ right.astype(np.float64))
        races = interpret_pallas_call.get_races().races_found
        return Found(error, tolerance(dtype, len(right), y.size), races)
    finally:
        interpret_pallas_call.reset_gpu_interpret_mode_state()


def check(*args: Any, **kwargs: Any) -> None:
    """Asserts that the twin's result is right and that there was no race."""
    found = interpreted(*args, **kwargs)
    assert found.error <= found.allowed
    assert not found.races


def caught(*args: Any, **kwargs: Any) -> bool:
    """True if a broken twin is detected: by its values, by a race, or by an unfinished operation."""
    try:
        found = interpreted(*args, **kwargs)
    except jax.errors.JaxRuntimeError as failed:
        assert re.search("RACE DETECTED|before kernel finished|no threads observed phase", str(failed))
        return True
    return found.races or not found.error <= 2 * found.allowed  # a NaN is caught too
