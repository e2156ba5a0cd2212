"""Tests the encoders of block formats: the bytes of ggml's own quantizers, to the bit, on weights of every kind."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

from pallas_kernels.formats.block_encoders import BLOCK_ENCODERS, encode_blocks

ORACLE = Path(__file__).parents[2] / "oracle/ggml_encode.py"
ROWS, K = 4, 512


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
        normal[9].astype(np.float16) * 0.02,
    ]
    return np.stack(kinds).astype(np.float32).reshape(-1, K)


def edges() -> np.ndarray:
    """Returns rows of zeros of either sign, constants, single outliers, powers of two, and some subnormal weights."""
    rows = np.zeros((10, K), np.float32)
    rows[1], rows[2, ::2], rows[3, ::32], rows[4], rows[5] = -0.0, -0.0, -3, 1, -1
    rows[6] = 2.0 ** -(np.arange(K) % 30)
    rows[7] = np.where(np.arange(K) % 64 < 32, 1e-3, 1e-41)
    rows[8] = np.where(np.arange(K) % 2, 5, -5)
    rows[9, 5::256] = 60000
    return rows


def blocks_of(codes: np.ndarray, ggml_type: str) -> np.ndarray:
    return np.asarray(codes).reshape(-1, GGML_QUANT_SIZES[GGMLQuantizationType[ggml_type]][1])


def encoded_by_ggml(llama_cpp, rows: np.ndarray) -> dict[str, np.ndarray]:
    return llama_cpp(ORACLE, rows=rows, numbers={name: GGMLQuantizationType[name].value for name in BLOCK_ENCODERS})


def test_codes_are_those_of_ggml(llama_cpp):
    rows = np.concatenate([matrices(100), edges()])
    for ggml_type, expected in encoded_by_ggml(llama_cpp, rows).items():
        found = blocks_of(encode_blocks(jnp.asarray(rows), ggml_type), ggml_type)
        differ = (found != blocks_of(expected, ggml_type)).any(-1)
        # A block of subnormal weights has another reciprocal; its scale is zero in both.
        small = np.abs(rows).reshape(len(differ), -1).max(-1) < 2.0**-96
        assert not differ[~small].any(), ggml_type


@pytest.mark.parametrize("ggml_type", BLOCK_ENCODERS)
def test_codes_are_the_same_outside_of_jit_and_for_stacks(ggml_type):
    rows = jnp.asarray(np.concatenate([matrices(10), edges()[:8]]))
    inside = encode_blocks(rows, ggml_type)
    with jax.disable_jit():
        np.testing.assert_array_equal(encode_blocks(rows, ggml_type), inside)
    stacked = jax.jit(lambda rows: encode_blocks(rows.reshape(2, 3, -1, K) * 1, ggml_type))(rows)
    np.testing.assert_array_equal(stacked.reshape(inside.shape), inside)


@pytest.mark.parametrize("ggml_type", ["Q4_0", "Q8_0"])
def test_codes_are_those_of_the_gguf_package(ggml_type):
    rows = matrices(10)
    rows[1, :32] = [127, *np.arange(-15.5, 15)]  # halves at scale 1
    np.testing.assert_array_equal(encode_blocks(rows, ggml_type), quantize(rows, GGMLQuantizationType[ggml_type]))
