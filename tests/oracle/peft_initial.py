"""Starts peft's PiSSA and LoftQ on the model in `folder`: initial weights and adapters, and logits.

`pissa`: {name: arguments of LoraConfig}; `loftq`: {name: [rank, iterations]}, of each weight of `folder` by itself.
"""

import inspect

import peft.utils.loftq_utils as loftq_utils
import torch
from bridge import inputs, save
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

given = inputs()
torch.manual_seed(0)  # the error of pissa_niter_16 has a heavy tail over the draws
tokens, found = torch.from_numpy(given["tokens"]).long(), {}


def load():
    return AutoModelForCausalLM.from_pretrained(given["folder"], attn_implementation="eager").eval()


for name, arguments in given["pissa"].items():
    adapted = get_peft_model(load(), LoraConfig(task_type="CAUSAL_LM", **arguments)).eval()
    for key, value in adapted.state_dict().items():
        found[f"{name}/{key.removeprefix('base_model.model.').replace('.default', '')}"] = value.numpy()
    with torch.no_grad():
        found[f"{name}/logits"] = adapted(tokens).logits.numpy()
# loftq_init asks for a GPU by name and needs none.
exec(inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"'), loftq_utils.__dict__)
for name, (rank, iterations) in given["loftq"].items():
    for key, weight in load().named_parameters():
        if ".layers." in key and weight.ndim == 2:
            held, a, b = loftq_utils.loftq_init(weight, num_bits=4, reduced_rank=rank, num_iter=iterations)
            found |= {f"{name}/{key}": held.numpy(), f"{name}/{key}/delta": (b @ a).numpy()}
save(**found)
