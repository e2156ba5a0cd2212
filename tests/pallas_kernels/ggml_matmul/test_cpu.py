"""The C++ handlers: they dequantize bit for bit as the gguf package, and few rows equal the rows of many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS
from pallas_kernels.ggml_matmul import cpu, ggml_matmul
from pallas_kernels.native import library
from tests.ggml_codes import dequantized, random_ggml

pytestmark = pytest.mark.skipif(bool(library.problem()), reason=f"implementation cpu {library.problem()}")

N, K = 20, 512


@pytest.mark.parametrize("ggml_type", BLOCK_FORMATS)
def test_dequantizes_to_the_same_bits(ggml_type):
    stack = random_ggml(ggml_type, (2, 3), (N, K))
    expected = dequantized(stack)[1, 2]
    found = np.asarray(cpu.dequantize_layer(stack, 5, jnp.float32))
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_rounds_once_to_bfloat16():
    stack = random_ggml("Q5_1", (2,), (N, K))
    expected = jnp.asarray(dequantized(stack)[1]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(cpu.dequantize_layer(stack, 1, jnp.bfloat16), expected)


@pytest.mark.parametrize("ggml_type", BLOCK_FORMATS)
def test_few_rows_are_the_rows_of_many(ggml_type):
    """Each number of rows has a separate loop: it must compute every row, independent of the other rows."""
    weight = random_ggml(ggml_type, (), (N, K))
    x_MK = np.random.default_rng(0).standard_normal((16, K)).astype(np.float32)
    many = x_MK @ dequantized(weight).T
    for rows in range(1, 17) if ggml_type == "Q4_1" else (3, 16):
        found = cpu.forward(jnp.asarray(x_MK[:rows]), weight, None)
        np.testing.assert_allclose(found, many[:rows], rtol=1e-5, atol=1e-5)


def test_a_stack_is_handed_over_whole():
    """No slice of the bytes is made, not even in a scan: it would copy every weight for every token."""
    stack = random_ggml("Q4_1", (4,), (128, 256))

    def layers(x, stack):
        return jax.lax.scan(lambda x, i: (ggml_matmul(x, stack, i)[:, :1] + x, None), x, jnp.arange(4, dtype=jnp.int32))

    compiled = jax.jit(layers).lower(jnp.ones((1, 256)), stack).compile()
    assert "ggml_rows" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < stack.codes[0].size
