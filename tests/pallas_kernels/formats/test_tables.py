"""The tables against their sources: normal quantiles, ml_dtypes' float4, published hashes."""

import hashlib
from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.formats.tables import CODE_BY_RANK, CODE_TABLES, MIDPOINTS, ZERO_CODE, dynamic_map

ALL_CODES = np.arange(16, dtype=np.uint8)


def test_nf4_is_made_of_normal_quantiles() -> None:
    """Eight quantiles above zero and seven below, evenly spaced in probability, over the largest."""
    offset, quantile = 0.9677083, NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    made = np.sort(np.array([*above, 0.0, *below])) / max(above)
    np.testing.assert_allclose(CODE_TABLES["nf4"], made, rtol=0, atol=1.1e-7)


def test_e2m1_is_the_float4_of_microscaling() -> None:
    levels = ALL_CODES.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(CODE_TABLES["e2m1"], levels / np.float32(6))


def test_fp4_differs_from_e2m1_in_its_subnormal_alone() -> None:
    """FP4 has the levels of E2M1 in another order, except 0.0625 / 12 instead of 0.5 / 6."""
    fp4, e2m1 = (set(CODE_TABLES[name].tolist()) for name in ("fp4", "e2m1"))
    subnormals = np.array([0.0625 / 12, 0.5 / 6], np.float32).tolist()
    assert fp4 - e2m1 == {subnormals[0], -subnormals[0]}
    assert e2m1 - fp4 == {subnormals[1], -subnormals[1]}


def test_e3m0_and_int4_are_powers_of_two_and_sevenths() -> None:
    magnitudes = [0.0, *(2.0**-e for e in range(6, -1, -1))]
    np.testing.assert_array_equal(CODE_TABLES["e3m0"], magnitudes + [-m for m in magnitudes])
    np.testing.assert_array_equal(np.unique(np.round(CODE_TABLES["int4"] * 7)), np.arange(-7, 8))


@pytest.mark.parametrize("quant_type", CODE_TABLES)
def test_code_by_rank_sorts_the_table_and_midpoints_separate_it(quant_type: str) -> None:
    table, order, midpoints = CODE_TABLES[quant_type], CODE_BY_RANK[quant_type], MIDPOINTS[quant_type]
    ascending = table[order]
    assert sorted(order) == list(ALL_CODES)
    assert np.all(ascending[:-1] <= midpoints) and np.all(midpoints <= ascending[1:])
    assert table[ZERO_CODE[quant_type]] == 0
    assert np.abs(table).max() == 1
    assert table.dtype == midpoints.dtype == np.float32
    assert not table.flags.writeable


@pytest.mark.parametrize(
    ("signed", "sha256"),
    [
        (True, "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"),
        (False, "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"),
    ],
)
def test_dynamic_map_has_the_bits_of_torch_on_avx2(signed: bool, sha256: str) -> None:
    levels = dynamic_map(signed)
    assert hashlib.sha256(levels.tobytes()).hexdigest() == sha256
    assert np.unique(levels).size == 256
    assert levels[127 if signed else 0] == 0
