"""Logits of transformers on `tokens` for each of `folders`: {name: folder}, computed in f32."""

import torch
from bridge import inputs, save
from transformers import AutoModelForCausalLM

given = inputs()
tokens = torch.from_numpy(given["tokens"]).long()
logits = {}
for name, folder in given["folders"].items():
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        logits[name] = model(tokens).logits.numpy()
save(**logits)
