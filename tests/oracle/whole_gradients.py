"""Computes logits and gradients of whole models in transformers, for `cases`: {name: folder}.

Logits on `tokens`, and the gradients of sum(logits * `cotangent`) by parameter. Products are in float64, so that
rounding is ours alone; transformers computes norms and softmax in float32 all the same.
"""

import torch
from bridge import inputs, save
from transformers import AutoModelForCausalLM

given = inputs()
tokens, cotangent = torch.from_numpy(given["tokens"]).long(), torch.from_numpy(given["cotangent"]).double()
found = {}
for name, folder in given["cases"].items():
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64).train()
    logits = model(tokens).logits
    (logits * cotangent).sum().backward()
    found[f"{name}/logits"] = logits.detach().numpy()
    found |= {f"{name}/grad/{key}": parameter.grad.numpy() for key, parameter in model.named_parameters()}
save(**found)
