"""Chat templates against transformers, and the errors of templates that break the rules."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.data.tokenizer.chat_template import Rendering, render
from qlora_jax.data.tokenizer.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[3]

USER, ASSISTANT = {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "  4, of course.\n"}
CONVERSATIONS = (
    [USER],
    [USER, ASSISTANT],
    [USER, ASSISTANT, {"role": "user", "content": "Sûr? 👍🏽"}, {"role": "assistant", "content": "Oui\n\n    5"}],
    [{"role": "user", "content": "", "name": None}, {"role": "assistant", "content": "<|im_end|> & <b> \"q\" 'a'"}],
)
WITH_SYSTEM = [{"role": "system", "content": "Be brief.", "meta": {"a": [1, "é<"]}}, USER, ASSISTANT]


def test_text_and_ids_equal_transformers(oracle: Callable, tmp_path: Path, smollm2_source: dict, templates: dict):
    path = tmp_path / "tokenizer.json"
    path.write_text(smollm2_source["tokenizer_json"], encoding="utf-8")
    special = {name: smollm2_source[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    cases: list[tuple[str, list[dict[str, Any]], bool]] = [
        (template, messages, prompt)
        for name, template in templates.items()
        for messages in (*CONVERSATIONS, *([WITH_SYSTEM] if name != "mistral" else []))
        for prompt in (False, True)
    ]
    script = ROOT / "tests/oracle/tokenizer_chat.py"
    results = oracle(script, tokenizer_json=str(path), special_tokens=special, cases=cases)
    for (template, messages, prompt), theirs in zip(cases, json.loads(str(results["results"])), strict=True):
        tokenizer = load_tokenizer({**smollm2_source, "chat_template": template})
        text = tokenizer.render(messages, add_generation_prompt=prompt)
        assert {"text": text, "ids": tokenizer.encode(text)} == theirs


def test_default_system_message(smollm2_template: str):
    assert render(smollm2_template, Rendering([USER], add_generation_prompt=True), {}) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for %}", "does not parse: line 1"),
        ("{% break %}", "does not parse: 'break' outside loop"),
        ("{{ 'a'.index('z') }}", r"rejects a conversation with roles \['user'\]: substring not found"),
        ("{{ 'abc'.encode().decode('utf-16') }}", "rejects a conversation"),
        ("{% for n in range(10 ** 9) %}x{% endfor %}", "rejects a conversation.*Range too big"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "rejects a conversation.*recursion"),
        ("{{ raise_exception('roles must alternate') }}", r"roles \['user'\]: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "rejects a conversation"),
        ("{{ messages[3].content }}", "rejects a conversation"),
        # The sandbox: a template reaches neither Python's own objects nor the messages.
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "rejects a conversation"),
        ("{{ messages.append(1) }}", "rejects a conversation"),
        ("{{ messages.__init__.__globals__ }}", "rejects a conversation"),
    ],
)
def test_bad_templates_are_told(template: str, told: str):
    with pytest.raises(ValueError, match=told):
        render(template, Rendering([USER]), {})


def test_no_template_is_told(plain_tokenizer):
    with pytest.raises(ValueError, match=r"no chat template\. Set data\.chat_template"):
        plain_tokenizer.render([USER])
