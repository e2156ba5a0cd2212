"""Adapters that peft made with random values and saved: their logits over base folders.

`cases`: {name: [base folder, adapter folder, name of the config's class, its arguments]}.
"""

import peft
import torch
from bridge import inputs, save
from transformers import AutoModelForCausalLM

given = inputs()
tokens = torch.from_numpy(given["tokens"]).long()
torch.manual_seed(0)
logits = {}
for name, (base, folder, kind, arguments) in given["cases"].items():
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    adapted = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **arguments)).eval()
    with torch.no_grad():
        for _, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        logits[name] = adapted(tokens).logits.numpy()
    adapted.save_pretrained(folder)
save(**logits)
