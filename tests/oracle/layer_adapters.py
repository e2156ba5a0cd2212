"""Logits and gradients of BitFit and bottleneck adapters in plain torch, over models of transformers.

`cases`: {name: {"folder": model, "modules": {"self_attn": "relu"}}}; without modules, the biases of the model train. A
bottleneck's parameters are arrays NAME/MODULE/LEAF, one per layer, in torch's orientation. Logits are on `tokens`,
gradients those of sum(logits * `cotangent`).
"""

import torch
from bridge import inputs, save
from transformers import AutoModelForCausalLM

ACTIVATIONS = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}
ATTENTION = {"gpt_neox": "attention"}  # else self_attn
HEADS = ("lm_head.", "embed_out.")


class Bottleneck(torch.nn.Module):
    """x + up(act(down(x)))."""

    def __init__(self, parameters: dict[str, torch.Tensor], activation: str):
        super().__init__()
        for leaf, values in parameters.items():
            self.register_parameter(leaf, torch.nn.Parameter(values))
        self.activation = ACTIVATIONS[activation]

    def forward(self, x):
        """Returns x with the adapter's change."""
        inner = self.activation(torch.nn.functional.linear(x, self.down, self.down_bias))
        return x + torch.nn.functional.linear(inner, self.up, self.up_bias)


def attach(module: torch.nn.Module, adapter: Bottleneck) -> None:
    """Sends the module's result through the adapter; attention returns a tuple."""

    def changed(_, __, output):
        return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)

    module.register_forward_hook(changed)


def adapters_of(model, name: str, modules: dict[str, str]) -> dict[str, torch.nn.Parameter]:
    """Adds the case's adapters to every layer, and returns their parameters by MODULE/LAYER/LEAF."""
    trained = {}
    for module, activation in modules.items():
        prefix = f"{name}/{module}/"
        leaves = {key.removeprefix(prefix): values for key, values in given.items() if key.startswith(prefix)}
        theirs = ATTENTION.get(model.config.model_type, module) if module == "self_attn" else module
        for index, layer in enumerate(model.base_model.layers):
            adapter = Bottleneck({leaf: torch.from_numpy(v[index]).clone() for leaf, v in leaves.items()}, activation)
            attach(getattr(layer, theirs), adapter)
            trained |= {f"{module}/{index}/{leaf}": parameter for leaf, parameter in adapter.named_parameters()}
    return trained


given = inputs()
tokens, cotangent = torch.from_numpy(given["tokens"]).long(), torch.from_numpy(given["cotangent"])
found = {}
for name, case in given["cases"].items():
    model = AutoModelForCausalLM.from_pretrained(case["folder"], attn_implementation="eager").requires_grad_(False)
    if "modules" in case:
        trained = adapters_of(model, name, case["modules"])
    else:
        biases = {key: value for key, value in model.named_parameters() if key.endswith(".bias")}
        trained = {key: value.requires_grad_() for key, value in biases.items() if not key.startswith(HEADS)}
    logits = model(tokens).logits
    (logits * cotangent).sum().backward()
    found[f"{name}/logits"] = logits.detach().numpy()
    found |= {f"{name}/grad/{key}": parameter.grad.numpy() for key, parameter in trained.items()}
save(**found)
