"""Rows of blocks in the layout of the GPU kernels: the same bits elsewhere, and the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS, row_bytes
from pallas_kernels.formats.ggml_tensor import (
    BLOCKS,
    SPLIT_K,
    block_layout,
    dequantize_ggml,
    header_range,
    held_bytes,
    split_problem,
    to_blocks,
    to_split_k,
)
from pallas_kernels.formats.layouts import unpack_runs
from tests.ggml_codes import dequantized, in_split_k, random_codes, random_ggml

CODES = [name for name, block in BLOCK_FORMATS.items() if block.code is not None]
N = 64


def columns_of(ggml_type):
    return (256, 768) if BLOCK_FORMATS[ggml_type].weights == 256 else (64, 320, 512)


def test_these_types_have_one_table_and_one_scale_per_group():
    assert {"Q4_0", "IQ4_NL", "MXFP4", "NVFP4_256", "NVFP4_32_INV"} <= set(CODES)
    assert not {"Q4_1", "Q4_K", "IQ4_XS", "INT4_128", "FP8_128"} & set(CODES)


@pytest.mark.parametrize("ggml_type", CODES)
def test_the_bytes_of_the_file_come_back(ggml_type):
    for columns in columns_of(ggml_type):
        blocks = random_codes(ggml_type, (2, 3), columns)
        rows = to_split_k(blocks, ggml_type)
        assert rows.shape == (2, 3, held_bytes(SPLIT_K, ggml_type, columns)) and rows.shape[-1] % 64 == 0
        np.testing.assert_array_equal(to_blocks(rows, ggml_type, columns), blocks)


def test_jax_arrays_are_reordered_as_numpy_s():
    blocks = random_codes("NVFP4_64", (2, 3), 320)
    rows = to_split_k(blocks, "NVFP4_64")
    found = jax.jit(to_split_k, static_argnums=1)(blocks, "NVFP4_64")
    np.testing.assert_array_equal(found, rows)
    np.testing.assert_array_equal(jax.jit(to_blocks, static_argnums=(1, 2))(rows, "NVFP4_64", 320), blocks)


@pytest.mark.parametrize("ggml_type", CODES)
def test_table_and_scales_are_the_weights_to_the_bit(ggml_type):
    """Computes table[code] * scale in f32, the parameters of kernels, from the bytes that they read."""
    code, columns = BLOCK_FORMATS[ggml_type].code, columns_of(ggml_type)[1]
    weight = random_ggml(ggml_type, (), (N, columns))
    rows = to_split_k(np.asarray(weight.codes), ggml_type)
    start, end = header_range(ggml_type, columns)
    codes = unpack_runs(rows[:, :start], columns)
    headers = jnp.asarray(rows[:, start:end].reshape(N, -1, BLOCK_FORMATS[ggml_type].header))
    scales = np.asarray(jax.jit(code.scales)(headers)).reshape(N, -1)
    assert scales.shape == (N, columns // code.group) and code.table.shape == (16,)
    found = code.table[codes] * np.repeat(scales, code.group, axis=1)
    np.testing.assert_array_equal(found, dequantized(weight))


def test_the_reference_dequantizes_them_to_the_same_bits():
    weight = random_ggml("NVFP4_64", (2,), (N, 320))
    found = jax.jit(dequantize_ggml)(in_split_k(weight))
    np.testing.assert_array_equal(found, dequantized(weight))


def test_a_row_takes_no_other_bytes_where_its_headers_are_whole_copies():
    for ggml_type in ("Q4_0", "MXFP4", "NVFP4_256"):
        assert held_bytes(SPLIT_K, ggml_type, 4096) == row_bytes(ggml_type, 4096) == held_bytes(BLOCKS, ggml_type, 4096)
    # 2880 columns of gpt-oss: half a pair of runs, and 90 scales.
    assert held_bytes(SPLIT_K, "MXFP4", 2880) - row_bytes("MXFP4", 2880) == 32 + 38


def test_a_gpu_holds_codes_that_its_kernels_take_in_their_layout():
    assert block_layout("gpu", "Q4_0", (64, 320)) == SPLIT_K
    assert block_layout("cpu", "Q4_0", (64, 320)) == block_layout("gpu", "Q4_K", (64, 512)) == BLOCKS
    assert block_layout("gpu", "Q4_0", (64, 288)) == block_layout("gpu", "Q4_0", (72, 320)) == BLOCKS
    assert "found shape=(72, 320)" in str(split_problem("Q4_0", (72, 320)))
    assert "Q4_K is not a table of 16 values" in str(split_problem("Q4_K", (64, 512)))
