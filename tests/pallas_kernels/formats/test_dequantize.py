"""dequantize and expand_absmax: against the formula per element, and jit against NumPy bit for bit."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.dequantize import dequantize, dequantize_numpy, expand_absmax, expand_absmax_numpy
from pallas_kernels.formats.layouts import LAYOUTS, repack
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.tables import CODE_TABLES, dynamic_map

ROWS, COLUMNS, BLOCK_SIZE, NESTED = 64, 576, 64, 256
BLOCKS = COLUMNS // BLOCK_SIZE


def stacked_weight(quant_type: str, layers: int = 2) -> QTensor:
    """Random codes and double-quantized constants, in `bnb` layout; its last nested block is partial."""
    rng = np.random.default_rng(7)
    return QTensor(
        codes=rng.integers(0, 256, (layers, ROWS, COLUMNS // 2), np.uint8),
        absmax_codes=rng.integers(0, 256, (layers, ROWS, BLOCKS), np.uint8),
        nested_absmax=rng.random((layers, -(-ROWS * BLOCKS // NESTED)), np.float32),
        nested_offset=1 + rng.random(layers, np.float32),
        quant_type=quant_type,
        block_size=BLOCK_SIZE,
        nested_block_size=NESTED,
        shape=(ROWS, COLUMNS),
        dtype="bfloat16",
        layout="bnb",
    )


def on_device(qt: QTensor) -> QTensor:
    return jax.tree.map(jnp.asarray, qt)


def by_the_formula(qt: QTensor, layer: int, n: int, k: int) -> np.float32:
    """Computes one element of a `bnb` weight from scalars."""
    byte = int(qt.codes[layer, n, k // 2])
    code = byte & 15 if k % 2 else byte >> 4
    block = n * BLOCKS + k // BLOCK_SIZE
    level = dynamic_map()[qt.absmax_codes[layer].reshape(-1)[block]]
    absmax = np.float32(level * qt.nested_absmax[layer, block // NESTED]) + qt.nested_offset[layer]
    return CODE_TABLES[qt.quant_type][code] * absmax


@pytest.mark.parametrize("quant_type", CODE_TABLES)
def test_numpy_follows_the_formula(quant_type: str) -> None:
    qt = stacked_weight(quant_type)
    weights = dequantize_numpy(qt, np.float32)
    places = np.random.default_rng(0).integers(0, [2, ROWS, COLUMNS], (300, 3)).tolist()
    expected = [by_the_formula(qt, *place) for place in places]
    np.testing.assert_array_equal([weights[tuple(place)] for place in places], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", None])
def test_jit_equals_numpy_in_every_layout(layout: str, dtype: str | None) -> None:
    qt = stacked_weight("nf4")
    weights = jax.jit(dequantize, static_argnums=1)(on_device(repack(qt, layout)), dtype)
    expected = dequantize_numpy(qt, dtype)
    assert weights.dtype == expected.dtype == jnp.dtype(dtype or "bfloat16")
    np.testing.assert_array_equal(np.asarray(weights), expected)
    np.testing.assert_array_equal(dequantize_numpy(repack(qt, layout), dtype), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_layer_of_a_stack_inside_jit(layout: str) -> None:
    qt = stacked_weight("fp4", layers=3)

    @jax.jit
    def layer_weights(stack: QTensor, layer: jax.Array) -> jax.Array:
        return dequantize(jax.tree.map(lambda leaf: leaf[layer], stack), jnp.float32)

    for layer in range(3):
        weights = layer_weights(on_device(repack(qt, layout)), jnp.int32(layer))
        np.testing.assert_array_equal(np.asarray(weights), dequantize_numpy(qt, np.float32)[layer])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_constants_are_rounded_twice_as_bitsandbytes_rounds_them(layout: str) -> None:
    """One fused multiply-add would differ in about a tenth of these 1,728 constants."""
    qt = repack(stacked_weight("nf4", layers=3), layout)
    expected = expand_absmax_numpy(qt)
    once = dynamic_map()[LAYOUTS[layout].turn(qt.absmax_codes)].astype(np.float64)
    nested = np.repeat(qt.nested_absmax, NESTED, axis=-1)[:, : ROWS * BLOCKS].reshape(once.shape)
    offset = qt.nested_offset.reshape(-1, *[1] * (once.ndim - 1))
    fused = LAYOUTS[layout].turn((once * nested + offset).astype(np.float32))
    assert np.sum(fused != expected) > 50
    np.testing.assert_array_equal(np.asarray(jax.jit(expand_absmax)(on_device(qt))), expected)


def test_flat_weights_of_any_shape() -> None:
    """Odd counts and partial blocks: 105 elements are one whole block, a partial one, and half a byte of padding."""
    rng = np.random.default_rng(3)
    qt = QTensor(
        codes=rng.integers(0, 256, 53, np.uint8),
        absmax=rng.random(2, np.float32),
        quant_type="int4",
        block_size=64,
        nested_block_size=256,
        shape=(3, 5, 7),
        dtype="float32",
        layout="flat",
    )
    codes = [int(qt.codes[e // 2]) & 15 if e % 2 else int(qt.codes[e // 2]) >> 4 for e in range(105)]
    expected = np.array([CODE_TABLES["int4"][code] * qt.absmax[e // 64] for e, code in enumerate(codes)])
    np.testing.assert_array_equal(dequantize_numpy(qt), expected.reshape(3, 5, 7))
    np.testing.assert_array_equal(np.asarray(jax.jit(dequantize)(on_device(qt))), expected.reshape(3, 5, 7))


def test_not_finite_constants_stay_visible() -> None:
    qt = stacked_weight("nf4", layers=1)
    qt.nested_absmax[0, 0] = np.inf
    assert np.isnan(np.asarray(expand_absmax(on_device(qt)))[0, 0, 0])


def test_an_array_is_an_error():
    with pytest.raises(TypeError, match="dequantize: found ndarray, expected a QTensor"):
        inspect.unwrap(dequantize)(np.zeros((64, 64), np.float32))  # without the type checks of tests
