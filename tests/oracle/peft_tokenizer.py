"""Ids and rendered chat of the tokenizer that transformers loads from `folder`, for `texts` and `messages`."""

import json

import numpy as np
from bridge import inputs, save
from transformers import AutoTokenizer

given = inputs()
tokenizer = AutoTokenizer.from_pretrained(given["folder"])
ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in given["texts"]]
chat = tokenizer.apply_chat_template(given["messages"], tokenize=False, add_generation_prompt=True)
special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
save(json=np.array(json.dumps({"ids": ids, "chat": chat, "special": special})))
