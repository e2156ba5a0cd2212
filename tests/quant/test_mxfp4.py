"""The encoder of MXFP4 equals compressed-tensors on f32 weights, to the bit, and a folder with its codes is read."""

from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.formats.block_encoders import encode_mxfp4
from pallas_kernels.formats.ggml_blocks import MXFP4_HEADER, unpacked_parts
from pallas_kernels.formats.ggml_tensor import dequantize_ggml
from tests.ggml_codes import E2M1
from tests.io.float_folders import pairs
from tests.pallas_kernels.formats.test_block_encoders import SMALLEST, edges, matrices

ORACLE = Path(__file__).parent.parent / "oracle/mxfp4_codes.py"


def _weights() -> np.ndarray:
    """A hundred random matrices below each other, rows of edges, and groups around the next power of two."""
    near = np.float32(1.75) * (1 + np.arange(-8, 8, dtype=np.float32) * np.float32(2**-23))
    rows = np.concatenate([matrices(100), edges(), np.tile(near, 32)[None], -np.repeat(near, 32)[None]])
    rows[np.abs(rows) < SMALLEST] = 0  # XLA flushes subnormal numbers
    return rows


def _parts(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (codes, bytes of scales)."""
    blocks = np.asarray(encode_mxfp4(jnp.asarray(weight)).codes).reshape(len(weight), -1, 17)
    return unpacked_parts(blocks[..., MXFP4_HEADER:].reshape(len(weight), -1)), blocks[..., 0]


def test_codes_are_the_nearest_values_at_the_scale_of_the_formula() -> None:
    """A scale is 2^(e - 2) for a largest magnitude from 1.75 * 2^(e - 1) up to 1.75 * 2^e."""
    weight = _weights().astype(np.float64)
    codes, stored = _parts(weight.astype(np.float32))
    groups = weight.reshape(len(weight), -1, 32)
    largest = np.abs(groups).max(-1)
    with np.errstate(divide="ignore"):
        exponents = np.ceil(np.log2(largest / 1.75) + 1e-12)  # 1.75 * 2^(e - 1) belongs to e
    assert np.array_equal(stored, np.where(largest > 0, exponents - 2 + 127, 0))
    scaled = groups / 2.0 ** (stored[..., None] - 127.0)
    found, middles = (
        E2M1[codes].astype(np.float64).reshape(groups.shape),
        np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]),
    )
    error = np.abs(found - scaled)
    best = np.abs(scaled[..., None] - E2M1.astype(np.float64)).min(-1)
    np.testing.assert_array_equal(error, best)
    ties = np.isin(np.abs(scaled), middles)
    assert ties.any() and not (codes.reshape(groups.shape)[ties] & 1).any()


@pytest.mark.slow
def test_codes_scales_and_weights_are_those_of_compressed_tensors(oracle) -> None:
    weight = _weights()
    found, (codes, stored) = oracle(ORACLE, weight=weight), _parts(weight)
    np.testing.assert_array_equal(stored, found["weight/scale"])
    np.testing.assert_array_equal(pairs(codes), found["weight/packed"])
    dense = np.asarray(dequantize_ggml(encode_mxfp4(jnp.asarray(weight)), jnp.float32))
    np.testing.assert_array_equal(dense.astype(ml_dtypes.bfloat16), found["weight/dense"])
