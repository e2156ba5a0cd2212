"""peft.optimizers.create_lorafa_optimizer: B of several LoRA layers after every step.

Inputs: `start` and `gradients` by PEFT's names (`q0.lora_A`, gradients of B with a leading axis of steps), and
`settings`. PEFT multiplies by the correction in bf16 where accelerate reports bf16; `in_f32` turns that off.
"""

import numpy as np
import peft.optimizers.lorafa
import torch
from bridge import inputs, save
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer

given = inputs()
settings, names = given["settings"], given["names"]
if given["in_f32"]:
    peft.optimizers.lorafa.is_bf16_available = lambda: False
start = {name: given[f"{name}_start"] for name in names}
layers = sorted({name.split(".")[0] for name in names})


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for layer in layers:
            n, k = start[f"{layer}.lora_B"].shape[0], start[f"{layer}.lora_A"].shape[1]
            setattr(self, layer, torch.nn.Linear(k, n, bias=False))


rank, alpha = settings["rank"], settings["alpha"]
config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=settings["use_rslora"], target_modules=layers)
model = get_peft_model(Layers(), config)
parameters = {}
with torch.no_grad():
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            layer, leaf = key.split("model.model.")[1].split(".")[:2]
            parameters[f"{layer}.{leaf}"] = parameter.copy_(torch.from_numpy(start[f"{layer}.{leaf}"]))
assert parameters.keys() == start.keys(), parameters.keys()
rates = settings["learning_rate"], settings["weight_decay"]
optimizer = create_lorafa_optimizer(model, rank, alpha, *rates)
for group in optimizer.param_groups:
    group["eps"] = settings["eps"]
trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
assert all(name.endswith("lora_B") for name in trained)
trace = {name: [] for name in trained}
for step in range(settings["steps"]):
    for name, parameter in trained.items():
        parameter.grad = torch.from_numpy(given[f"{name}_gradients"][step])
    if settings["max_grad_norm"]:
        torch.nn.utils.clip_grad_norm_(trained.values(), settings["max_grad_norm"])
    optimizer.step()
    for name, parameter in trained.items():
        trace[name].append(parameter.detach().numpy().copy())
for name, parameter in parameters.items():
    assert name in trained or np.array_equal(parameter.detach().numpy(), start[name])
save(**{name: np.stack(values) for name, values in trace.items()})
