"""Writes 4-bit weights in the forms of compressed-tensors, which compressed_tensors_reader.py describes.

NVFP4 is written by `quantize` too; integers and MXFP4 only for runs with `lora.merge_into`.
"""

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from pallas_kernels.formats.ggml_blocks import (
    BLOCK_FORMATS,
    INT_HEADER,
    MXFP4_HEADER,
    NVFP4_GROUP,
    PART,
    nvfp4_parts,
    unpacked_parts,
)
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from qlora_jax.io.hf.model_writer import CodesForm, TensorSpec
from qlora_jax.io.loading.loader import read_finite
from qlora_jax.model_source import ModelSource, TensorEntry
from qlora_jax.models.config import WeightFormat
from qlora_jax.quant.nvfp4 import E4M3, Nvfp4, quantize_nvfp4
from qlora_jax.untrusted_json import JsonObject

BYTES, BF16 = np.dtype(np.uint8), np.dtype(ml_dtypes.bfloat16)
_NVFP4: JsonObject = {
    "type": "float",
    "strategy": "tensor_group",
    "group_size": NVFP4_GROUP,
    "scale_dtype": "torch.float8_e4m3fn",
    "zp_dtype": "torch.float8_e4m3fn",
}
_MXFP4: JsonObject = {
    "type": "float",
    "strategy": "group",
    "group_size": PART,
    "scale_dtype": "torch.uint8",
    "zp_dtype": "torch.uint8",
}


def _config(form: str, of_weights: JsonObject, skipped: list[str]) -> JsonObject:
    weights = {"num_bits": 4, "symmetric": True, "dynamic": False, **of_weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": skipped,
    }


def _pairs(codes_NK: np.ndarray) -> np.ndarray:
    return codes_NK[:, ::2] | codes_NK[:, 1::2] << 4


def _nvfp4_specs(name: str, shape: tuple[int, ...], weights: WeightFormat) -> Iterator[TensorSpec]:
    stem, (rows, columns) = name.removesuffix(".weight"), shape
    yield TensorSpec(f"{stem}.weight_packed", BYTES, (rows, columns // 2))
    yield TensorSpec(f"{stem}.weight_scale", E4M3, (rows, columns // NVFP4_GROUP))
    yield TensorSpec(f"{stem}.weight_global_scale", np.dtype(np.float32), (1,))


def _quantized(source: ModelSource, entry: TensorEntry, spec: GgmlTensor) -> Nvfp4:
    return quantize_nvfp4(read_finite(source, entry))


def _nvfp4_values(weight: Nvfp4 | GgmlTensor, dtype: str) -> Iterator[np.ndarray]:
    if isinstance(weight, GgmlTensor):
        weight = Nvfp4(*nvfp4_parts(np.asarray(weight.codes), weight.ggml_type))
    yield _pairs(weight.codes)
    yield weight.scales
    yield weight.of_tensor[None]


def _mxfp4_specs(name: str, shape: tuple[int, ...], weights: WeightFormat) -> Iterator[TensorSpec]:
    stem, (rows, columns) = name.removesuffix(".weight"), shape
    yield TensorSpec(f"{stem}.weight_packed", BYTES, (rows, columns // 2))
    yield TensorSpec(f"{stem}.weight_scale", BYTES, (rows, columns // PART))


def _mxfp4_values(weight: GgmlTensor, dtype: str) -> Iterator[np.ndarray]:
    blocks, rows = _blocks(weight), weight.shape[0]
    yield _pairs(unpacked_parts(blocks[..., MXFP4_HEADER:].reshape(rows, -1)))
    yield np.ascontiguousarray(blocks[..., 0])


def _integer_specs(name: str, shape: tuple[int, ...], weights: WeightFormat) -> Iterator[TensorSpec]:
    stem, (rows, columns) = name.removesuffix(".weight"), shape
    yield TensorSpec(f"{stem}.weight_packed", np.dtype(np.int32), (rows, columns // 8))
    yield TensorSpec(f"{stem}.weight_scale", BF16, (rows, columns // weights.block_size))
    yield TensorSpec(f"{stem}.weight_shape", np.dtype(np.int64), (2,))


def _integer_values(weight: GgmlTensor, dtype: str) -> Iterator[np.ndarray]:
    blocks, rows = _blocks(weight), weight.shape[0]
    codes_NK = unpacked_parts(blocks[..., INT_HEADER:].reshape(rows, -1))
    yield np.ascontiguousarray(_pairs(codes_NK)).view(np.int32)
    yield np.ascontiguousarray(blocks[..., :2]).view(BF16)[..., 0]
    yield np.array(weight.shape, np.int64)


def _blocks(weight: GgmlTensor) -> np.ndarray:
    return np.asarray(weight.codes).reshape(weight.shape[0], -1, BLOCK_FORMATS[weight.ggml_type].nbytes)


COMPRESSED_NVFP4 = CodesForm(
    specs=_nvfp4_specs,
    quantize=_quantized,
    values=_nvfp4_values,
    config=lambda weights, skipped: _config("nvfp4-pack-quantized", _NVFP4, skipped),
)
COMPRESSED_MXFP4 = CodesForm(
    specs=_mxfp4_specs,
    quantize=None,
    values=_mxfp4_values,
    config=lambda weights, skipped: _config("mxfp4-pack-quantized", _MXFP4, skipped),
)
COMPRESSED_INTEGERS = CodesForm(
    specs=_integer_specs,
    quantize=None,
    values=_integer_values,
    config=lambda weights, skipped: _config(
        "pack-quantized", {"type": "int", "strategy": "group", "group_size": weights.block_size}, skipped
    ),
)
