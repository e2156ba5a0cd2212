"""The products of a decoder: a row's result depends on no other row, among few rows and among many."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dense_matmul import FEW_ROWS, dot_nn, dot_nt
from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS, row_bytes
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.ggml_matmul import ggml_matmul
from pallas_kernels.native import library
from pallas_kernels.nf4_matmul import nf4_matmul
from tests.pallas_kernels.nf4_matmul.contract import weight

pytestmark = pytest.mark.skipif(library.problem() is not None, reason=f"the C++ library {library.problem()}")

DECODED = (1, 2, 7, 11, FEW_ROWS)  # tokens, one of each row that decodes
PROMPT = (32, 64, 512)  # tokens of prompts
K = 320


def _ggml(ggml_type, dtype):
    columns = 512 if BLOCK_FORMATS[ggml_type].weights > 64 else K
    shape = (70, columns)
    rows = np.random.default_rng(0).integers(0, 60, (70, row_bytes(ggml_type, columns)), np.uint8)
    return GgmlTensor(codes=jnp.asarray(rows), ggml_type=ggml_type, shape=shape, dtype=jnp.dtype(dtype).name)


def _dense(shape, dtype):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)


def _products(dtype):
    """Returns {name: (product of rows, terms)}: frozen weights, adapters of several ranks, and heads."""
    four_bit = weight((96, K), layout="row_planar", double_quant=True)
    found = {
        "nf4": (functools.partial(nf4_matmul, weights=four_bit), K),
        "dense": (lambda x: dot_nt(x, _dense((200, K), dtype), dtype), K),
        "head": (lambda x: dot_nt(x, _dense((1000, K), dtype)), K),
        "experts' router": (lambda x: dot_nt(x, _dense((4, K), dtype)), K),
    }
    for rank in (4, 16, 48):
        found[f"lora A {rank}"] = (lambda x, rank=rank: dot_nn(x, _dense((K, rank), dtype)), K)
        found[f"lora B {rank}"] = (lambda x, rank=rank: dot_nn(x, _dense((rank, 200), dtype), dtype), rank)
    for ggml_type in ("Q4_0", "Q6_K"):
        stored = _ggml(ggml_type, dtype)
        found[ggml_type] = (functools.partial(ggml_matmul, weights=stored), stored.shape[1])
    return found


def _bits(x):
    return np.asarray(x).view(np.uint8)


@pytest.mark.parametrize("counts", [DECODED, PROMPT])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_row_has_the_same_bits_among_any_others(dtype, counts):
    products = _products(dtype)
    rows = {terms: _dense((counts[-1], terms), dtype) for _, terms in products.values()}

    def results(take):
        """Returns the result of each product for some rows, in one program."""
        return jax.jit(lambda rows: {name: run(take(rows[terms])) for name, (run, terms) in products.items()})(rows)

    whole = results(lambda x: x)
    for count in counts[:-1]:
        some = results(lambda x, count=count: x[-count - 5 : -5])
        for name in products:
            expected = whole[name][-count - 5 : -5]
            np.testing.assert_array_equal(_bits(some[name]), _bits(expected), err_msg=f"{name} of {count}")


def test_integer_products_of_a_row_have_the_same_bits_among_any_others():
    four_bit, x = weight((96, K), layout="row_planar"), _dense((FEW_ROWS, K), jnp.float32)
    whole = nf4_matmul(x, four_bit, implementation="integer")
    for count in DECODED:
        np.testing.assert_array_equal(nf4_matmul(x[-count:], four_bit, implementation="integer"), whole[-count:])
