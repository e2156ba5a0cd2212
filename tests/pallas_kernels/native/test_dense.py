"""The C++ products of matrices: exact for exact sums, otherwise as accurate as f32 sums, and used only on CPUs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dense_matmul import FEW_ROWS, dot, handler_for
from pallas_kernels.native import library

pytestmark = pytest.mark.skipif(library.problem() is not None, reason=f"the C++ library {library.problem()}")

# [M, N, K]: the least supported; below, at and past a strip of rows, a panel of columns and a chunk of k.
SHAPES = [(17, 32, 32), (24, 32, 32), (25, 33, 33), (96, 64, 1024), (97, 65, 1025), (37, 1000, 577), (23, 71, 4100)]
# Side by side and alone; with a tail of k, or of columns; narrow.
FEW = [(1, 32, 32), (2, 33, 48), (3, 1000, 577), (FEW_ROWS, 71, 4100), (5, 3, 2), (7, 16, 100)]
ROUNDING = 2.0**-24


def _operands(shape, transposed, whole):
    rows, columns, terms = shape
    rng = np.random.default_rng([*shape, transposed])
    sizes = (rows, terms), (columns, terms) if transposed else (terms, columns)
    return [(rng.integers(-8, 9, size) if whole else rng.standard_normal(size)).astype(np.float32) for size in sizes]


def _in_f64(a, b, transposed):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return a @ (b.T if transposed else b)


def _product(a, b, transposed):
    compiled = jax.jit(lambda a, b: dot(a, b, (1, int(transposed)), jnp.float32)).lower(a, b).compile()
    assert ("dense_rows" if a.shape[0] <= FEW_ROWS else "product_f32") in compiled.as_text()
    return np.asarray(compiled(a, b))


CASES = [*itertools.product(SHAPES + FEW, [False, True])]


@pytest.mark.parametrize(("shape", "transposed"), CASES)
def test_whole_numbers_are_multiplied_exactly(shape, transposed):
    """No sum reaches 2^24, so every order of adding is exact: a missing or misplaced term shows."""
    a, b = _operands(shape, transposed, whole=True)
    np.testing.assert_array_equal(_product(a, b, transposed), _in_f64(a, b, transposed))


@pytest.mark.parametrize(("shape", "transposed"), CASES)
def test_others_are_off_by_the_roundings_of_a_sum(shape, transposed):
    """The error of K roundings, each 2^-24 of the partial sum, grows as sqrt(K) (Higham and Mary, 2019)."""
    a, b = _operands(shape, transposed, whole=False)
    most = 4 * np.sqrt(shape[2]) * ROUNDING * _in_f64(np.abs(a), np.abs(b), transposed)
    assert np.all(np.abs(_product(a, b, transposed) - _in_f64(a, b, transposed)) <= most)


@pytest.mark.parametrize(
    ("counts", "transposed"),
    [((17, 24, 100, 199, 200), True), (range(1, FEW_ROWS + 1), True), (range(1, FEW_ROWS + 1), False)],
)
def test_a_row_is_the_same_whatever_the_other_rows(counts, transposed):
    a, b = _operands((counts[-1], 72, 1300), transposed, whole=False)
    whole = _product(a, b, transposed)
    for rows in counts:
        np.testing.assert_array_equal(_product(a[-rows:], b, transposed), whole[-rows:])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize("transposed", [False, True])
def test_few_rows_of_bf16_are_summed_in_f32_and_rounded_once(shape, dtype, transposed):
    a, b = (jnp.asarray(x, jnp.bfloat16) for x in _operands(shape, transposed, whole=True))
    found = jax.jit(lambda a, b: dot(a, b, (1, int(transposed)), dtype))(a, b)
    expected = _in_f64(np.asarray(a, np.float32), np.asarray(b, np.float32), transposed)
    np.testing.assert_array_equal(found, jnp.asarray(expected, jnp.float32).astype(dtype))


@pytest.mark.parametrize(("rows", "transposed"), [(40, False), (40, True), (5, False), (5, True)])
def test_gradients_are_those_of_the_product(rows, transposed):
    a, b = map(jnp.asarray, _operands((rows, 48, 64), transposed, whole=True))

    def gradients(multiply):
        return jax.grad(lambda a, b: jnp.sum(multiply(a, b) ** 2), (0, 1))(a, b)

    ours = gradients(lambda a, b: dot(a, b, (1, int(transposed)), jnp.float32))
    for found, expected in zip(ours, gradients(lambda a, b: a @ (b.T if transposed else b)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_batch_is_multiplied_in_turn():
    a, b = (np.stack([x, 2 * x]) for x in _operands((20, 40, 50), False, whole=True))
    np.testing.assert_array_equal(jax.vmap(lambda a, b: dot(a, b, (1, 0), jnp.float32))(a, b), a @ b)


def test_what_the_handler_does_not_take_is_multiplied_by_xla():
    def taken(a, b, contract=(1, 0)):
        return handler_for(*(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (a, b)), contract)

    f32, bf16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
    assert taken(((17, 32), f32), ((32, 32), f32)) == "product_f32"
    assert taken(((8, 32), f32), ((32, 32), f32), contract=(1, 1)) == "dense_rows"
    assert taken(((1, 32), bf16), ((32, 32), bf16), contract=(1, 1)) == "dense_rows"
    assert taken(((8, 3), f32), ((3, 5), f32)) == "dense_rows"
    assert not taken(((17, 32), bf16), ((32, 32), bf16), contract=(1, 1))
    assert not taken(((1, 32), f32), ((32, 32), bf16), contract=(1, 1))
    assert taken(((512, 31), f32), ((31, 32), f32)) == "product_f32"
    assert not taken(((513, 31), f32), ((31, 32), f32))
    assert not taken(((513, 32), f32), ((32, 31), f32))
    assert not taken(((17, 32), bf16), ((32, 32), f32))
    assert not taken(((32, 9), f32), ((32, 32), f32), contract=(0, 0))
    assert not taken(((2, 9, 32), f32), ((2, 32, 32), f32), contract=(2, 1))


def test_the_packed_operand_is_memory_that_xla_counts():
    a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 100), (70, 100)))
    compiled = jax.jit(lambda a, b: dot(a, b, (1, 1), jnp.float32)).lower(a, b).compile()
    packed = 64 * 100 * 4  # all of a
    assert packed <= compiled.memory_analysis().temp_size_in_bytes < packed + 1024
