"""Tests the table of encoders: packed weights of the right kind, and the values that their codes stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.ggml_tensor import GgmlTensor
from qlora_jax.quant import QuantSettings, quantize_numpy
from qlora_jax.quant.encoders import ENCODERS, round_trip, table_encoder
from tests.ggml_codes import dequantized
from tests.marks import EXHAUSTIVE, SLOW

STACK, N, K = (2, 3), 4, 512
MARKS = {"Q8_0": (), "Q4_K": SLOW, "INT4_64_ASYMMETRIC": SLOW}
WEIGHT = np.random.default_rng(0).standard_normal((*STACK, N, K), np.float32)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=MARKS.get(name, EXHAUSTIVE)) for name in ENCODERS if name != "nf4"]
)
def test_block_formats_stand_for_the_values_of_the_gguf_package(name):
    packed = jax.jit(ENCODERS[name])(jnp.asarray(WEIGHT))
    assert isinstance(packed, GgmlTensor)
    assert (packed.ggml_type, packed.shape, packed.stack_shape) == (name.removesuffix("_ASYMMETRIC"), (N, K), STACK)
    found = jax.jit(lambda weight: round_trip(weight, ENCODERS[name]))(jnp.asarray(WEIGHT))
    np.testing.assert_array_equal(found, dequantized(packed))
    assert 0 < np.abs(found - WEIGHT).max() < 1


@pytest.mark.parametrize("double_quant", [True, False])
def test_every_weight_of_a_stack_is_quantized_by_itself(double_quant):
    packed = jax.jit(table_encoder(QuantSettings(double_quant=double_quant)))(jnp.asarray(WEIGHT))
    for index in np.ndindex(STACK):
        expected = quantize_numpy(WEIGHT[index], double_quant=double_quant)
        found = jax.tree.map(lambda leaf, at=index: leaf[at], packed)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_rows_must_be_whole_blocks():
    with pytest.raises(ValueError, match="found 48 columns, expected a multiple of 32"):
        ENCODERS["Q4_0"](jnp.zeros((2, 48)))
