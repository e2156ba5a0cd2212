"""Ids that transformers' own tokenizers of GGUF `pre` kinds give, over the vocabulary of a tokenizer.json."""

import json
from pathlib import Path

import numpy as np
from bridge import inputs, save
from tokenizers import Regex, pre_tokenizers
from transformers import CohereTokenizer, GPT2Tokenizer, GPTNeoXTokenizer, Qwen2Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

given = inputs()
model = json.loads(Path(given["tokenizer_json"]).read_text(encoding="utf-8"))["model"]
# Their constructors add the class's own end token; one of the vocabulary is named, so that ids stay.
special = {name: "<|endoftext|>" for name in ("unk_token", "bos_token", "eos_token", "pad_token")}
merges = [tuple(pair) for pair in model["merges"]]
found = {}
for pre in given["pres"]:
    kind = {"qwen2": Qwen2Tokenizer, "olmo": GPTNeoXTokenizer, "command-r": CohereTokenizer}.get(pre, GPT2Tokenizer)
    tokenizer = kind(vocab=model["vocab"], merges=merges, **special).backend_tokenizer
    if pre in GGUF_PRE_TOKENIZER_SPLITS and pre != "qwen2":  # qwen2's class splits that way already
        split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in given["strings"]]
    found[f"{pre}/ids"] = np.array([token for row in ids for token in row])
    found[f"{pre}/lengths"] = np.array([len(row) for row in ids])
save(**found)
