"""Decoding and constants of the GPU kernels: the assembly over all inputs, and the twin, against the tables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.dequantize import expand_absmax_numpy
from pallas_kernels.formats.tables import CODE_TABLES
from pallas_kernels.nf4_matmul.mosaic.code_lookup import decode_ptx, select_pair
from pallas_kernels.nf4_matmul.mosaic.operands import expanded_scales
from qlora_jax.quant import quantize_numpy
from tests.pallas_kernels.nf4_matmul import ptx
from tests.pallas_kernels.nf4_matmul.contract import weight

DTYPES = ("bfloat16", "float16")
ALL_INPUTS = np.arange(65536, dtype=np.uint32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", CODE_TABLES)
def test_the_assembly_is_the_table_for_every_input(quant_type, dtype):
    low, high = ptx.run(decode_ptx(CODE_TABLES[quant_type], dtype), [ALL_INPUTS], 2)
    values = ptx.table_bits(quant_type, dtype)
    np.testing.assert_array_equal(low, ptx.two_values(ALL_INPUTS, 0, 2, values))
    np.testing.assert_array_equal(high, ptx.two_values(ALL_INPUTS, 1, 3, values))


@pytest.mark.parametrize(
    "change",
    [
        ("0x7777", "0xffff"),
        ("0x4444", "0x0444"),
        ("0x3210", "0x3201"),
        ("0xea", "0xe8"),
        ("0x6240", "0x7351"),
        ("p, q", "q, p"),
    ],
)
def test_the_proof_can_fail(change):
    """Broken assembly: a wrong mask, a wrong selector, wrong nibbles, swapped bytes."""
    right = decode_ptx(CODE_TABLES["nf4"], "bfloat16")
    wrong = right.replace(*change)
    assert wrong != right
    results = zip(ptx.run(wrong, [ALL_INPUTS], 2), ptx.run(right, [ALL_INPUTS], 2), strict=True)
    assert any((mine != theirs).any() for mine, theirs in results)


def test_the_interpreter_selects_bytes_as_the_manual_says():
    a, b = np.uint32([0x83020100]), np.uint32([0x87060504])
    assert ptx.prmt(a, b, np.uint32([0x7402])) == 0x87040002
    assert ptx.prmt(a, b, np.uint32([0x3BF8])) == 0x83FFFF00  # sign of bytes 3, 7 and 0 where bit 3 is set
    bits = [np.uint32([word]) for word in (0b11110000, 0b11001100, 0b10101010)]
    for table in (0xEA, 0x96, 0x01):  # (a & b) | c, a ^ b ^ c, ~(a | b | c): the table is what it gives for these words
        assert ptx.lop3(*bits, np.uint32([table])) & 255 == table
    with pytest.raises(KeyError, match="mul"):
        ptx.run("{ mul.lo.u32 $0, $1, 3; }", [a], 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", CODE_TABLES)
def test_the_twin_is_the_table(quant_type, dtype):
    packed = np.arange(256, dtype=np.uint8).reshape(4, 64)
    table = CODE_TABLES[quant_type]
    low, high = select_pair(jnp.asarray(packed), 4, None, table, jnp.dtype(dtype))
    values = table.astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(low, values[packed & 15])
    np.testing.assert_array_equal(high, values[packed >> 4])


@pytest.mark.parametrize("shape", [(64, 64), (128, 192), (192, 576), (64, 896)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_scales_are_the_constants_of_formats(shape, double_quant):
    w = weight(shape, layout="split_k", double_quant=double_quant)
    scales = jax.jit(expanded_scales, static_argnums=(1, 2))(w, None, jnp.float32)
    runs = shape[1] // 64
    assert scales.shape == (2 * -(-shape[1] // 128), shape[0])
    np.testing.assert_array_equal(scales[:runs], expand_absmax_numpy(jax.tree.map(np.asarray, w)))
    assert not np.asarray(scales[runs:]).any()
    for dtype in DTYPES:
        rounded = np.asarray(scales).astype(jnp.dtype(dtype))
        np.testing.assert_array_equal(expanded_scales(w, None, jnp.dtype(dtype)), rounded)


def test_a_block_of_128_columns_is_two_runs_and_a_layer_is_chosen():
    w = np.random.default_rng(0).standard_normal((2, 64, 256), np.float32)
    layers = [quantize_numpy(one, quant_type="nf4", block_size=128, double_quant=True) for one in w]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    stack = dataclasses.replace(stack, absmax_codes=stack.absmax_codes.swapaxes(1, 2), layout="split_k")
    for layer in range(2):
        scales = jax.jit(expanded_scales, static_argnums=2)(stack, jnp.int32(layer), jnp.float32)
        np.testing.assert_array_equal(scales, np.repeat(expand_absmax_numpy(layers[layer]).T, 2, axis=0))
