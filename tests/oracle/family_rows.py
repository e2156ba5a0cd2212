"""Random models of the configs given, saved as Hugging Face folders; f32 logits of rows of every kind, and gradients.

Of `tokens` [2, T], per config: the logits of row 0, of row 1 behind `padding` masked tokens, of each part of row 0 cut
at `cut`; the sum of -log p of each next token of both rows, and its gradient by the weight of every linear layer.
"""

import pathlib

import torch
from bridge import inputs, save
from random_models import random_model

given = inputs()
tokens = torch.from_numpy(given["tokens"]).long()
padding, cut = given["padding"], given["cut"]
torch.manual_seed(0)
found = {}


def logits(model, row, **kwargs):
    return model(row[None], **kwargs).logits[0]


for name, overrides in given["configs"].items():
    model = random_model(overrides)
    model.save_pretrained(pathlib.Path(given["folder"]) / name)
    mask = (torch.arange(tokens.shape[1]) >= padding)[None].long()
    # As in transformers' generation, positions count from the first real token. Rotations are relative, but a scale of
    # queries is not. Some rotations follow from the largest position, which is then smaller.
    counted = {} if name in given.get("by_length", []) else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        parts = [logits(model, tokens[0, :cut]), logits(model, tokens[0, cut:])]
        found[f"{name}/right"] = logits(model, tokens[0]).numpy()
        found[f"{name}/left"] = logits(model, tokens[1], attention_mask=mask, **counted)[padding:].numpy()
        found[f"{name}/packed"] = torch.cat(parts).numpy()
    log_p = torch.log_softmax(model(tokens).logits[:, :-1], dim=-1)
    nll = -log_p.gather(-1, tokens[:, 1:, None]).sum()
    nll.backward()
    found[f"{name}/nll"] = nll.detach().numpy()
    for module, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear) and ".layers." in module and linear.weight.grad is not None:
            found[f"{name}/gradient/{module}"] = linear.weight.grad.numpy()
save(**found)
