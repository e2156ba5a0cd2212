"""Reads the tokenizer's files of a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.data.tokenizer.tokenizer import load_tokenizer
from qlora_jax.io.hf.tokenizer import read_tokenizer


def _write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}{'' if '.' in name else '.json'}").write_text(text)
    return folder


TOKENIZER = {"model": {"type": "BPE"}, "post_processor": None}


def test_everything_in_tokenizer_config(tmp_path: Path) -> None:
    config = {
        "bos_token": {"content": "<s>", "special": True},
        "eos_token": "</s>",
        "pad_token": None,
        "add_bos_token": True,
        "chat_template": "{{ messages }}",
    }
    folder = _write(tmp_path, tokenizer_config=config, tokenizer=TOKENIZER, generation_config={"eos_token_id": 2})
    assert read_tokenizer(folder) == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": None,
        "unk_token": None,
        "add_bos_token": True,
        "chat_template": "{{ messages }}",
        "template_name": str(folder / "tokenizer_config.json"),
        "stop_token_ids": [2],
        "tokenizer_json": json.dumps(TOKENIZER),
        "tokenizer_name": str(folder / "tokenizer.json"),
    }


def test_other_files_fill_in(tmp_path: Path) -> None:
    folder = _write(
        tmp_path,
        tokenizer_config={"eos_token": "<eos>", "chat_template": "old"},
        special_tokens_map={"eos_token": "ignored", "unk_token": {"content": "<unk>"}},
        generation_config={"eos_token_id": [7, 9]},
        tokenizer=TOKENIZER,
        **{"chat_template.jinja": "new"},
    )
    tokenizer = read_tokenizer(folder)
    assert (tokenizer["eos_token"], tokenizer["unk_token"], tokenizer["bos_token"]) == ("<eos>", "<unk>", None)
    assert (tokenizer["chat_template"], tokenizer["stop_token_ids"]) == ("new", [7, 9])
    assert tokenizer["template_name"] == str(folder / "chat_template.jinja")


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert read_tokenizer(_write(tmp_path, tokenizer_config={"chat_template": named}))["chat_template"] == "b"
    with pytest.raises(ValueError, match=r"chat_template has no template 'default' \(found \['tool_use'\]\)"):
        read_tokenizer(_write(tmp_path, tokenizer_config={"chat_template": named[:1]}))


def _template(*first: dict[str, Any]) -> dict[str, Any]:
    return {"type": "TemplateProcessing", "single": [*first, {"Sequence": {"id": "A", "type_id": 0}}]}


BOS = {"SpecialToken": {"id": "<s>", "type_id": 0}}


@pytest.mark.parametrize(
    ("processor", "bos", "adds"),
    [
        (None, "<s>", False),
        ({"type": "ByteLevel"}, "<s>", False),
        (_template(BOS), "<s>", True),
        (_template(BOS), "<other>", False),
        (_template(BOS), None, False),
        (_template(), "<s>", False),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, _template(BOS)]}, "<s>", True),
    ],
)
def test_bos_as_the_post_processor_says(tmp_path: Path, processor: Any, bos: str | None, adds: bool) -> None:
    folder = _write(tmp_path, tokenizer_config={"bos_token": bos}, tokenizer={"post_processor": processor})
    assert read_tokenizer(folder)["add_bos_token"] is adds


def test_no_tokenizer_files(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tmp_path)
    assert "tokenizer_json" not in tokenizer
    assert tokenizer["add_bos_token"] is False
    with pytest.raises(ValueError, match=r"tokenizer.json is missing. Copy it"):
        load_tokenizer(tokenizer)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(
        ValueError, match=r"tokenizer.json is missing \(found the slow .* tokenizer.model\).*save_pretr"
    ):
        load_tokenizer(read_tokenizer(tmp_path))


def test_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer_config.json, line 1, column 2"):
        read_tokenizer(_write(tmp_path, tokenizer_config="{"))
    (tmp_path / "tokenizer_config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"tokenizer_config.json: not UTF-8 text at byte 7"):
        read_tokenizer(tmp_path)


def test_a_prefix_that_would_end_the_process_is_refused(tmp_path: Path) -> None:
    """tokenizers 0.23 aborts where it cuts a prefix of one byte off a token that begins with two."""
    model = {"type": "BPE", "vocab": {"a": 0, "\u00e9": 1, "a\u00e9": 2}, "continuing_subword_prefix": "#"}
    for merges in ([["a", "\u00e9"]], ["a \u00e9"]):
        with pytest.raises(ValueError, match=r"tokenizer.json: model.continuing_subword_prefix: merges whose second"):
            read_tokenizer(_write(tmp_path, tokenizer={"model": {**model, "merges": merges}}))
    for merges in ([["a"]], [3], [["a", 1]]):
        with pytest.raises(ValueError, match=r"tokenizer.json: model.merges: 0"):
            read_tokenizer(_write(tmp_path, tokenizer={"model": {**model, "merges": merges}}))
    sound = {
        "type": "BPE",
        "vocab": {"a": 0, "#b": 1, "ab": 2},
        "continuing_subword_prefix": "#",
        "merges": [["a", "#b"]],
    }
    tokenizer = load_tokenizer(read_tokenizer(_write(tmp_path, tokenizer={"model": sound})))
    assert tokenizer.backend.encode("ab").ids == [2]


def test_ids_that_the_library_would_count_up_to_are_refused(tmp_path: Path) -> None:
    vocabulary = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 2**31}, "unk_token": "a"}}
    with pytest.raises(ValueError, match=rf"tokenizer.json: model.vocab: an id is too large \(found {2**31}"):
        read_tokenizer(_write(tmp_path, tokenizer=vocabulary))
    with pytest.raises(ValueError, match=rf"tokenizer.json: added_tokens.0.id: found {2**31}, expected at most"):
        read_tokenizer(_write(tmp_path, tokenizer={"added_tokens": [{"id": 2**31, "content": "x"}]}))
