"""Greedy replies of a GGUF model in transformers, f32, with each step's lead over the second token."""

import pathlib

import numpy as np
import torch
import transformers
from bridge import inputs, save

given = inputs()
path = pathlib.Path(given["path"])
model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
results = {}
for name, ids in given["prompts"].items():
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]),
            max_new_tokens=given["max_new_tokens"],
            do_sample=False,
            eos_token_id=given["eos_id"],
            pad_token_id=given["eos_id"],
            return_dict_in_generate=True,
            output_logits=True,
        )
    top = torch.stack([step[0].topk(2).values for step in out.logits])
    results[f"{name}_ids"] = out.sequences[0, len(ids) :].numpy().astype(np.int32)
    results[f"{name}_lead"] = (top[:, 0] - top[:, 1]).numpy()
save(**results)
