"""Computes with peft's adapters over base folders, for `cases`: {name: [base folder, adapter folder]}.

Logits on `tokens`; gradients of sum(logits * `cotangent`) by parameter, dropout on, its mask the fixed `kept` columns;
and the merged weights and biases.
"""

import torch
from bridge import inputs, save
from peft import PeftModel
from transformers import AutoModelForCausalLM

given = inputs()
tokens, cotangent = torch.from_numpy(given["tokens"]).long(), torch.from_numpy(given["cotangent"])
every = given["every"]


def keep_columns(self, x):
    """Every third column is zeroed."""
    keep = (torch.arange(x.shape[-1]) % every != 0).to(x.dtype)
    return x * keep / (1 - self.p)


torch.nn.Dropout.forward = lambda self, x: keep_columns(self, x) if self.training and self.p else x
found = {}
for name, (base, folder) in given["cases"].items():
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    adapted = PeftModel.from_pretrained(model, folder, is_trainable=True).eval()
    with torch.no_grad():
        found[f"{name}/logits"] = adapted(tokens).logits.numpy()
    logits = adapted.train()(tokens).logits
    (logits * cotangent).sum().backward()
    found[f"{name}/train"] = logits.detach().numpy()
    for key, parameter in adapted.named_parameters():
        if parameter.grad is not None:
            key = key.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
            found[f"{name}/grad/{key}"] = parameter.grad.numpy()
    merged = adapted.eval().merge_and_unload()
    found |= {f"{name}/merged/{key}": value.numpy() for key, value in merged.state_dict().items()}
save(**found)
