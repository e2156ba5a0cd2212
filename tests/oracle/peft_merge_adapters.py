"""Merges of peft's adapters: their changes of weights, and its functions on given changes with given masks.

`adapters`: {name: folder} over `base`. `cases`: {name: arguments of add_weighted_adapter}. `merged`: {name: folder} of
merged adapters, whose logits on `tokens` are returned, too. `elements`: {name: [function
of merge_utils, arguments]}, on `changes` [M, N, K] with the random masks `masks` [M, N, K].
"""

import torch
from bridge import inputs, save
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import merge_utils
from transformers import AutoModelForCausalLM

given = inputs()
base = AutoModelForCausalLM.from_pretrained(given["base"], attn_implementation="eager")
first, *others = given["adapters"]
model = PeftModel.from_pretrained(base, given["adapters"][first], adapter_name=first)
for name in others:
    model.load_adapter(given["adapters"][name], name)
found = {}
tokens = torch.from_numpy(given["tokens"]).long()
for case, arguments in given["cases"].items():
    model.add_weighted_adapter(adapter_name=case, **arguments)
    model.set_adapter(case)
    with torch.no_grad():
        found[f"{case}/logits"] = model(tokens).logits.numpy()
        for key, module in model.base_model.model.named_modules():
            if isinstance(module, LoraLayer) and case in module.lora_A:
                found[f"{case}/{key}"] = module.get_delta_weight(case).numpy()
for name, folder in given["merged"].items():
    model.load_adapter(folder, f"merged {name}")
    model.set_adapter(f"merged {name}")
    with torch.no_grad():
        found[f"merged/{name}"] = model(tokens).logits.numpy()
changes, masks = torch.from_numpy(given["changes"]), torch.from_numpy(given["masks"])
for name, (function, weights, density) in given["elements"].items():
    left = iter(masks)
    torch.bernoulli = lambda shares, left=left: next(left).to(shares.dtype)
    result = getattr(merge_utils, function)([*changes], torch.tensor(weights), density)
    found[f"elements/{name}"] = result.numpy()
save(**found)
