"""Golden files of bitsandbytes' codes, constants and dequantized weights; bitsandbytes is not required."""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.dequantize import dequantize_numpy
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax import quant

GOLDEN = Path(__file__).resolve().parent.parent / "golden/quant.npz"
with np.load(GOLDEN) as _file:
    ARRAYS = dict(_file)
CASES = json.loads(str(ARRAYS.pop("json")))["cases"]
DENORMAL_INPUTS = ("subnormal",)  # XLA on CPUs flushes their products to zero


def golden_leaves(case: str, double_quant: bool) -> dict[str, np.ndarray]:
    constants = ("absmax_codes", "nested_absmax", "nested_offset") if double_quant else ("absmax",)
    return {leaf: ARRAYS[f"{case}.{leaf}"] for leaf in ("codes", *constants)}


def assert_leaves(qt: QTensor, expected: dict[str, np.ndarray]) -> None:
    for leaf, values in expected.items():
        np.testing.assert_array_equal(np.asarray(getattr(qt, leaf)).reshape(-1), values.reshape(-1), err_msg=leaf)


def golden_qtensor(qt: QTensor, expected: dict[str, np.ndarray]) -> QTensor:
    """Replaces qt's leaves by the golden ones, in qt's shapes."""
    leaves = {leaf: values.reshape(np.shape(getattr(qt, leaf))) for leaf, values in expected.items()}
    return dataclasses.replace(qt, **leaves)


def settings_of(case: str) -> dict[str, str | int]:
    return {name: CASES[case][name] for name in ("quant_type", "block_size")}


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("case", CASES)
def test_numpy_quantizes_as_bitsandbytes(case: str, double_quant: bool) -> None:
    qt = quant.quantize_numpy(ARRAYS[CASES[case]["input"]], **settings_of(case), double_quant=double_quant)
    assert_leaves(qt, golden_leaves(case, double_quant))


@pytest.mark.parametrize("case", CASES)
def test_quantizes_as_bitsandbytes(case: str) -> None:
    qt = quant.quantize(ARRAYS[CASES[case]["input"]], **settings_of(case))
    assert_leaves(qt, golden_leaves(case, double_quant=True))


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("case", CASES)
def test_dequantizes_as_bitsandbytes(case: str, double_quant: bool) -> None:
    settings, weight = settings_of(case), ARRAYS[CASES[case]["input"]]
    qt = quant.quantize_numpy(weight, **settings, double_quant=double_quant)
    qt = golden_qtensor(qt, golden_leaves(case, double_quant))
    in_numpy = dequantize_numpy(qt)
    assert in_numpy.dtype == weight.dtype
    digest = hashlib.sha256((in_numpy.astype(np.float32) + np.float32(0)).tobytes()).hexdigest()
    assert digest == CASES[case]["weights_sha256"]["double" if double_quant else "single"]
    if double_quant and CASES[case]["input"] not in DENORMAL_INPUTS:
        np.testing.assert_array_equal(np.asarray(quant.dequantize(jax.tree.map(jnp.asarray, qt))), in_numpy)
