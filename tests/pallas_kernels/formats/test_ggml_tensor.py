"""Tests GgmlTensor: every block format equals the gguf package's dequantization, or the formula, to the bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS, int_type, row_bytes
from pallas_kernels.formats.ggml_tensor import GgmlTensor, dequantize_ggml, finite_scales
from tests.ggml_codes import dequantized, random_ggml

LAYERS, N, K = 2, 6, 512


def stack_of(ggml_type: str) -> GgmlTensor:
    return random_ggml(ggml_type, (LAYERS,), (N, K))


@pytest.mark.parametrize("ggml_type", BLOCK_FORMATS)
def test_equals_gguf_or_the_formula_to_the_bit(ggml_type):
    stack = stack_of(ggml_type)
    expected = dequantized(stack)
    found = np.asarray(jax.jit(dequantize_ggml)(stack))
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    assert len(np.unique(expected)) > 16


def test_sizes_and_numbers_are_those_of_gguf():
    for name, block in BLOCK_FORMATS.items():
        if name in GGMLQuantizationType.__members__:
            kind = GGMLQuantizationType[name]
            assert (kind.value, *GGML_QUANT_SIZES[kind]) == (block.number, block.weights, block.nbytes)
    assert len({block.number for block in BLOCK_FORMATS.values()}) == len(BLOCK_FORMATS)
    assert {block.number for name, block in BLOCK_FORMATS.items() if name[:3] in ("INT", "NVF", "FP8")}.isdisjoint(
        kind.value for kind in GGMLQuantizationType
    )


INT4 = {"INT4_128": (1128, 67), "INT4_64_BF16": (2064, 35), "INT4_32": (1032, 19)}


def test_blocks_of_int4_are_groups_or_parts_of_them():
    for group, dtype, name in [(128, "float16", "INT4_128"), (64, ml_dtypes.bfloat16, "INT4_64_BF16")]:
        assert int_type(4, group, np.dtype(dtype)) == name
        assert (BLOCK_FORMATS[name].number, BLOCK_FORMATS[name].nbytes) == INT4[name]
    assert [int_type(4, size, np.dtype(np.float16)) for size in (96, 320, 4096)] == ["INT4_32", "INT4_64", "INT4_128"]


def test_one_layer_and_another_dtype():
    stack = stack_of("Q4_1")
    assert (stack.stack_shape, stack.nbytes) == ((LAYERS,), LAYERS * N * row_bytes("Q4_1", K))
    one = jax.jit(lambda stack, index: dequantize_ggml(stack.layer(index), jnp.bfloat16))(stack, 1)
    np.testing.assert_array_equal(one, jnp.asarray(dequantized(stack)[1]).astype(jnp.bfloat16))


def test_rows_must_be_whole_blocks():
    with pytest.raises(ValueError, match="found 576 columns, expected a multiple of 256"):
        row_bytes("Q4_K", 576)


@pytest.mark.parametrize("ggml_type", BLOCK_FORMATS)
def test_a_scale_that_is_not_finite_is_found(ggml_type):
    codes = np.array(stack_of(ggml_type).codes)
    assert finite_scales(codes, ggml_type)
    block = BLOCK_FORMATS[ggml_type]
    damages = [(offset, (0xFF, 0x7F)) for offset in block.halves]
    for offset, kind, count in block.floats:
        not_a_number = np.frombuffer(np.full(count, np.nan, np.float32).astype(kind).tobytes(), np.uint8)
        size = not_a_number.size // count
        damages += [(offset + size * (count - 1), not_a_number[-size:])]
    assert damages
    for offset, not_a_number in damages:
        damaged = codes.copy()
        blocks = damaged.reshape(-1, block.nbytes)
        blocks[3, offset : offset + len(not_a_number)] = not_a_number
        assert not finite_scales(damaged, ggml_type)
