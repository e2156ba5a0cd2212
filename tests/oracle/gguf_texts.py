"""Reads a GGUF file with transformers: ids of `texts`, and f32 logits of `row`."""

import json
import pathlib

import numpy as np
import torch
import transformers
from bridge import inputs, save

given = inputs()
path = pathlib.Path(given["path"])
tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in given["texts"]]
model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(torch.tensor([given["row"]])).logits[0].numpy()
save(ids=np.array(json.dumps(ids)), logits=logits)
