"""f32 logits of a GGUF model in transformers."""

import pathlib

import torch
import transformers
from bridge import inputs, save

given = inputs()
path = pathlib.Path(given["path"])
model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
with torch.no_grad():
    save(logits=model(torch.from_numpy(given["tokens"]).long()).logits.numpy())
