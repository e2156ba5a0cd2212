"""Logits of transformers' model in `base` on `tokens`, alone and with peft's adapter from `adapter`."""

import torch
from bridge import inputs, save
from peft import PeftModel
from transformers import AutoModelForCausalLM

given = inputs()
tokens = torch.from_numpy(given["tokens"]).long()
model = AutoModelForCausalLM.from_pretrained(given["base"])
with torch.no_grad():
    base = model(tokens).logits.float().numpy()
    model = PeftModel.from_pretrained(model, given["adapter"])
    save(base=base, adapted=model(tokens).logits.float().numpy(), dtype=str(model.dtype))
