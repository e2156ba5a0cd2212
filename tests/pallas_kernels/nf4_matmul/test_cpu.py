"""The C++ handlers: they dequantize bit for bit as plain JAX, and reject calls that they do not support."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.devices import target_device
from pallas_kernels.dispatch import Call
from pallas_kernels.formats.dequantize import dequantize
from pallas_kernels.formats.tables import CODE_TABLES
from pallas_kernels.frozen_product import FAST
from pallas_kernels.native import build, library
from pallas_kernels.nf4_matmul import cpu, nf4_matmul
from pallas_kernels.nf4_matmul.api import choose_implementation
from tests.pallas_kernels.nf4_matmul.contract import weight

needs_handlers = pytest.mark.skipif(bool(library.problem()), reason=f"implementation cpu {library.problem()}")


@needs_handlers
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", CODE_TABLES)
def test_dequantizes_to_the_same_bits(quant_type, double_quant, dtype):
    form = {"layout": "row_planar", "quant_type": quant_type, "double_quant": double_quant}
    made = [weight((96, 192), **form, seed=seed) for seed in (0, 1)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)
    for layer, one in enumerate(made):
        expected = np.asarray(dequantize(one, dtype)).view(np.uint8)
        np.testing.assert_array_equal(np.asarray(cpu.dequantize_layer(one, None, dtype)).view(np.uint8), expected)
        np.testing.assert_array_equal(np.asarray(cpu.dequantize_layer(stack, layer, dtype)).view(np.uint8), expected)


@needs_handlers
@pytest.mark.parametrize("rows", range(1, cpu.FEW_ROWS + 1))
def test_few_rows_are_the_rows_of_many(rows):
    """Each number of rows has a separate loop: it must compute every row, independent of the other rows."""
    w = weight((96, 192), layout="row_planar")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((cpu.FEW_ROWS + 1, 192), np.float32))
    many = nf4_matmul(x, w, implementation="reference")[:rows]
    np.testing.assert_allclose(nf4_matmul(x[:rows], w, implementation="cpu"), many, rtol=1e-5, atol=1e-6)


@needs_handlers
@pytest.mark.skipif(not library.fast_bfloat16(), reason="this processor's variant has no products of bfloat16 pairs")
@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_few_rows_multiply_the_weights_that_training_multiplies(double_quant, rows):
    """A row that adds two weights gives their sum, rounded once: of the bfloat16 weights, not of wider ones."""
    w = weight((96, 192), layout="row_planar", double_quant=double_quant)
    x_MK = np.zeros((rows, 192), np.float32)
    columns = np.random.default_rng(rows).permuted(np.tile(np.arange(192), (rows, 1)), axis=1)[:, :2]
    np.put_along_axis(x_MK, columns, 1, axis=1)
    weights_NK = np.asarray(dequantize(w, jnp.bfloat16), np.float32)
    expected = jnp.asarray(weights_NK[:, columns].sum(axis=2).T, jnp.bfloat16)
    found = nf4_matmul(jnp.asarray(x_MK, jnp.bfloat16), w, implementation="cpu")
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


def _in_integers(x, w):
    """Returns x w^T as `integer_forward` defines it, in f64."""
    groups = np.asarray(x, np.float64).reshape(len(x), -1, 64)
    sizes = np.abs(groups).max(axis=2, keepdims=True)
    coded = np.round(groups * 127 / np.where(sizes > 0, sizes, 1)) * sizes / 127
    table = CODE_TABLES[w.quant_type].astype(np.float64)
    rounded = np.round(table / np.abs(table).max() * 127) * np.abs(table).max() / 127
    weights = np.asarray(dequantize(w, jnp.float32), np.float64)
    constants = np.abs(weights).reshape(*weights.shape[:1], -1, w.block_size).max(axis=2) / np.abs(table).max()
    codes = np.abs(weights[..., None] / np.repeat(constants, w.block_size, axis=1)[..., None] - table).argmin(axis=-1)
    return coded.reshape(x.shape) @ (rounded[codes] * np.repeat(constants, w.block_size, axis=1)).T


@needs_handlers
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("quant_type", CODE_TABLES)
def test_integer_products_round_rows_and_table_to_8_bits(quant_type, rows):
    w = weight((98, 192), layout="row_planar", quant_type=quant_type, double_quant=rows % 2 == 0)
    x = np.random.default_rng(rows).standard_normal((rows, 192), np.float32)
    x[0, 64:128] = 0
    found = nf4_matmul(jnp.asarray(x), w, implementation="integer")
    np.testing.assert_allclose(found, _in_integers(x, w), rtol=2e-5, atol=2e-5)
    exact = np.asarray(nf4_matmul(jnp.asarray(x), w, implementation="reference"))
    assert 0 < np.abs(found - exact).max() < 0.02 * np.abs(exact).max()  # they are not the exact products


@needs_handlers
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_row_of_integer_products_depends_on_no_other_row(dtype):
    w = weight((96, 192), layout="row_planar")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 192), np.float32), dtype)
    all_rows = nf4_matmul(x, w, implementation="integer")
    for rows in range(1, 9):
        np.testing.assert_array_equal(nf4_matmul(x[:rows], w, implementation="integer"), all_rows[:rows])
    for hostile in (jnp.nan, jnp.inf):
        found = nf4_matmul(x.at[2, 70].set(hostile), w, implementation="integer")
        assert jnp.isnan(found[2]).all()
        np.testing.assert_array_equal(np.delete(found, 2, axis=0), np.delete(all_rows, 2, axis=0))


@needs_handlers
def test_fast_products_are_integer_for_few_rows_only():
    w = weight((96, 192), layout="row_planar")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((17, 192), np.float32))
    for rows, name in ((16, "integer"), (17, "cpu")):
        found = nf4_matmul(x[:rows], w, implementation=FAST)
        np.testing.assert_array_equal(found, nf4_matmul(x[:rows], w, implementation=name))


@needs_handlers
def test_a_stack_is_handed_over_whole():
    """No slice of the codes is made, not even in a scan: it would copy every weight for every token."""
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), weight((128, 256), layout="row_planar"))

    def layers(x, stack):
        return jax.lax.scan(lambda x, i: (nf4_matmul(x, stack, i)[:, :1] + x, None), x, jnp.arange(4, dtype=jnp.int32))

    compiled = jax.jit(layers).lower(jnp.ones((1, 256)), stack).compile()
    assert "nf4_rows" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < stack.codes[0].size


def test_without_the_handlers_plain_jax_runs_and_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "library_path", lambda variant: tmp_path / "absent.so")
    library.problem.cache_clear()
    try:
        call = Call.of("forward", 1, jnp.dtype(jnp.float32), weight((64, 128), layout="row_planar"))
        name, refusals = choose_implementation(target_device(), call)
        assert name == "reference"
        assert "python -m pallas_kernels.native.build" in refusals["cpu"]
    finally:
        library.problem.cache_clear()


def test_no_compiler_is_said_by_name(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(build, "library_path", lambda variant: tmp_path / "absent.so")
    assert build.main() == 1
    assert "no-such-compiler" in capsys.readouterr().err


def test_what_a_compiler_refuses_is_shown(monkeypatch, tmp_path):
    source = tmp_path / "broken.cc"
    source.write_text("int main() { return undeclared; }")
    monkeypatch.setattr(build, "library_path", lambda variant: tmp_path / "absent.so")
    monkeypatch.setattr(build, "SOURCES", (source,))
    try:
        build.find_compiler()
    except ValueError as error:
        pytest.skip(str(error))
    with pytest.raises(ValueError, match="undeclared"):
        build.build(library.variant())
