"""Mean squares of the inputs of each linear layer in transformers, for each of `folders`: {name: folder}, in f32.

Means are over all tokens of `rows`, and computed in f64. The result has names such as llama/model.layers.0...weight.
"""

import functools

import torch
from bridge import inputs, save
from transformers import AutoModelForCausalLM

given = inputs()
sums = {}


def add(key, module, args):
    squares = args[0].double().reshape(-1, args[0].shape[-1]).square().sum(0)
    sums[key] = sums.get(key, 0) + squares


for name, folder in given["folders"].items():
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    for key, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(functools.partial(add, f"{name}/{key}.weight"))
    with torch.no_grad():
        for row in given["rows"]:
            model(torch.tensor([row]))
tokens = sum(map(len, given["rows"]))
save(**{key: (total / tokens).numpy() for key, total in sums.items()})
