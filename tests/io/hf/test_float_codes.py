"""Tests weights in NVFP4 and FP8 in folders: values and blocks to the bit, and errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_jax.io.open_model import open_model
from qlora_jax.model_source import TensorEntry
from tests.ggml_codes import dequantized
from tests.io.float_folders import (
    FLOAT_FORMS,
    MXFP4_CONFIG,
    NVFP4_CONFIG,
    compressed_config,
    compressed_mxfp4,
    compressed_nvfp4,
    deepseek_config,
    fp8,
    modelopt_config,
    modelopt_nvfp4,
    random_fp8,
    random_mxfp4,
    random_nvfp4,
)
from tests.io.integer_folders import write_integer_folder
from tests.io.tiny_models import random_weights, tiny_config, write_folder

CONFIG = tiny_config()
WEIGHTS = random_weights(CONFIG)
NAME = "model.layers.1.mlp.down_proj"
SHAPE = (64, 128)


@pytest.mark.parametrize("form", FLOAT_FORMS)
def test_every_layer_has_the_numbers_of_the_file(form: str, tmp_path: Path) -> None:
    dense = write_integer_folder(tmp_path, FLOAT_FORMS[form], CONFIG, WEIGHTS)
    tensors = open_model(tmp_path).tensors
    assert tensors.keys() == dense.keys()
    for name, expected in dense.items():
        np.testing.assert_array_equal(tensors[name].read(), expected, err_msg=name)
        if name.endswith("_proj.weight"):
            read = tensors[name].read_stored
            assert read is not None
            blocks = read(3, 31)
            assert blocks.ggml_type == tensors[name].file_type and blocks.shape == (28, expected.shape[1])
            np.testing.assert_array_equal(dequantized(blocks), expected[3:31], err_msg=name)


def _one(folder: Path, tensors: dict[str, Any], quantization: dict[str, Any]) -> TensorEntry:
    """Writes a folder with one layer in codes, and opens it."""
    named = {f"{NAME}.{part}": np.ascontiguousarray(values) for part, values in tensors.items() if values is not None}
    write_folder(folder, CONFIG | {"quantization_config": quantization}, named)
    return open_model(folder).tensors[f"{NAME}.weight"]


@pytest.mark.parametrize(
    ("columns", "nvfp4", "kind"),
    [(768, "NVFP4_256_INV", "FP8_128"), (576, "NVFP4_64_INV", "FP8_64"), (96, "NVFP4_32_INV", "FP8_32")],
)
def test_blocks_are_as_large_as_rows_allow(columns: int, nvfp4: str, kind: str, tmp_path: Path) -> None:
    """The scale of a tensor is repeated in every block, which takes 4.63 bits per weight in the largest."""
    entry = _one(tmp_path / "nvfp4", compressed_nvfp4(random_nvfp4((8, columns))), NVFP4_CONFIG)
    assert entry.file_type == nvfp4
    whole = random_fp8((8, columns), (None, None))
    assert _one(tmp_path / "fp8", fp8(whole, axes=0), modelopt_config("FP8")).file_type == kind
    if columns == 768:
        assert entry.read_stored is not None
        assert entry.read_stored(0, 8).codes.nbytes * 8 / (8 * columns) == 4.625


NVFP4, FP8 = random_nvfp4(SHAPE), random_fp8(SHAPE)
MX = compressed_mxfp4(random_mxfp4(SHAPE))
PACKED, BLOCKS, OPTIMIZED = compressed_nvfp4(NVFP4), fp8(FP8, "weight_scale_inv"), modelopt_nvfp4(NVFP4)
ODD = compressed_nvfp4(random_nvfp4((8, 48)))
DAMAGED = [
    (NVFP4_CONFIG, PACKED | {"weight_global_scale": None}, "missing weight_global_scale: .*down_proj in layers 1"),
    (NVFP4_CONFIG, PACKED | {"weight_packed": None}, "found no codes, expected weight_packed or weight"),
    (NVFP4_CONFIG, PACKED | {"weight_packed": PACKED["weight_packed"][0]}, r"found U8 \[64\], expected a matrix of U8"),
    (NVFP4_CONFIG, PACKED | {"weight": BLOCKS["weight"]}, "found weight_packed and weight, expected"),
    (NVFP4_CONFIG, PACKED | {"weight": NVFP4.dense()}, "weight in 16 bits next to its codes"),
    (
        NVFP4_CONFIG,
        ODD | {"weight_scale": PACKED["weight_scale"], "weight_global_scale": np.ones(2, np.float32)},
        r"weight_scale: found F8_E4M3 \[64, 8\], expected F8_E4M3 \[8, 3\]; found 48 inputs, expected a multiple .*; "
        r"weight_global_scale: found F32 \[2\], expected F32 or BF16 or F16, \[\] or \[1\]",
    ),
    (
        NVFP4_CONFIG,
        PACKED | {"weight_global_scale": np.zeros(1, np.float32)},
        "found 0.0, expected a number with which",
    ),
    (NVFP4_CONFIG, PACKED | {"weight_global_scale": np.full(1, np.nan, np.float32)}, "found nan, expected a number"),
    (
        modelopt_config("NVFP4"),
        OPTIMIZED | {"weight_scale_2": np.float32(1e38)},
        "found 9.9.*e.37, expected a number with",
    ),
    (MXFP4_CONFIG, MX | {"weight_scale": None}, "missing weight_scale: "),
    (MXFP4_CONFIG, MX | {"weight_scale": MX["weight_scale"][:, 1:]}, r"found U8 \[64, 3\], expected U8 \[64, 4\]"),
    (MXFP4_CONFIG, MX | {"weight_scale": PACKED["weight_scale"]}, r"found F8_E4M3 \[64, 8\], expected U8"),
    (modelopt_config("NVFP4"), OPTIMIZED | {"weight_scale_2": None}, "missing weight_scale_2"),
    (modelopt_config("NVFP4"), OPTIMIZED | {"weight_scale": None}, "missing weight_scale"),
    (modelopt_config("NVFP4"), OPTIMIZED | {"pre_quant_scale": np.ones(2, np.uint8)}, "1 tensors have types .* U8"),
    (modelopt_config("NVFP4_AWQ"), OPTIMIZED, "quant_algo: found 'NVFP4_AWQ', expected NVFP4 or"),
    (deepseek_config(), BLOCKS | {"weight_scale_inv": FP8.scales[:1]}, r"found F32 \[1, 2\], expected .*, \[2, 2\]: "),
    (deepseek_config(), BLOCKS | {"weight_scale_inv": FP8.codes}, "found F8_E4M3 .*, expected F32 or BF16 or F16, "),
    (
        deepseek_config(),
        BLOCKS | {"weight": FP8.codes.reshape(-1)},
        r"weight: found F8_E4M3 \[8192\], expected a matrix",
    ),
    (deepseek_config(), BLOCKS | {"weight": FP8.codes[:, :33]}, "found 33 inputs, expected a multiple of 32"),
    (deepseek_config((128, 100)), BLOCKS, r"weight_block_size: found \[128, 100\], expected rows and a multiple of 32"),
    (deepseek_config((0, 64)), BLOCKS, r"weight_block_size: found \[0, 64\]"),
    (deepseek_config(), dict.fromkeys(BLOCKS), r"no tensor is named \.weight_scale_inv"),
    (compressed_config("mxfp6-pack-quantized", num_bits=6), BLOCKS, "format of group_0: found mxfp6-pack-quantized"),
    (
        compressed_config("float-quantized", num_bits=4, strategy="token", block_structure=[16, 8]),
        BLOCKS,
        r"num_bits: found 4, .*strategy: found 'token', expected tensor or .*block_structure: found \[16, 8\]",
    ),
]


@pytest.mark.parametrize(("quantization", "tensors", "problem"), DAMAGED)
def test_damaged_tensors_are_refused_together(
    quantization: dict[str, Any], tensors: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=problem) as error:
        _one(tmp_path, tensors, quantization)
    assert str(tmp_path) in str(error.value)
