"""Losses of a mixture's routers in transformers, and gradients of the whole loss, in f32, on weights from the test.

Arrays `model/PARAMETER` fill the model of `config`. Of `tokens` [B, T] with `mask` (0: padding) and `labels` (-100: not
in the loss): the load-balancing loss, the router z-loss, and the gradient of

  (sum of -log p of labels) / (number of labels) + aux_coef load balancing + z_coef z-loss

by every matrix of the layers.
"""

import torch
import transformers
from bridge import inputs, save
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

given = inputs()
tokens, mask, labels = (torch.from_numpy(given[name]).long() for name in ("tokens", "mask", "labels"))
config = transformers.AutoConfig.for_model(**given["config"])
model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
model.load_state_dict(
    {key.removeprefix("model/"): torch.from_numpy(v) for key, v in given.items() if key.startswith("model/")}
)
result = model(tokens, attention_mask=mask, output_router_logits=True)
nll = torch.nn.functional.cross_entropy(result.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
experts, chosen = config.num_local_experts, config.num_experts_per_tok
balance = load_balancing_loss_func(result.router_logits, experts, chosen, mask)
# As transformers' router_z_loss_func of Switch: the mean over the tokens of all layers.
real = torch.cat([layer.reshape(-1, experts)[mask.flatten() > 0] for layer in result.router_logits])
z_loss = (torch.logsumexp(real, dim=-1) ** 2).mean()
(nll + given["aux_coef"] * balance + given["z_coef"] * z_loss).backward()
found = {"balance": balance.detach().numpy(), "z": z_loss.detach().numpy(), "nll": nll.detach().numpy()}
for name, parameter in model.named_parameters():
    if ".layers." in name and parameter.ndim > 1:
        found[f"gradient/{name}"] = parameter.grad.numpy()
save(**found)
