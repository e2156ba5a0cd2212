"""Quantizes f32 matrices to NVFP4 with compressed-tensors, and back, which rounds to bfloat16."""

import torch
from bridge import inputs, save
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import NVFP4A16
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

found = {}
for name, weight in inputs().items():
    weight = torch.from_numpy(weight)
    groups = weight.unflatten(-1, (-1, 16))
    scheme = QuantizationScheme(targets=["Linear"], weights=NVFP4A16["weights"])
    of_tensor = generate_gparam(weight.amin(), weight.amax())
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights, of_tensor)
    state = {"weight": weight, "weight_scale": scale, "weight_global_scale": of_tensor}
    packed = NVFP4PackedCompressor.compress(state, scheme)
    found[f"{name}/packed"] = packed["weight_packed"].numpy()
    found[f"{name}/scale"] = packed["weight_scale"].view(torch.uint8).numpy()
    found[f"{name}/of_tensor"] = packed["weight_global_scale"].numpy()
    dense = NVFP4PackedCompressor.decompress(packed, scheme)["weight"]
    found[f"{name}/dense"] = dense.float().numpy()
save(**found)
