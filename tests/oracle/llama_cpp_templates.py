"""Texts of llama.cpp's named chat templates: {cases: [(name, messages, add_generation_prompt)]}."""

import ctypes
import json

import llama_cpp
import numpy as np
from bridge import inputs, save


def render(name: str, messages: list[dict[str, str]], prompt: bool) -> str:
    pairs = [(message["role"].encode(), message["content"].encode()) for message in messages]
    chat = (llama_cpp.llama_chat_message * len(pairs))(*(llama_cpp.llama_chat_message(*pair) for pair in pairs))
    text = ctypes.create_string_buffer(1 << 16)
    size = llama_cpp.llama_chat_apply_template(name.encode(), chat, len(pairs), prompt, text, len(text))
    return text.raw[:size].decode()


save(texts=np.array(json.dumps([render(*case) for case in inputs()["cases"]])))
