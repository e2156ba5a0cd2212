"""Random models of the configs given, saved as Hugging Face folders; their f32 logits."""

import pathlib

import torch
from bridge import inputs, save
from random_models import random_model

given = inputs()
torch.manual_seed(0)
logits = {}
for name, overrides in given["configs"].items():
    model = random_model(overrides)
    with torch.no_grad():
        model.save_pretrained(pathlib.Path(given["folder"]) / name)
        logits[name] = model(torch.from_numpy(given["tokens"]).long()).logits.numpy()
save(**logits)
