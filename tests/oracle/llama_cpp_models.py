"""Runs GGUF files in llama.cpp: for each case (model, lora, rows, texts, prompts) logits, ids and replies.

`scored` rows give the sum of -log p of the tokens after the first, for vocabularies whose logits are too large.
Attention's cache is kept in f32, so that files in f32 are computed in f32.
"""

import json

import llama_cpp
import numpy as np
from bridge import inputs, save

F32 = 0  # GGML_TYPE_F32


def logits(model: llama_cpp.Llama, rows: list[list[int]]) -> np.ndarray:
    found = []
    for row in rows:
        model.reset()
        model.eval(row)
        found.append(model.scores[: len(row)].copy())
    return np.stack(found)


def loss(model: llama_cpp.Llama, row: list[int]) -> float:
    model.reset()
    model.eval(row)
    scores = model.scores[: len(row) - 1]
    top = scores.max(-1, keepdims=True)
    log_sum = np.log(np.exp(scores - top).sum(-1, dtype=np.float64)) + top[:, 0]
    return float((log_sum - scores[np.arange(len(row) - 1), row[1:]]).sum())


def reply(model: llama_cpp.Llama, ids: list[int], count: int) -> list[int]:
    model.reset()
    tokens = model.generate(ids, temp=0.0)
    return [next(tokens) for _ in range(count)]


given = inputs()
found = {}
for name, case in given["cases"].items():
    scored = case.get("scored", [])
    longest = max([64, *(len(row) + given["new_tokens"] for row in case["rows"] + case["prompts"] + scored)])
    model = llama_cpp.Llama(
        case["model"],
        lora_path=case["lora"],
        n_ctx=longest,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=F32,
        type_v=F32,
        flash_attn=False,
        verbose=False,
    )
    if case["rows"]:
        found[f"{name}/logits"] = logits(model, case["rows"])
    found[f"{name}/losses"] = np.array([loss(model, row) for row in scored])
    ids = [model.tokenize(text.encode(), add_bos=False, special=True) for text in case["texts"]]
    replies = [reply(model, prompt, given["new_tokens"]) for prompt in case["prompts"]]
    found[f"{name}/ids"] = np.array(json.dumps({"texts": ids, "replies": replies}))
    found[f"{name}/special"] = np.array([model.token_bos(), model.token_eos()])
    del model
save(**found)
