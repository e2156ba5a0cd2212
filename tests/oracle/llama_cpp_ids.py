"""Ids that llama.cpp gives the texts of each file, of which it reads the vocabulary alone: {name: {file, texts}}."""

import json

import llama_cpp
import numpy as np
from bridge import inputs, save

found = {}
for name, case in inputs()["cases"].items():
    model = llama_cpp.Llama(case["file"], vocab_only=True, verbose=False)
    ids = [model.tokenize(text.encode(), add_bos=False, special=True) for text in case["texts"]]
    found[name] = np.array(json.dumps(ids))
    del model
save(**found)
