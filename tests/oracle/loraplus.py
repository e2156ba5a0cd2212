"""peft.optimizers.create_loraplus_optimizer with torch.optim.AdamW: adapters of two DoRA layers after every step.

Inputs: `start` and `gradients` by PEFT's names (`q.lora_A` and so on, gradients with a leading axis of steps), and
`settings`. Returns each parameter as [steps, ...].
"""

import numpy as np
import torch
import transformers
from bridge import inputs, save
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer

given = inputs()
settings, names = given["settings"], given["names"]
start = {name: given[f"{name}_start"] for name in names}


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for layer in {name.split(".")[0] for name in names}:
            n, k = start[f"{layer}.lora_B"].shape[0], start[f"{layer}.lora_A"].shape[1]
            setattr(self, layer, torch.nn.Linear(k, n, bias=False))


layers = sorted({name.split(".")[0] for name in names})
rank = start[f"{layers[0]}.lora_A"].shape[0]
model = get_peft_model(Layers(), LoraConfig(r=rank, target_modules=layers, use_dora=True))
parameters = {}
for key, parameter in model.named_parameters():
    if parameter.requires_grad:
        layer, leaf = key.split("model.model.")[1].split(".")[:2]
        parameters[f"{layer}.{leaf}"] = parameter
assert parameters.keys() == start.keys(), parameters.keys()
optimizer = create_loraplus_optimizer(
    model,
    torch.optim.AdamW,
    lr=settings["learning_rate"],
    loraplus_lr_ratio=settings["loraplus_lr_ratio"],
    loraplus_weight_decay=settings["weight_decay"],
    betas=(settings["beta1"], settings["beta2"]),
    eps=settings["eps"],
)
schedule = transformers.get_scheduler("cosine", optimizer, 0, num_training_steps=settings["steps"])
with torch.no_grad():
    for name, parameter in parameters.items():
        parameter.copy_(torch.from_numpy(start[name]))
trace = {name: [] for name in names}
for step in range(settings["steps"]):
    for name, parameter in parameters.items():
        parameter.grad = torch.from_numpy(given[f"{name}_gradients"][step])
    if settings["max_grad_norm"]:
        torch.nn.utils.clip_grad_norm_(parameters.values(), settings["max_grad_norm"])
    optimizer.step()
    schedule.step()
    for name, parameter in parameters.items():
        trace[name].append(parameter.detach().numpy().copy())
save(**{name: np.stack(values) for name, values in trace.items()})
