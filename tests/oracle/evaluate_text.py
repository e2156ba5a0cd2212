"""Perplexity in overlapping windows and questions by letter, written for torch alone, from a GGUF file and texts.

`text`: perplexity as transformers' documentation computes it, but each token weighed once. `questions`: prompts; the
logits of " A", " B", " C", " D" after each.
"""

import math

import torch
from bridge import inputs, save
from transformers import AutoModelForCausalLM, AutoTokenizer

given = inputs()
torch.set_num_threads(1)
path, _, file = given["gguf"].rpartition("/")
model = AutoModelForCausalLM.from_pretrained(path, gguf_file=file, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=file)

ids = torch.tensor(tokenizer(given["text"], add_special_tokens=False).input_ids)[: given["max_tokens"]]
nll, count, seen = 0.0, 0, 0
for begin in range(0, len(ids), given["stride"]):
    end = min(begin + given["window"], len(ids))
    with torch.no_grad():
        log_p = model(ids[None, begin:end]).logits[0].double().log_softmax(-1)
    for place in range(max(seen, begin + 1), end):
        nll, count = nll - float(log_p[place - begin - 1, ids[place]]), count + 1
    seen = end
    if end == len(ids):
        break

letters = [tokenizer(f" {letter}", add_special_tokens=False).input_ids for letter in "ABCD"]
assert all(len(letter) == 1 for letter in letters)
logits = []
for question in given["questions"]:
    with torch.no_grad():
        after = model(torch.tensor([tokenizer(question, add_special_tokens=False).input_ids])).logits[0, -1]
    logits.append(after[[letter[0] for letter in letters]])
save(perplexity=math.exp(nll / count), count=count, logits=torch.stack(logits).numpy())
