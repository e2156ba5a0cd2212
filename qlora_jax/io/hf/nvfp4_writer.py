"""The form of compressed-tensors' NVFP4 weights in folders for transformers."""

from collections.abc import Iterator

import numpy as np

from pallas_kernels.formats.ggml_blocks import NVFP4_GROUP, nvfp4_parts
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from qlora_jax.io.hf.model_writer import CodesForm, TensorSpec
from qlora_jax.io.loading.loader import read_finite
from qlora_jax.metadata import JsonObject
from qlora_jax.model_source import ModelSource, TensorEntry
from qlora_jax.models.config import WeightFormat
from qlora_jax.quant.nvfp4 import E4M3, Nvfp4, quantize_nvfp4

_WEIGHTS: JsonObject = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": NVFP4_GROUP,
    "symmetric": True,
    "dynamic": False,
    "scale_dtype": "torch.float8_e4m3fn",
    "zp_dtype": "torch.float8_e4m3fn",
}


def _specs(name: str, shape: tuple[int, ...], weights: WeightFormat) -> Iterator[TensorSpec]:
    stem, (rows, columns) = name.removesuffix(".weight"), shape
    yield TensorSpec(f"{stem}.weight_packed", np.dtype(np.uint8), (rows, columns // 2))
    yield TensorSpec(f"{stem}.weight_scale", E4M3, (rows, columns // NVFP4_GROUP))
    yield TensorSpec(f"{stem}.weight_global_scale", np.dtype(np.float32), (1,))


def _quantized(source: ModelSource, entry: TensorEntry, spec: GgmlTensor) -> Nvfp4:
    return quantize_nvfp4(read_finite(source, entry))


def _values(weight: Nvfp4 | GgmlTensor, dtype: str) -> Iterator[np.ndarray]:
    if isinstance(weight, GgmlTensor):
        weight = Nvfp4(*nvfp4_parts(np.asarray(weight.codes), weight.ggml_type))
    yield weight.codes[:, ::2] | weight.codes[:, 1::2] << 4
    yield weight.scales
    yield weight.of_tensor[None]


def _config(weights: WeightFormat, skipped: list[str]) -> JsonObject:
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": _WEIGHTS, "input_activations": None}},
        "ignore": skipped,
    }


COMPRESSED_NVFP4 = CodesForm(specs=_specs, quantize=_quantized, values=_values, config=_config)
