"""Dequantizes folders of compressed-tensors and FP8 in transformers, for `cases`: {name: folder}; f32 weights."""

import json
from pathlib import Path

import torch
from bridge import inputs, save
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

found = {}
for name, folder in inputs()["cases"].items():
    quantization = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    kind = FineGrainedFP8Config if quantization["quant_method"] == "fp8" else CompressedTensorsConfig
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=kind(dequantize=True), dtype=torch.float32)
    found |= {f"{name}/{key}": parameter.detach().float().numpy() for key, parameter in model.named_parameters()}
save(**found)
