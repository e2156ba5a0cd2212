"""Tolerances of products with 16-bit roundings, from theory.

Rounding to p significant bits changes a value by at most half a spacing, uniformly: by spacing / sqrt(12) in the root
mean square, relative to values that are uniform in the logarithm:

    spacing at 1 is 2^(1-p),  E[1 / m^2] over mantissas m in [1, 2) is (1 - 1/4) / (2 ln 2) = 0.541
    rms(p) = 2^(1-p) / sqrt(12) * sqrt(0.541):  bf16 (p = 8) 1.66e-3,  f16 (p = 11) 2.07e-4,  f32 (p = 24) 2.53e-8

Independent roundings add up as sqrt(count) rms. Sums in f32 add at most sqrt(terms) spacings of f32.
"""

import math

import jax.numpy as jnp
import numpy as np

SIGNIFICANT_BITS = {"bfloat16": 8, "float16": 11, "float32": 24}
# The kernels round table values, scales, their products, and the result. (The actual error is smaller, because 0, 1 and
# -1 in a table are exact: 2.62e-3 measured on weights, against 2.87e-3 for three roundings.)
FUSED = 4
UNFUSED = 3  # the weight, the result, and a part of a sum if a library splits it
OF_PARTS = 1  # one more on several devices, each of which rounds its part of a sum


def rms(dtype: object) -> float:
    """Returns the relative root mean square error of one rounding."""
    spacing = 2.0 ** (1 - SIGNIFICANT_BITS[jnp.dtype(dtype).name])
    return spacing / math.sqrt(12) * math.sqrt(0.75 / (2 * math.log(2)))


def tolerance(dtype: object, terms: int, elements: int, roundings: int = FUSED) -> float:
    """Returns the allowed relative error (Frobenius norm) of a product with sums of `terms` and `elements` results.

    The norm of few random errors has a standard deviation of 1 / sqrt(2 elements): four of these are allowed.
    """
    spread = 1 + 4 / math.sqrt(2 * elements)
    return math.sqrt(roundings) * rms(dtype) * spread + math.sqrt(terms) * 2.0**-23


def relative_error(actual: object, expected: np.ndarray) -> float:
    """Computes |actual - expected| / |expected| in the Frobenius norm, in float64."""
    exact = np.asarray(expected, np.float64)
    return float(np.linalg.norm(np.asarray(actual, np.float64) - exact) / np.linalg.norm(exact))
