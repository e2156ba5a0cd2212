"""Random models of the configs given, saved as folders, then with more tokens: f32 logits, and gradients of their rows.

The new rows of embedding and head are `rows` and `head_rows`, and their biases the mean of the others. Of `tokens`:
logits, the sum of -log p of each next token, and its gradient by the new rows of each table.
"""

import pathlib

import torch
from bridge import inputs, save
from random_models import random_model

given = inputs()
tokens = torch.from_numpy(given["tokens"]).long()
rows, head_rows = (torch.from_numpy(given[name]) for name in ("rows", "head_rows"))
torch.manual_seed(0)
found = {}
for name, overrides in given["configs"].items():
    model = random_model(overrides)
    model.save_pretrained(pathlib.Path(given["folder"]) / name)
    before = overrides["vocab_size"]
    model.resize_token_embeddings(before + len(rows), mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight.data_ptr() == head.weight.data_ptr()
    with torch.no_grad():
        head.weight[before:] = head_rows
        embedding.weight[before:] = rows
        if head.bias is not None:
            head.bias[before:] = head.bias[:before].mean()
    logits = model(tokens).logits
    nll = -torch.log_softmax(logits[:, :-1], dim=-1).gather(-1, tokens[:, 1:, None]).sum()
    nll.backward()
    found[f"{name}/logits"], found[f"{name}/nll"] = logits.detach().numpy(), nll.detach().numpy()
    found[f"{name}/embedding"] = embedding.weight.grad[before:].numpy()
    if not tied:
        found[f"{name}/head"] = head.weight.grad[before:].numpy()
save(**found)
