"""Quantizes f32 `rows` by compressed-tensors to 4-bit integers in groups, for `cases`: {name: settings}."""

import torch
from bridge import inputs, save
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams

given, found = inputs(), {}
rows = torch.from_numpy(given["rows"])
for name, case in given["cases"].items():
    size, scale_type = case["group_size"], getattr(torch, case["scale_type"])
    settings = QuantizationArgs(
        num_bits=4, strategy="group", group_size=size, symmetric=case["symmetric"], scale_dtype=scale_type
    )
    groups = rows.unflatten(-1, (-1, size))
    scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), settings)
    codes = quantize(rows, scales, zeros, settings, dtype=torch.int8)
    found |= {f"{name}/codes": codes.numpy(), f"{name}/zeros": zeros.numpy(), f"{name}/scales": scales.numpy()}
save(**found)
