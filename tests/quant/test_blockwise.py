"""The two quantizers against each other, their properties, their errors, and the choice between them."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.formats.dequantize import dequantize_numpy, expand_absmax_numpy
from pallas_kernels.formats.layouts import LAYOUTS
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.tables import CODE_TABLES, ZERO_CODE
from qlora_jax import quant
from qlora_jax.quant import blockwise

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def assert_same_bits(actual: QTensor, expected: QTensor) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_array_equal(ours.reshape(-1).view(np.uint8), theirs.reshape(-1).view(np.uint8))


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


SHAPES = [(48, 192), (8, 100), (3, 5, 7), (130,), ()]


@pytest.mark.parametrize("shape", SHAPES)
def test_jit_equals_numpy_for_any_shape(shape: tuple[int, ...]) -> None:
    assert_same_bits(quant.quantize(normal(shape)), quant.quantize_numpy(normal(shape)))


@pytest.mark.parametrize("quant_type", CODE_TABLES)
def test_jit_equals_numpy_for_any_table(quant_type: str) -> None:
    settings = {"quant_type": quant_type, "double_quant": False}
    assert_same_bits(quant.quantize(normal((7, 100)), **settings), quant.quantize_numpy(normal((7, 100)), **settings))


@pytest.mark.parametrize("block_size", [32, 128, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_sizes_and_dtypes(dtype: str, block_size: int) -> None:
    weight = normal((6, 4096)).astype(DTYPES[dtype])
    settings = {"block_size": block_size, "double_quant": False}
    qt = quant.quantize(weight, **settings)
    assert_same_bits(qt, quant.quantize_numpy(weight, **settings))
    blocks = np.abs(weight.astype(np.float32)).reshape(6, -1, block_size).max(-1)
    np.testing.assert_array_equal(np.asarray(qt.absmax), blocks)
    assert qt.dtype == dtype and quant.dequantize(qt).dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_leaves_have_the_shapes_of_their_layout(shape: tuple[int, ...]) -> None:
    qt = quant.quantize(normal(shape), nested_block_size=32)
    layout = LAYOUTS[qt.layout]
    assert qt.layout == ("bnb" if shape == (48, 192) else "flat")
    assert qt.codes.shape == layout.codes_shape(shape)
    assert qt.absmax_codes.shape == layout.constants_shape(shape, 64)
    assert qt.nested_absmax.shape == (-(-qt.absmax_codes.size // 32),)
    assert qt.nested_offset.shape == () and qt.stack_shape == ()
    assert quant.dequantize(qt).shape == shape


@pytest.mark.parametrize("quant_type", CODE_TABLES)
def test_zero_blocks_hold_the_code_of_zero(quant_type: str) -> None:
    weight = normal((4, 128))
    weight[1, 64:] = 0
    weight[2] = 0
    qt = quant.quantize(weight, quant_type=quant_type, double_quant=False)
    codes = np.asarray(qt.codes)
    np.testing.assert_array_equal(codes[1, 32:], ZERO_CODE[quant_type] * 0x11)
    np.testing.assert_array_equal(codes[2], ZERO_CODE[quant_type] * 0x11)
    np.testing.assert_array_equal(np.asarray(quant.dequantize(qt))[2], 0.0)


@functools.cache
def half_gaps(quant_type: str) -> float:
    return float(np.diff(np.sort(CODE_TABLES[quant_type])).max() / 2)


weights = st.builds(
    lambda seed, scale, rows: np.float32(10.0**scale) * normal((rows, 128), seed),
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(-20, 20),
    rows=st.integers(1, 4),
)


@hypothesis.given(weights, st.sampled_from(list(CODE_TABLES)))
def test_the_error_is_at_most_half_a_gap_of_the_table(weight: np.ndarray, quant_type: str) -> None:
    qt = quant.quantize_numpy(weight, quant_type=quant_type, double_quant=False)
    error = np.abs(dequantize_numpy(qt) - weight).reshape(-1, 64).max(-1)
    assert np.all(error <= half_gaps(quant_type) * qt.absmax.reshape(-1) * (1 + 1e-6))


@hypothesis.given(weights, st.sampled_from(list(CODE_TABLES)))
def test_points_of_the_codebook_stay_where_they_are(weight: np.ndarray, quant_type: str) -> None:
    settings = {"quant_type": quant_type, "double_quant": False}
    once = dequantize_numpy(quant.quantize_numpy(weight, **settings))
    np.testing.assert_array_equal(dequantize_numpy(quant.quantize_numpy(once, **settings)), once)


@hypothesis.given(weights)
def test_double_quantization_moves_constants_by_half_a_gap_of_its_map(weight: np.ndarray) -> None:
    """The map's widest gap is 1/64, between 0.98 and 1; its negative end stops at -0.993."""
    single, double = (quant.quantize_numpy(weight, double_quant=value) for value in (False, True))
    np.testing.assert_array_equal(single.codes, double.codes)
    moved = np.abs(expand_absmax_numpy(double) - single.absmax).max()
    assert moved <= double.nested_absmax.max() / 128 * (1 + 1e-3) + 1e-6 * single.absmax.max()


# Each row: a weight whose codes or constants involve subnormal numbers, and a quant_type for which that matters.
SUBNORMAL_CASES = {
    "small blocks": ("nf4", np.float32(1e-34) * normal((4, 128))),
    "subnormal blocks": ("nf4", np.float32(1e-40) * normal((4, 128))),
    "subnormal reciprocals": ("nf4", np.float32(6e37) * np.clip(normal((4, 128)), -4, 4)),
    "a partial block of zeros": ("nf4", np.float32([1.0] * 64 + [0.0])),
    "subnormal weights beside normal ones": ("fp4", np.float32([1.0, 1e-40, -1e-40, 3e-45] * 16)),
    "underflowing products": ("fp4", np.float32([1e10, 1e-31, 1e-36, -1e-36] * 16)),
}


@pytest.mark.parametrize("case", SUBNORMAL_CASES)
def test_blocks_that_xla_would_flush_go_through_numpy(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quant_type, weight = SUBNORMAL_CASES[case]
    expected = quant.quantize_numpy(weight, quant_type=quant_type, double_quant=False)
    routed = []

    def recorded(*args, **settings) -> QTensor:
        routed.append(case)
        return quant.quantize_numpy(*args, **settings)

    monkeypatch.setattr(blockwise, "quantize_numpy", recorded)
    qt = blockwise.quantize(weight, quant_type=quant_type, double_quant=False)
    assert_same_bits(qt, expected)
    assert routed == [case] and isinstance(qt.codes, jax.Array)


def test_ordinary_weights_stay_in_jit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "quantize_numpy", None)
    blockwise.quantize(np.concatenate([normal((4, 128)), np.zeros((1, 128), np.float32)]))
    blockwise.quantize(np.float32(1e-25) * normal((4, 128)), quant_type="fp4")


# Invalid calls and their errors: (weight, settings, pattern).
REFUSED = {
    "nan": (
        np.float32([1.0] * 131 + [np.nan] + [np.inf] * 124).reshape(4, 64),
        {},
        r"125 of 256 elements are not finite, the first is nan at flat index 131 \[2, 3\]",
    ),
    "infinite in the last, partial block": (
        np.float16([1.0] * 69 + [np.inf]),
        {},
        r"1 of 70 elements are not finite, the first is inf at flat index 69 \[69\]",
    ),
    "settings": (
        normal((4, 64)),
        {"quant_type": "nf5", "block_size": 63, "nested_block_size": 8},
        r"quant_type='nf5' is not one of nf4, fp4.*; block_size=63 .*; nested_block_size=8 ",
    ),
    "float64 and empty": (
        np.zeros((0, 3)),
        {},
        r"dtype is float64, expected one of float32.*; cast it first; its shape \(0, 3\) holds no",
    ),
    "integers": (np.zeros((4, 64), np.int8), {}, "dtype is int8"),
    "constants beyond float32": (
        np.full((4, 64), 3e38, np.float32),
        {},
        r"constants overflows float32 \(the largest is 3e\+38\)\. Scale the weight, or set double_quant=False",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("quantize", [quant.quantize, quant.quantize_numpy], ids=["jit", "numpy"])
def test_refuses(quantize, case: str) -> None:
    weight, settings, pattern = REFUSED[case]
    with pytest.raises(ValueError, match=pattern):
        quantize(weight, **settings)


@pytest.mark.parametrize("trace", [jax.jit, jax.vmap])
def test_refuses_a_traced_weight(trace) -> None:
    with pytest.raises(ValueError, match=r"it is traced, as in jax\.jit.*Quantize it before, and pass the QTensor"):
        trace(quant.quantize)(normal((4, 64)))


def test_traceable_core_gives_shapes_without_arrays() -> None:
    settings = quant.QuantSettings(block_size=128)
    core = functools.partial(quant.quantize_traceable, settings=settings)
    abstract = jax.eval_shape(core, jax.ShapeDtypeStruct((64, 256), jnp.bfloat16))
    concrete = quant.quantize(normal((64, 256)).astype(ml_dtypes.bfloat16), block_size=128)
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    assert abstract.nbytes == concrete.nbytes == 64 * 256 // 2 + 128 + 4 + 4


def test_one_shape_compiles_once() -> None:
    before = blockwise._quantize_and_inspect._cache_size()
    for seed in range(3):
        quant.quantize(normal((24, 320), seed))
    assert blockwise._quantize_and_inspect._cache_size() == before + 1
