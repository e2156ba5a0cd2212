"""The tokenizer: lossless text, exported special tokens, and the words of each error."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer, with_chat_template


def test_decode_inverts_encode(tokenizer: Tokenizer):
    # SmolLM2's vocabulary lacks the bytes of some control characters, and of planes 4 to 15.
    @given(st.text(st.characters(codec="utf-8", max_codepoint=0x3FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d")))
    def check(text: str):
        assert tokenizer.decode(tokenizer.encode(text)) == text

    check()


def test_bos_is_exported_but_never_added_by_encode(smollm2_source: dict, smollm2_metadata: dict):
    source = {**smollm2_source, "gguf": smollm2_metadata, "add_bos_token": True}
    del source["tokenizer_json"]
    tokenizer = load_tokenizer(source)
    assert tokenizer.encode("Hi") == load_tokenizer(smollm2_source).encode("Hi")
    assert json.loads(tokenizer.to_json())["post_processor"]["type"] == "TemplateProcessing"


def test_settings_of_tokenizer_json_that_change_lengths_are_off(smollm2_source: dict):
    whole = json.loads(smollm2_source["tokenizer_json"])
    whole["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    whole["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    tokenizer = load_tokenizer({**smollm2_source, "tokenizer_json": json.dumps(whole)})
    (encoding,) = tokenizer.encode_spans(["one two three four five six"])
    assert len(encoding.ids) == 6
    assert encoding.offsets[1] == (3, 7)  # the space belongs to its token


def test_sources_that_can_not_be_right_are_refused(smollm2_source: dict):
    with pytest.raises(ValueError, match="eos_token '<nope>'"):
        load_tokenizer({**smollm2_source, "eos_token": "<nope>"})
    with pytest.raises(ValueError, match=r"special tokens that are not in its vocabulary: pad_token '\\ud800'"):
        load_tokenizer({**smollm2_source, "pad_token": "\ud800"})
    with pytest.raises(ValueError, match=r"tokenizer\.json can't be read"):
        load_tokenizer({"tokenizer_json": '{"model": '})
    with pytest.raises(ValueError, match="expected 'tokenizer_json' or 'gguf'"):
        load_tokenizer({"chat_template": None})


def test_a_template_file_replaces_the_models_own(tokenizer: Tokenizer, tmp_path: Path):
    (tmp_path / "own.jinja").write_text("\ufeff{{ messages[0].content }}", encoding="utf-8")
    assert with_chat_template(tokenizer, tmp_path / "own.jinja").render([{"role": "user", "content": "Hi"}]) == "Hi"
    with pytest.raises(ValueError, match=r"none\.jinja: the chat template can't be read"):
        with_chat_template(tokenizer, tmp_path / "none.jinja")
