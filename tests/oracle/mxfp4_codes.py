"""Quantizes f32 matrices to MXFP4 with compressed-tensors, and back, which rounds to bfloat16."""

import torch
from bridge import inputs, save
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import MXFP4A16
from compressed_tensors.quantization.utils import calculate_qparams

scheme, found = QuantizationScheme(targets=["Linear"], weights=MXFP4A16["weights"]), {}
for name, weight in inputs().items():
    weight = torch.from_numpy(weight)
    groups = weight.unflatten(-1, (-1, 32))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    packed = MXFP4PackedCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    found[f"{name}/packed"] = packed["weight_packed"].numpy()
    found[f"{name}/scale"] = packed["weight_scale"].numpy()
    found[f"{name}/dense"] = MXFP4PackedCompressor.decompress(packed, scheme)["weight"].float().numpy()
save(**found)
