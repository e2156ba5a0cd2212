"""Folders that transformers loads, or makes, in the 4 bits of bitsandbytes: each linear layer, dequantized.

`quantize`: {name: [folder in 16 bits, new folder, settings]} to quantize and save; `load`: {name: folder}.
Codes are returned too: `name/codes/module`; of loaded ones the logits of `tokens`: `name/logits`.
"""

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from bridge import inputs, save
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

given = inputs()
torch.set_num_threads(1)
found = {}


def tell(name, model):
    for module, linear in model.named_modules():
        if isinstance(linear, Linear4bit):
            weight = linear.weight
            found[f"{name}/weights/{module}"] = bnb.dequantize_4bit(weight.data, weight.quant_state).float().numpy()
            found[f"{name}/codes/{module}"] = weight.data.reshape(-1).view(torch.uint8).numpy()


for name, (folder, output, settings) in given.get("quantize", {}).items():
    storage = getattr(torch, settings.pop("bnb_4bit_quant_storage", "uint8"))
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=storage, **settings)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    tell(name, model)
    model.save_pretrained(output)
for name, folder in given.get("load", {}).items():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tell(name, model)
    model.train()  # else bitsandbytes multiplies in bf16 on a CPU that has instructions for it, whatever dtype is set
    with torch.no_grad():
        found[f"{name}/logits"] = model(torch.from_numpy(given["tokens"]).long()).logits.numpy()
save(**found)
