"""Renders conversations with transformers' apply_chat_template: texts and ids, by template name."""

import json

import numpy as np
from bridge import inputs, save
from transformers import PreTrainedTokenizerFast

given = inputs()
tokenizer = PreTrainedTokenizerFast(tokenizer_file=given["tokenizer_json"], **given["special_tokens"])


def applied(template: str, messages: list[dict], prompt: bool) -> dict:
    options = {"chat_template": template, "add_generation_prompt": prompt}
    return {
        "text": tokenizer.apply_chat_template(messages, tokenize=False, **options),
        "ids": tokenizer.apply_chat_template(messages, return_dict=False, **options),
    }


results = [applied(template, messages, prompt) for template, messages, prompt in given["cases"]]
save(results=np.array(json.dumps(results)))
