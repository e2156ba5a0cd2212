"""Random models of the configs given (llama where `model_type` is left out), saved as Hugging Face folders; their f32
logits."""

import pathlib

import torch
import transformers
from bridge import inputs, save

given = inputs()
torch.manual_seed(0)
logits = {}
for name, overrides in given["configs"].items():
    config = transformers.AutoConfig.for_model(**({"model_type": "llama"} | overrides))
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # norms start at one and biases at zero: move them too
            around = 1.0 if "norm" in key else 0.0
            parameter.copy_(around + torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.08))
        model.save_pretrained(pathlib.Path(given["folder"]) / name)
        logits[name] = model(torch.from_numpy(given["tokens"]).long()).logits.numpy()
save(**logits)
