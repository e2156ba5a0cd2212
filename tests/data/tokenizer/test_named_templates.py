"""Templates by name: the texts of llama.cpp's own, the turns that are learned, and tokens that a vocabulary lacks."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from qlora_jax.config.fields import TEMPLATE_CHOICES
from qlora_jax.data.encoder import encode_rows
from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.readers.files import Place, Row
from qlora_jax.data.tokenizer.chat_template import TOKENS
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, with_chat_template

ROOT = Path(__file__).parents[3]
TURNS = [
    {"role": "user", "content": " What is 2 + 2? "},
    {"role": "assistant", "content": "4, of course.\n"},
    {"role": "user", "content": "Sûr? 👍🏽 <|im_end|>"},
    {"role": "assistant", "content": "Oui\n\n    5"},
]
SYSTEM = {"role": "system", "content": " Be brief.\n"}
CONVERSATIONS = (TURNS[:1], TURNS, TURNS[:3], [SYSTEM, *TURNS[:1]], [SYSTEM, *TURNS])


def base_model(tokenizer: Tokenizer, *tokens: str) -> Tokenizer:
    """The tokenizer of a base model that has these tokens."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([*tokens, "<|begin|>"])
    special = {"eos_token": "<|endoftext|>", "bos_token": "<|begin|>"}
    return dataclasses.replace(tokenizer, backend=backend, chat_template=None, special_tokens=special)


def named(tokenizer: Tokenizer, name: str) -> Tokenizer:
    return with_chat_template(base_model(tokenizer, *TOKENS[name]), name)


def test_texts_are_those_of_llama_cpp(tokenizer: Tokenizer, llama_cpp: Callable):
    cases = [(name, messages, prompt) for name in TOKENS for messages in CONVERSATIONS for prompt in (False, True)]
    found = llama_cpp(ROOT / "tests/oracle/llama_cpp_templates.py", cases=cases)
    for (name, messages, prompt), theirs in zip(cases, json.loads(str(found["texts"])), strict=True):
        text = named(tokenizer, name).render(messages, add_generation_prompt=prompt)
        assert text.removeprefix("<|begin|>") == theirs, (name, messages)


@pytest.mark.parametrize("name", TOKENS)
def test_answers_and_the_ends_of_their_turns_are_learned(tokenizer: Tokenizer, name: str):
    chat = named(tokenizer, name)
    (row,) = encode_rows("x.jsonl", [Row(Place(1, 0), {"messages": [SYSTEM, *TURNS]})], FORMATS["messages"], chat)
    end = {"chatml": "<|im_end|>", "gemma": "<end_of_turn>", "llama3": "<|eot_id|>", "zephyr": "<|endoftext|>"}[name]
    first = "4, of course." if name in ("gemma", "llama3") else "4, of course.\n"  # these two trim
    learned = chat.backend.decode(row.ids[row.supervised].tolist(), skip_special_tokens=False)
    assert learned == f"{first}{end}Oui\n\n    5{end}"


def test_tokens_that_the_vocabulary_lacks_are_named(tokenizer: Tokenizer):
    for name in set(TOKENS) - {"zephyr", "chatml"}:
        lacking = r".*".join(map(repr, TOKENS[name])).replace("'", "").replace("|", r"\|")
        with pytest.raises(ValueError, match=rf"chat_template: {name} needs tokens .*{lacking}.*new_special_tokens"):
            with_chat_template(tokenizer, name)
    with pytest.raises(ValueError, match=r"zephyr ends turns with eos \(found no eos_token\)"):
        with_chat_template(dataclasses.replace(tokenizer, special_tokens={}), "zephyr")
    with pytest.raises(ValueError, match=r"llama-3: the chat template can't be read.*or zephyr"):
        with_chat_template(tokenizer, "llama-3")


def test_the_help_names_all():
    assert all(name in TEMPLATE_CHOICES for name in TOKENS)
