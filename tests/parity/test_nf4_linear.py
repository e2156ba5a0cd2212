"""The codes of NF4Linear are bitsandbytes' for the transposed kernel."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from pallas_kernels.formats.layouts import repack
from qlora_jax.nn.nf4_linear import NF4Linear

SCRIPT = Path(__file__).resolve().parent.parent / "oracle/bnb_quantize.py"


@pytest.mark.slow
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_codes_and_scales_equal_bitsandbytes(oracle, quant_type):
    linear = nnx.Linear(128, 96, rngs=nnx.Rngs(0))
    settings = {"quant_type": quant_type, "block_size": 64, "double_quant": False}
    layer = NF4Linear.from_linear(linear, **settings)
    weight = np.asarray(linear.kernel[...]).T
    wanted = oracle(SCRIPT, settings={"one": settings | {"dtype": "float32"}}, one=np.ascontiguousarray(weight)[None])
    found = repack(layer.weight.get_value(), "bnb")
    assert np.array_equal(np.asarray(found.codes).reshape(-1), wanted["one.codes"][0])
    assert np.array_equal(np.asarray(found.absmax).reshape(-1), wanted["one.absmax"][0])
    assert np.array_equal(layer.dequantized_kernel().T, wanted["one.weights"][0])
