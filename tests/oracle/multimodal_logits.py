"""Multimodal models in transformers, in f32: logits of text, and which modules PEFT gives an adapter.

`folders`: {name: folder}; `adapters`: {name: [base folder, adapter folder]}. Of each, the logits of `tokens`; of an
adapter also `name/modules`, and `name/unused`, the adapter's tensors that PEFT did not load.
"""

import json

import torch
from bridge import inputs, save
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForImageTextToText

given = inputs()
tokens, found = torch.from_numpy(given["tokens"]).long(), {}


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


def logits(model):
    model.train()  # else bitsandbytes multiplies in bf16 on a CPU that has instructions for it, whatever dtype is set
    with torch.no_grad():
        return model(tokens).logits.numpy()


for name, folder in given["folders"].items():
    found[name] = logits(load(folder))
for name, (base, adapter) in given["adapters"].items():
    model = PeftModel.from_pretrained(load(base), adapter)
    found[name] = logits(model)
    modules = [each for each, module in model.named_modules() if hasattr(module, "base_layer")]
    loaded = set_peft_model_state_dict(model, load_peft_weights(adapter))
    found[f"{name}/modules"] = json.dumps(sorted(modules))
    found[f"{name}/unused"] = json.dumps(sorted(loaded.unexpected_keys))
save(**found)
