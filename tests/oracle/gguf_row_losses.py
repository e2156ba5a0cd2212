"""Losses of rows of a GGUF model in transformers, in f32: the sum of -log p of each row's tokens after the first."""

import pathlib

import numpy as np
import torch
import transformers
from bridge import inputs, save

given = inputs()
path = pathlib.Path(given["path"])
model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
losses = []
for row in torch.from_numpy(given["tokens"]).long():
    with torch.no_grad():
        logits = model(row[None]).logits[0, :-1]
    losses.append(float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="none").double().sum()))
save(losses=np.array(losses))
