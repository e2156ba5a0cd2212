"""The C++ handlers: they dequantize bit for bit as plain JAX, and reject calls that they do not support."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.devices import target_device
from pallas_kernels.formats.dequantize import dequantize
from pallas_kernels.formats.tables import CODE_TABLES
from pallas_kernels.native import build, library
from pallas_kernels.nf4_matmul import cpu, nf4_matmul
from pallas_kernels.nf4_matmul.api import choose_implementation
from pallas_kernels.nf4_matmul.dispatch import Call
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
