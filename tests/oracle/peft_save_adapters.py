"""Adapters that peft made with random matrices, saved beside nothing else: their logits over base folders.

`cases`: {name: [base folder, adapter folder, arguments of LoraConfig; `resize_to` tokens before, where it is there]}.
"""

import torch
from bridge import inputs, save
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

given = inputs()
tokens = torch.from_numpy(given["tokens"]).long()
torch.manual_seed(0)
logits = {}
for name, (base, folder, arguments) in given["cases"].items():
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    if "resize_to" in arguments:
        model.resize_token_embeddings(arguments.pop("resize_to"), mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **arguments)).eval()
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if any(part in key for part in ("lora_", "trainable_tokens_delta", "modules_to_save")):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        logits[name] = adapted(tokens).logits.numpy()
    adapted.save_pretrained(folder)
save(**logits)
