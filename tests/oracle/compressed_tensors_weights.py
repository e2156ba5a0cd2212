"""Loads folders of compressed-tensors in transformers, dequantized, for `cases`: {name: folder}; every f32 weight."""

import torch
from bridge import inputs, save
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

found = {}
for name, folder in inputs()["cases"].items():
    settings = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)
    found |= {f"{name}/{key}": parameter.detach().numpy() for key, parameter in model.named_parameters()}
save(**found)
