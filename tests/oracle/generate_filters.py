"""Applies transformers' logits processors to random logits: temperature, then top-k, then top-p."""

import torch
from bridge import inputs, save
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

given = inputs()
logits = torch.from_numpy(given["logits"])
results = {}
for name, (temperature, top_k, top_p) in given["settings"].items():
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    results[name] = torch.softmax(scores, dim=-1).numpy()
save(**results)
