"""Every tensor that transformers reads from a GGUF file, as f32; `folder` and `file` say where."""

import torch
from bridge import inputs, save
from transformers import AutoModelForCausalLM

given = inputs()
model = AutoModelForCausalLM.from_pretrained(given["folder"], gguf_file=given["file"], dtype=torch.float32)
tensors = model.state_dict()
if model.config.tie_word_embeddings:
    del tensors["lm_head.weight"]
config = {key: getattr(model.config, key) for key in given["config_keys"]}
save(**{name: value.numpy() for name, value in tensors.items()}, **{f"config/{k}": v for k, v in config.items()})
