"""The quantizer to NVFP4 equals compressed-tensors on f32 weights, to the bit."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.formats.ggml_blocks import nvfp4_type
from pallas_kernels.formats.ggml_tensor import GgmlTensor, dequantize_ggml
from qlora_jax.quant import nvfp4
from tests.io.float_folders import pairs

ORACLE = Path(__file__).parent.parent / "oracle/nvfp4_codes.py"


def _weights() -> dict[str, np.ndarray]:
    """A hundred random weights, and one with zeros, ties, and the smallest and largest numbers."""
    rng, shapes = np.random.default_rng(0), ((4, 64), (3, 256), (2, 576), (5, 96))
    drawn = [rng.standard_normal(shapes[i % 4]) * 10.0 ** (i % 7 - 4) for i in range(100)]
    odd = rng.choice([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -0.25, -0.75, -5, 0], (9, 64))
    odd[0], odd[1], odd[2, 0], odd[:, 0] = 0, -0.0, 1e-38, 6
    more = {"odd": odd, "zeros": np.zeros((2, 32)), "tiny": odd * 1e-38, "huge": odd * 5e37}
    named = {str(i): weight for i, weight in enumerate(drawn)} | more
    return {name: weight.astype(np.float32) for name, weight in named.items()}


@pytest.mark.slow
def test_codes_scales_and_weights_are_those_of_compressed_tensors(oracle, monkeypatch) -> None:
    monkeypatch.setattr(nvfp4, "SLICE_WEIGHTS", 200)  # a few rows at a time
    weights = _weights()
    found = oracle(ORACLE, **weights)
    for name, weight in weights.items():
        ours = nvfp4.quantize_nvfp4(weight)
        assert ours.of_tensor == found[f"{name}/of_tensor"], name
        np.testing.assert_array_equal(ours.scales.view(np.uint8), found[f"{name}/scale"], err_msg=name)
        np.testing.assert_array_equal(pairs(ours.codes), found[f"{name}/packed"], err_msg=name)
        kind = nvfp4_type(weight.shape[1], inverse=True)
        blocks = nvfp4.nvfp4_blocks_of(weight, kind)
        dense = np.asarray(
            dequantize_ggml(GgmlTensor(codes=blocks, ggml_type=kind, shape=weight.shape, dtype="float32"))
        )
        np.testing.assert_array_equal(dense.astype(ml_dtypes.bfloat16), found[f"{name}/dense"], err_msg=name)
