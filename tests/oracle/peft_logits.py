"""Logits on `tokens`, without and with the adapter, for each of `cases`: {name: [base folder, adapter folder]}."""

import torch
from bridge import inputs, save
from peft import PeftModel
from transformers import AutoModelForCausalLM

given = inputs()
tokens = torch.from_numpy(given["tokens"]).long()
logits = {}
for name, (base, adapter) in given["cases"].items():
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")  # others leave soft caps out
    assert model.dtype == torch.float32, model.dtype
    with torch.no_grad():
        logits[f"{name}/base"] = model(tokens).logits.numpy()
        logits[f"{name}/adapted"] = PeftModel.from_pretrained(model, adapter)(tokens).logits.numpy()
save(**logits)
