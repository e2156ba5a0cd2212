"""Tokenizers and templates that the data tests share."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.io.tiny_tokenizers import sentencepiece

ASSETS = Path(__file__).parent / "assets"

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# No generation prompt: the model writes the answer's leading space.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('only user and assistant') }}{% endif %}"
    "{% endfor %}"
)
# With generation marks, loop controls, trimmed blocks, a namespace, tojson and macros, like newer templates.
MODERN = """{%- macro header(role) %}{{ '<|im_start|>' ~ role ~ '\n' }}{% endmacro %}
{%- set seen = namespace(users=0) %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}
        {%- continue %}
    {%- endif %}
    {%- if message.role == 'user' %}{% set seen.users = seen.users + 1 %}{% endif %}
    {%- if message.role == 'assistant' %}
        {{- header('assistant') }}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
    {%- else %}
        {{- header(message.role) + message.content + (message.meta | tojson if message.meta else '') + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif %}"""
# Only the last answer has an empty reasoning block. The generation prompt lacks it, so the model writes it.
THINKING = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
    {{- message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# Zephyr's: eos ends every turn, and a newline follows it.
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def smollm2_json() -> str:
    """The text of SmolLM2's tokenizer.json."""
    return gzip.decompress((ASSETS / "smollm2_tokenizer.json.gz").read_bytes()).decode()


@pytest.fixture(scope="session")
def smollm2_template() -> str:
    """SmolLM2's chat template."""
    return (ASSETS / "smollm2_chat_template.jinja").read_text()


@pytest.fixture(scope="session")
def templates(smollm2_template: str) -> dict[str, str]:
    """Chat templates by name."""
    return {"smollm2": smollm2_template, "llama3": LLAMA3, "mistral": MISTRAL, "modern": MODERN, "thinking": THINKING}


@pytest.fixture(scope="session")
def smollm2_source(smollm2_json: str, smollm2_template: str) -> dict[str, Any]:
    """The source that a reader of SmolLM2's folder returns. pad is eos."""
    return {
        "tokenizer_json": smollm2_json,
        "chat_template": smollm2_template,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "add_bos_token": False,
    }


@pytest.fixture(scope="session")
def tokenizer(smollm2_source: dict[str, Any]) -> Tokenizer:
    """SmolLM2's tokenizer with its chat template."""
    return load_tokenizer(smollm2_source)


@pytest.fixture(scope="session")
def plain_tokenizer(smollm2_source: dict[str, Any]) -> Tokenizer:
    """SmolLM2's tokenizer without a chat template, like that of a base model."""
    return load_tokenizer({**smollm2_source, "chat_template": None})


def sentencepiece_tokenizer(prefix: str) -> Tokenizer:
    """A SentencePiece tokenizer that adds a space "never" (Gemma), "first" in a text, or "every" time (Llama 2)."""
    whole = json.loads(sentencepiece(prefixed=prefix == "every"))
    if prefix == "first":  # newer versions of transformers write Llama's and Mistral's like this
        metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
        whole |= {"normalizer": None, "pre_tokenizer": metaspace}
        whole["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    return load_tokenizer({"tokenizer_json": json.dumps(whole), "chat_template": ZEPHYR, **named})


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2_json: str) -> dict[str, Any]:
    """The GGUF metadata of SmolLM2's tokenizer, made from its tokenizer.json."""
    whole = json.loads(smollm2_json)
    vocabulary, special = whole["model"]["vocab"], {token["id"] for token in whole["added_tokens"]}
    return {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": sorted(vocabulary, key=vocabulary.get),
        "token_type": [3 if index in special else 1 for index in range(len(vocabulary))],
        "merges": [" ".join(pair) for pair in whole["model"]["merges"]],
        "add_space_prefix": False,
    }


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """`write_rows(rows, name)`: writes a JSON Lines file and returns its path."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
