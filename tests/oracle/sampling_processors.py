"""Applies transformers' logits processors to logits: a repetition penalty, or temperature, top-k, top-p and min-p."""

import torch
from bridge import inputs, save
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

given = inputs()
logits = torch.from_numpy(given["logits"])
repetition = RepetitionPenaltyLogitsProcessor(given["repetition_penalty"])
results = {"repetition": repetition(torch.from_numpy(given["ids"]), logits).numpy()}
for name, (temperature, top_k, top_p, min_p) in given["settings"].items():
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    results[name] = torch.isfinite(scores).numpy()
save(**results)
