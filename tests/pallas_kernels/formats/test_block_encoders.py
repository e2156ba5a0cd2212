"""Tests the encoders of block formats: the bytes of ggml and of compressed-tensors, to the bit, on weights of any kind.

ggml's library has no fused multiply-adds and adds in the order of its source, so that no block may differ.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.numpy import load_file

from pallas_kernels.formats.block_encoders import BLOCK_ENCODERS, encode_blocks, encode_nvfp4
from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS
from pallas_kernels.formats.scale_search import SEARCHES, Found, by_xla, scale_search
from pallas_kernels.native.library import problem
from qlora_jax.io.hf.integer_groups import Groups, as_blocks
from qlora_jax.quant.nvfp4 import nvfp4_blocks_of
from tests.marks import EXHAUSTIVE, SLOW

ORACLES = Path(__file__).parents[2] / "oracle"
OF_GGML = [name for name in BLOCK_ENCODERS if not name.startswith("INT4")]
INT4 = [name for name in BLOCK_ENCODERS if name not in OF_GGML]
ROWS, K = 4, 512
# XLA flushes subnormal numbers, which occur in blocks of smaller weights; their scale is zero in a half.
SMALLEST = 2.0**-96
SMALLEST_BY_XLA = 1e-6  # searches multiply five weights


def matrices(number: int, seed: int = 0) -> np.ndarray:
    """Returns `number` random matrices below each other, f32: ten kinds of weights.

    Of them are heavy tails, subnormal halves as scales, ties, zeros, outliers, and weights of one sign.
    """
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((10, number // 10, ROWS, K))
    kinds = [
        normal[0],
        rng.standard_t(2, normal[1].shape),
        rng.uniform(-1, 1, normal[2].shape),
        normal[3] * 1e-5,
        normal[4] * 10.0 ** rng.integers(-20, 4, (*normal[4].shape[:2], 1)),
        np.round(normal[5] * 4) / 4,
        np.where(rng.random(normal[6].shape) < 0.9, rng.choice([0.0, -0.0], normal[6].shape), normal[6]),
        np.where(rng.random(normal[7].shape) < 0.01, 100, 1) * normal[7],
        np.abs(normal[8]) * 0.02,
        (normal[9] * 0.02).astype(ml_dtypes.bfloat16),
    ]
    return np.stack([kind.astype(np.float32) for kind in kinds]).reshape(-1, K)


def edges() -> np.ndarray:
    """Returns rows of zeros of either sign, constants, single outliers, powers of two, and some subnormal weights."""
    rows = np.zeros((12, K), np.float32)
    rows[1], rows[2, ::2], rows[3, ::32], rows[4], rows[5] = -0.0, -0.0, -3, 1, -1
    rows[6] = 2.0 ** -(np.arange(K) % 30)
    rows[7] = np.where(np.arange(K) % 64 < 32, 1e-3, 1e-41)
    rows[8] = np.where(np.arange(K) % 2, 5, -5)
    rows[9, 5::256] = 60000
    rows[10] = np.nextafter(np.float32(1), np.float32(0)) * 2.0 ** -(np.arange(K) // 32)  # log2 rounds up
    rows[11] = np.where(np.arange(K) % 3, -1, np.nextafter(np.float32(-1), np.float32(0)))
    return rows


def differing(found: jax.Array | np.ndarray, expected: jax.Array | np.ndarray, name: str) -> np.ndarray:
    """Returns, for each block, whether it differs."""
    nbytes = BLOCK_FORMATS[BLOCK_ENCODERS[name].ggml_type].nbytes
    assert found.shape == expected.shape
    return (np.asarray(found).reshape(-1, nbytes) != np.asarray(expected).reshape(-1, nbytes)).any(-1)


def check_against_ggml(llama_cpp, rows: np.ndarray) -> None:
    numbers = {name: GGMLQuantizationType[name].value for name in OF_GGML}
    expected = llama_cpp(ORACLES / "ggml_encode.py", rows=rows, numbers=numbers)
    for name in OF_GGML:
        differ = differing(encode_blocks(jnp.asarray(rows), name), expected[name], name)
        largest = np.abs(rows).reshape(len(differ), -1).max(-1)
        by_loops = problem() is None or name not in SEARCHES
        exact = (largest == 0) | (largest >= (SMALLEST if by_loops else SMALLEST_BY_XLA))
        assert not differ[exact].any(), (name, np.flatnonzero(differ & exact))


def test_codes_are_those_of_ggml(llama_cpp):
    check_against_ggml(llama_cpp, np.concatenate([matrices(100), edges()]))


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=EXHAUSTIVE) for seed in range(2, 6))])
@pytest.mark.slow
def test_codes_of_a_million_weights_are_those_of_ggml(llama_cpp, seed):
    check_against_ggml(llama_cpp, matrices(500, seed))


@pytest.mark.slow
def test_codes_of_a_trained_model_are_those_of_ggml(llama_cpp, committable_data):
    weights = load_file(committable_data("minilm_l6_layers0_5_fp16.safetensors")).values()
    rows = np.concatenate([w.reshape(-1, 768) for w in weights if w.ndim == 2 and w.size % 768 == 0])
    check_against_ggml(llama_cpp, rows.astype(np.float32))


def cases_of_int4() -> dict[str, dict]:
    blocks = {name: BLOCK_FORMATS[BLOCK_ENCODERS[name].ggml_type] for name in INT4}
    return {
        name: {
            "group_size": block.weights,
            "scale_type": block.half_type.name,
            "symmetric": not name.endswith("_ASYMMETRIC"),
        }
        for name, block in blocks.items()
    }


@pytest.mark.slow
def test_codes_are_those_of_compressed_tensors(oracle):
    rows = np.concatenate([matrices(100), edges()])
    rows[np.abs(rows) < SMALLEST] = 0  # compressed-tensors divides by a subnormal scale
    found = oracle(ORACLES / "compressed_tensors_encode.py", rows=rows, cases=cases_of_int4())
    for name in INT4:
        codes, zeros = (found[f"{name}/{part}"].astype(np.int8) + 8 for part in ("codes", "zeros"))
        scales = found[f"{name}/scales"].astype(BLOCK_FORMATS[BLOCK_ENCODERS[name].ggml_type].half_type)
        groups = Groups(codes.astype(np.uint8), zeros.astype(np.uint8), scales)
        expected = as_blocks(groups, BLOCK_ENCODERS[name].ggml_type).codes
        assert not differing(encode_blocks(jnp.asarray(rows), name), expected, name).any(), name


@pytest.mark.parametrize("name", ["INT4_32", "INT4_128_BF16_ASYMMETRIC"])
def test_integers_are_those_of_the_formula(name):
    """A quotient by a scale that is broadcast, which XLA would turn into a product, decides ties."""
    rows, case = matrices(100), cases_of_int4()[name]
    groups = rows.reshape(len(rows), -1, case["group_size"])
    least, most = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scales = np.maximum(-least, most) / np.float32(7.5) if case["symmetric"] else (most - least) / np.float32(15)
    with np.errstate(invalid="ignore"):
        zeros = np.zeros_like(least) if case["symmetric"] else np.rint(np.clip(-8 - least / scales, -8, 7))
    zeros = np.where(scales > 0, zeros, 0)
    dtype = np.dtype(getattr(ml_dtypes, case["scale_type"], case["scale_type"]))
    rounded = scales.astype(dtype)
    rounded[rounded == 0] = ml_dtypes.finfo(dtype).eps
    codes = np.rint(np.clip(groups / rounded.astype(np.float32)[..., None] + zeros[..., None], -8, 7)) + 8
    integers = Groups(codes.reshape(rows.shape).astype(np.uint8), (zeros + 8).astype(np.uint8), rounded)
    expected = as_blocks(integers, BLOCK_ENCODERS[name].ggml_type).codes
    assert not differing(encode_blocks(jnp.asarray(rows), name), expected, name).any()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW if name in ("Q4_0", "Q6_K") else EXHAUSTIVE) for name in BLOCK_ENCODERS]
)
def test_codes_are_the_same_outside_of_jit(name):
    rows = jnp.asarray(np.concatenate([matrices(10), edges()]))
    with jax.disable_jit():
        found = encode_blocks(rows, name)
    np.testing.assert_array_equal(found, encode_blocks(rows, name))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("Q4_0", "Q4_K") else EXHAUSTIVE) for name in BLOCK_ENCODERS]
)
def test_codes_are_the_same_in_a_larger_program(name):
    rows = jnp.asarray(np.concatenate([matrices(10), edges()[:8]]))

    @jax.jit
    def of_sums(rows: jax.Array) -> jax.Array:
        stack = rows.reshape(2, 3, -1, K)
        return encode_blocks(stack * 0.5 + 0.5 * stack, name)

    expected = encode_blocks(rows, name)
    np.testing.assert_array_equal(of_sums(rows).reshape(expected.shape), expected)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_codes_are_those_of_the_gguf_package(name):
    rows = matrices(10)
    rows[1, :32] = [127, *np.arange(-15.5, 15)]  # halves at scale 1
    np.testing.assert_array_equal(encode_blocks(rows, name), quantize(rows, GGMLQuantizationType[name]))


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "Q6_K" else SLOW) for name in SEARCHES])
def test_the_loops_find_what_xla_finds(name):
    width = {"Q6_K": 16}.get(name, 32)
    groups = np.concatenate([matrices(50), edges()]).reshape(-1, width)
    groups = groups[(np.abs(groups).max(-1) >= SMALLEST_BY_XLA) | ~groups.any(-1)]
    number = GGMLQuantizationType[name].value
    found = jax.jit(functools.partial(scale_search, ggml_type=name, number=number))(jnp.asarray(groups))
    plain = Found(*by_xla(jnp.asarray(groups), name)[..., None])
    jax.tree.map(np.testing.assert_array_equal, found, plain)


def test_nvfp4_is_that_of_the_quantizer():
    stack = np.concatenate([matrices(100), edges()]).reshape(-1, ROWS, K)
    stack[np.abs(stack) < 1e-38] = 0  # XLA flushes subnormal numbers
    found = jax.jit(encode_nvfp4)(jnp.asarray(stack))
    for weight, codes in zip(stack, np.asarray(found.codes), strict=True):
        np.testing.assert_array_equal(codes, nvfp4_blocks_of(weight, found.ggml_type))
