"""LayerNorm tuning adapters that peft made, with random changes, saved next to nothing else.

`cases`: {name: [base folder, adapter folder, target_modules or None for peft's default]}. Returns the logits on
`tokens`, and peft's default target modules by model type as JSON.
"""

import json

import numpy as np
import torch
from bridge import inputs, save
from peft import LNTuningConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING
from transformers import AutoModelForCausalLM

given = inputs()
tokens = torch.from_numpy(given["tokens"]).long()
torch.manual_seed(0)
logits = {}
for name, (base, folder, targets) in given["cases"].items():
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    adapted = get_peft_model(model, LNTuningConfig(task_type="CAUSAL_LM", target_modules=targets)).eval()
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "ln_tuning_" in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        logits[name] = adapted(tokens).logits.numpy()
    adapted.save_pretrained(folder)
save(defaults=np.array(json.dumps(TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING)), **logits)
