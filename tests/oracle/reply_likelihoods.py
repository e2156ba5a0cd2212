"""Likelihoods of replies in torch, from a GGUF file: `pairs` of a question and its reply; `template`."""

import numpy as np
import torch
from bridge import inputs, save
from transformers import AutoModelForCausalLM, AutoTokenizer

given = inputs()
torch.set_num_threads(1)
path, _, file = given["gguf"].rpartition("/")
model = AutoModelForCausalLM.from_pretrained(path, gguf_file=file, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=file)

nll, counts, hits = [], [], []
for question, reply in given["pairs"]:
    asked = [{"role": "user", "content": question}]
    how = {"chat_template": given["template"], "add_generation_prompt": True, "tokenize": False}
    prompt = tokenizer.apply_chat_template(asked, **how)
    before, ids = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, prompt + reply))
    assert ids[: len(before)] == before
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0, len(before) - 1 : -1].double().log_softmax(-1)
    targets = torch.tensor(ids[len(before) :])
    nll.append(-float(log_p[range(len(targets)), targets].sum()))
    counts.append(len(targets))
    right = log_p.argmax(-1) == targets
    hits.append([bool(right[:-1].all()), bool(right.all())])
save(nll=np.array(nll), counts=np.array(counts), begins=np.array(hits)[:, 0], exact=np.array(hits)[:, 1])
