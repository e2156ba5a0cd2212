"""Every tensor that transformers reads from several GGUF files in `folder`, as f32, each under its file's name."""

import torch
from bridge import inputs, save
from transformers import AutoModelForCausalLM

given = inputs()
found = {}
for name, file in given["files"].items():
    model = AutoModelForCausalLM.from_pretrained(given["folder"], gguf_file=file, dtype=torch.float32)
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    found |= {f"{name}/{key}": value.numpy() for key, value in tensors.items()}
save(**found)
