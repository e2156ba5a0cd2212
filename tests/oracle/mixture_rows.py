"""Logits, losses and gradients of mixtures of experts in transformers, in f32, on weights that the test gives.

`configs`: {name: config}; arrays NAME/PARAMETER fill the model. Of `tokens` [2, T], per config: the logits of row 0, of
row 1 behind `padding` masked tokens, of each part of row 0 cut at `cut`; the sum of -log p of each next token of both
rows, and its gradient by every matrix of the layers; the load-balancing loss of both rows with that padding masked.
"""

import torch
import transformers
from bridge import inputs, save

given = inputs()
tokens = torch.from_numpy(given["tokens"]).long()
padding, cut = given["padding"], given["cut"]
found = {}


def model_of(name: str, config: dict) -> torch.nn.Module:
    built = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(built, attn_implementation="eager").eval().float()
    prefix = f"{name}/"
    arrays = {key.removeprefix(prefix): torch.from_numpy(v) for key, v in given.items() if key.startswith(prefix)}
    model.load_state_dict(arrays, strict=True)
    return model


def logits(model, row, **kwargs):
    return model(row[None], **kwargs).logits[0]


for name, config in given["configs"].items():
    model = model_of(name, config)
    mask = torch.ones_like(tokens)
    mask[1, :padding] = 0
    with torch.no_grad():
        parts = [logits(model, tokens[0, :cut]), logits(model, tokens[0, cut:])]
        found[f"{name}/right"] = logits(model, tokens[0]).numpy()
        found[f"{name}/left"] = logits(model, tokens[1], attention_mask=mask[1:])[padding:].numpy()
        found[f"{name}/packed"] = torch.cat(parts).numpy()
        if hasattr(model, "router_aux_loss_coef"):
            both = model(tokens, attention_mask=mask, output_router_logits=True)
            found[f"{name}/balance"] = both.aux_loss.numpy()
    log_p = torch.log_softmax(model(tokens).logits[:, :-1], dim=-1)
    nll = -log_p.gather(-1, tokens[:, 1:, None]).sum()
    nll.backward()
    found[f"{name}/nll"] = nll.detach().numpy()
    for key, parameter in model.named_parameters():
        if ".layers." in key and parameter.ndim > 1:
            found[f"{name}/gradient/{key}"] = parameter.grad.numpy()
save(**found)
