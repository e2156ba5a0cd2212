"""GGUF files from Hugging Face folders, in every architecture, equal the converter's and are read back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qlora_jax.data.tokenizer.tokenizer import load_tokenizer
from qlora_jax.io.export.gguf_metadata import ExportSpec, export_spec, with_stop_ids
from qlora_jax.io.gguf.header import parse_header
from qlora_jax.io.gguf.writer import GgufSpec, typed_keys, write_gguf
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import OpenedModel, open_pretrained
from qlora_jax.models.families import model_config
from qlora_jax.models.families.multimodal import text_only_name, with_text_attributes
from tests.io.gguf_families import FAMILIES, ONE_MORE, TEXT_HALVES, random_tensors, with_images, write_family
from tests.io.tiny_models import write_folder
from tests.io.tiny_tokenizers import CORPUS, byte_level, gemma, sentencepiece

VOCABULARY = 460
NAMED = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": "{{ messages }}"}
MISTRAL = FAMILIES["llama"][1] | dict(model_type="mistral", sliding_window=None)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = FAMILIES | {
    "mistral": ("llama", MISTRAL),
    "llama 3": (
        "llama",
        FAMILIES["llama"][1] | dict(rope_scaling=LLAMA3 | dict(original_max_position_embeddings=8192), head_dim=16),
    ),
    "gemma2, whole caps": ("gemma2", FAMILIES["gemma2"][1] | dict(attn_logit_softcapping=40, rope_theta=10000)),
    "qwen2, yarn": ("qwen2", FAMILIES["qwen2"][1] | dict(rope_scaling=YARN)),
}


def _folder(path: Path, config: dict[str, Any], tokenizer: str | None = None, size: int = VOCABULARY, **named: Any):
    """(a model in a folder, its tensors)."""
    config = with_text_attributes(config, {"vocab_size": size})
    tensors = random_tensors(config)
    files: dict[str, Any] = {
        "tokenizer.json": tokenizer or byte_level(),
        "tokenizer_config.json": json.dumps(NAMED | named),
    }
    return open_pretrained(model=str(write_folder(path, config, tensors, **files))), tensors


def _written(path: Path, opened: OpenedModel, tensors: dict[str, np.ndarray]) -> tuple[Path, list[str]]:
    spec, notes = export_spec(opened)
    write_gguf(path, spec, list(tensors), iter(tensors.values()), "float32")
    return path, notes


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_returns(tmp_path: Path, name: str) -> None:
    architecture, config = CONFIGS[name]
    opened, tensors = _folder(tmp_path / "model", config)
    path, _ = _written(tmp_path / "new.gguf", opened, tensors)
    read = open_model(path)
    found = model_config(read.config)
    assert found.linear_shapes() == opened.features.linear_shapes() and found.windows == opened.features.windows
    assert read.tensors.keys() == tensors.keys()
    rounding = 2.5e-7 if architecture in ONE_MORE else 0  # 1 is added and taken away
    for tensor, values in tensors.items():
        np.testing.assert_allclose(read.tensors[tensor].read(), values, rtol=0, atol=rounding, err_msg=tensor)
    again = load_tokenizer(read.tokenizer)
    assert again.encode_batch(CORPUS) == opened.tokenizer.encode_batch(CORPUS)
    assert (again.bos_id, again.eos_id, again.chat_template) == (1, 2, "{{ messages }}")


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_what_the_converter_writes(tmp_path: Path, name: str) -> None:
    """Every key of the architecture that the converter's form has, and every tensor under the gguf package's name."""
    architecture, config = FAMILIES[name]
    opened, tensors = _folder(tmp_path / "model", config)
    path, _ = _written(tmp_path / "new.gguf", opened, tensors)
    like = write_family(tmp_path / "like.gguf", architecture, opened.source.config, tensors)
    ours, its = (parse_header(each) for each in (path, like))
    keys = {key: value for key, value in its.metadata.items() if key.startswith(architecture)}
    lists = {key: keys.pop(key) for key in list(keys) if isinstance(keys[key], list)}
    assert {key: ours.metadata[key] for key in lists} == lists
    # 0 stands for absent.
    assert {key: ours.metadata.get(key, 0) for key in keys} == pytest.approx(keys)
    shapes = ({info.name: (info.shape, info.type) for info in header.tensors} for header in (ours, its))
    assert next(shapes) == next(shapes)
    read, expected = open_model(path), open_model(like)
    assert all(np.array_equal(read.tensors[t].read(), expected.tensors[t].read()) for t in expected.tensors)
    assert gguf.GGUFReader(path).fields["general.architecture"].contents() == architecture


LOST = {
    "llama": (
        dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)),
        ["rope = 5000 dynamic: a file would give 5000 default"],
    ),
    "qwen3": (dict(attention_bias=True), ["attn_output.bias: llama.cpp cannot load it in qwen3"]),
    "qwen2": (dict(head_dim=32), ["num_heads \\* head_dim: found 128, llama.cpp requires embed_dim = 64"]),
    "gemma2": (
        dict(query_pre_attn_scalar=100, attn_logit_softcapping=None, tie_word_embeddings=False),
        ["query_scale = 0.1: a file would give", "attention_softcap = None", "output.weight: llama.cpp cannot load it"],
    ),
    "smollm3": (
        dict(no_rope_layers=[0, 1]),
        [r"ropes = \(None, 5000 default\): a file would give \(\)"],
    ),
    "exaone4": (
        dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
        [r"windows = \(16, None\): a file would give \(\)"],
    ),
    "cohere2": (dict(attention_bias=True), ["attn_output.bias: llama.cpp cannot load it in cohere2"]),
    "ministral3": (
        dict(rope_scaling=FAMILIES["ministral3"][1]["rope_scaling"] | dict(mscale=0.5)),
        ["rope = 5000 yarn: a file would give 5000 yarn"],
    ),
    "olmo2": (dict(tie_word_embeddings=True), ["output.weight: llama.cpp requires it in olmo2"]),
    "gptneox": (dict(hidden_act="gelu_new"), ["activation = 'gelu_tanh': a file would give 'gelu'"]),
}


@pytest.mark.parametrize("name", LOST)
def test_what_a_file_can_not_say_is_refused_at_once(tmp_path: Path, name: str) -> None:
    changes, problems = LOST[name]
    opened, tensors = _folder(tmp_path / "model", CONFIGS[name][1] | changes)
    for problem in problems:
        with pytest.raises(ValueError, match=rf"(?s)cannot store this model.*{problem}"):
            _written(tmp_path / "new.gguf", opened, tensors)


WINDOWED = {
    "mistral": dict(sliding_window=16),
    "qwen2": dict(use_sliding_window=True, sliding_window=16, max_window_layers=1),
}


@pytest.mark.parametrize("name", WINDOWED)
def test_a_file_without_windows_says_the_context_within_which_they_hide_nothing(tmp_path: Path, name: str) -> None:
    opened, tensors = _folder(tmp_path / "model", CONFIGS[name][1] | WINDOWED[name])
    path, notes = _written(tmp_path / "new.gguf", opened, tensors)
    assert model_config(open_model(path).config).max_positions == 16
    assert any("its context is 16 tokens instead of 128" in note for note in notes)


TOKENIZERS = {
    "smollm": (byte_level, "gpt2", "smollm"),
    "gpt-2": (lambda: byte_level("gpt-2"), "gpt2", "gpt-2"),
    "olmo": (lambda: byte_level("gpt-2", normalizer="nfc"), "gpt2", "olmo"),
    "llama": (sentencepiece, "llama", "default"),
    "gemma": (lambda: sentencepiece(prefixed=False), "llama", "default"),
    "tekken": (lambda: byte_level("tekken"), "gpt2", "tekken"),
    "gemma3": (lambda: gemma(VOCABULARY), "llama", "default"),
}
NOTES = {"olmo": ["NFC"], "tekken": ["combining marks"], "gemma3": ["more than 31 spaces in a row"]}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_return(tmp_path: Path, name: str) -> None:
    make, model, pre = TOKENIZERS[name]
    named: dict[str, Any] = {} if model == "gpt2" else {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = FAMILIES[name if name in FAMILIES else "llama"][1]
    opened, tensors = _folder(tmp_path / "model", config, make(), **named)
    path, notes = _written(tmp_path / "new.gguf", opened, tensors)
    keys = parse_header(path).metadata
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == (model, pre)
    assert len(notes) == len(NOTES.get(name, []))
    assert all(said in note for said, note in zip(NOTES.get(name, []), notes, strict=True))
    assert len(keys["tokenizer.ggml.tokens"]) == VOCABULARY and keys["tokenizer.ggml.add_bos_token"] is False
    if model == "llama":
        assert keys["tokenizer.ggml.add_space_prefix"] is (name == "llama")
    again = load_tokenizer(open_model(path).tokenizer)
    texts = [*CORPUS, "a </s> b", "<|im_end|>\n<tool> <table>  two", "\U0001f600 unseen \u4e2d", f"a  b{' ' * 31}c"]
    assert again.encode_batch(texts) == opened.tokenizer.encode_batch(texts)
    assert again.special_tokens == opened.tokenizer.special_tokens


def test_tokenizers_that_a_file_can_not_hold_are_refused(tmp_path: Path) -> None:
    word_level = json.loads(byte_level()) | {
        "model": {"type": "WordLevel", "vocab": {"a": 0, "<u>": 1}, "unk_token": "<u>"}
    }
    word_level |= {"added_tokens": []}
    refused = {
        "no known value of tokenizer.ggml.pre": (byte_level("dots"), {}),
        "found WordLevel, expected BPE": (json.dumps(word_level), dict(bos_token=None, eos_token=None)),
    }
    for problem, (text, named) in refused.items():
        opened, tensors = _folder(tmp_path / "model", FAMILIES["llama"][1], text, **named)
        with pytest.raises(ValueError, match=problem):
            _written(tmp_path / "new.gguf", opened, tensors)


def test_what_is_read_otherwise_is_noted(tmp_path: Path) -> None:
    text = json.loads(byte_level())
    text["added_tokens"][2]["rstrip"] = True
    opened, tensors = _folder(tmp_path / "model", FAMILIES["phi3"][1], json.dumps(text))
    path, notes = _written(tmp_path / "new.gguf", dataclasses.replace(opened, stop_ids=[2, 0, 3, 4]), tensors)
    assert open_model(path).tokenizer["stop_token_ids"] == [2, 0, 3]
    assert "['<|im_end|>']" in notes[0] and "these are not listed: ['\"']" in notes[1] and "sliding window" in notes[2]


@pytest.mark.parametrize("strips", [False, True])
def test_the_name_says_whether_special_tokens_take_the_space_behind_them(tmp_path: Path, strips: bool) -> None:
    """llama.cpp strips spaces if the name contains "phi3", and then requires Phi-3's tokens."""
    text = json.loads(sentencepiece())
    text["added_tokens"][0]["rstrip"] = strips
    text["added_tokens"].append(
        text["added_tokens"][0] | {"id": len(text["model"]["vocab"]), "content": "<|endoftext|>"}
    )
    named: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    for folder, expected in {
        "mine": "phi-3 mine" if strips else "mine",
        "my-Phi3": "my-Phi3" if strips else None,
    }.items():
        opened, tensors = _folder(tmp_path / folder, FAMILIES["phi3"][1], json.dumps(text), **named)
        path, _ = _written(tmp_path / f"{folder}.gguf", opened, tensors)
        assert parse_header(path).metadata.get("general.name") == expected


@pytest.mark.parametrize(("name", "wrapper"), [("gemma3", "gemma3"), ("mistral", "mistral3")])
def test_a_text_half_gives_the_file_of_its_text_model(tmp_path: Path, name: str, wrapper: str) -> None:
    alone, tensors = _folder(tmp_path / "alone/model", CONFIGS[name][1])
    folder = tmp_path / "half/model"
    files: dict[str, Any] = {
        file: (tmp_path / "alone/model" / file).read_text() for file in ("tokenizer.json", "tokenizer_config.json")
    }
    weights = {f"language_model.{key}": tensor for key, tensor in tensors.items()}
    config = {"model_type": wrapper, "text_config": dict(alone.source.config)}
    write_folder(folder, config, weights | {"vision_tower.weight": np.ones(3, "f4")}, **files)
    half = open_pretrained(model=str(folder))
    names = {text_only_name(key): key for key in half.source.tensors}
    assert names.keys() == tensors.keys() != half.source.tensors.keys()
    expected, _ = _written(tmp_path / "alone.gguf", alone, tensors)
    found, _ = _written(tmp_path / "half.gguf", half, {names[key]: tensor for key, tensor in tensors.items()})
    assert found.read_bytes() == expected.read_bytes()


def _half_folder(path: Path, kind: str, **changes: Any) -> tuple[OpenedModel, dict[str, np.ndarray], dict[str, Any]]:
    """(a model of images and text in a folder, its text half's tensors, config of the text model)."""
    whole, text = with_images(kind)
    opened, tensors = _folder(path, whole | {"vision_config": {"deepstack_visual_indexes": [1, 2, 4]}} | changes)
    return opened, tensors, text | {"vocab_size": VOCABULARY}


@pytest.mark.parametrize("kind", TEXT_HALVES)
def test_a_text_half_with_three_positions_is_what_the_converter_writes(tmp_path: Path, kind: str) -> None:
    architecture, _, _, sections = TEXT_HALVES[kind]
    half, tensors, text = _half_folder(tmp_path / "model", kind)
    path, _ = _written(tmp_path / "half.gguf", half, tensors)
    alone = {text_only_name(name): values for name, values in tensors.items()}
    like = write_family(tmp_path / "like.gguf", architecture, text, alone, sections)
    ours, its = (parse_header(each) for each in (path, like))
    keys = {key: value for key, value in its.metadata.items() if key.startswith(architecture)}
    lists = {key: keys.pop(key) for key in list(keys) if isinstance(keys[key], list)}
    assert list(lists.values()) == [[*sections, 0]] == [ours.metadata[key] for key in lists]
    assert {key: ours.metadata.get(key, 0) for key in keys} == pytest.approx(keys)
    infos = ({info.name: info for info in header.tensors} for header in (ours, its))
    files = (np.fromfile(each, np.uint8) for each in (path, like))
    found, expected = (
        {name: (info.shape, file[info.offset :][: info.nbytes].tobytes()) for name, info in of_file.items()}
        for of_file, file in zip(infos, files, strict=True)
    )
    assert found == expected


def test_sections_that_a_file_needs_are_in_the_config(tmp_path: Path) -> None:
    rope = {"rope_scaling": {"rope_type": "default"}}
    half, tensors, _ = _half_folder(tmp_path / "model", "qwen3_vl")
    half.source.config["text_config"] |= rope
    with pytest.raises(ValueError, match=r"rope_scaling.mrope_section: missing .*--format hf"):
        _written(tmp_path / "half.gguf", half, tensors)


@pytest.mark.parametrize(
    ("vision", "problem"),
    [
        (None, "vision_config: found None, expected an object"),
        ({"deepstack_visual_indexes": 3}, "vision_config.deepstack_visual_indexes: found 3, expected a list"),
    ],
)
def test_a_damaged_vision_config_is_an_error_with_its_key(tmp_path: Path, vision: object, problem: str) -> None:
    half, tensors, _ = _half_folder(tmp_path / "model", "qwen3_vl", vision_config=vision)
    with pytest.raises(ValueError, match=problem):
        _written(tmp_path / "half.gguf", half, tensors)


def test_ids_that_end_a_reply_get_the_keys_that_a_file_does_not_use() -> None:
    def spec_of(**ids: int) -> GgufSpec:
        return GgufSpec("llama", typed_keys({f"tokenizer.ggml.{key}_token_id": ids[key] for key in ids}), {}, {})

    def ids_of(found: ExportSpec) -> dict[str, object]:
        return {
            key.name.removeprefix("tokenizer.ggml.").removesuffix("_token_id"): key.value for key in found.spec.keys
        }

    assert ids_of(with_stop_ids(spec_of(eos=9, eom=8), [])) == dict(eos=9, eom=8)
    assert ids_of(with_stop_ids(spec_of(eos=9, eom=8), [5])) == dict(eos=9, eom=8, eot=5)
    full = with_stop_ids(spec_of(eos=1, eot=2, eom=3), [5])
    assert ids_of(full) == dict(eos=1, eot=2, eom=3)
    assert full.notes == ["a GGUF file can list 3 tokens that end a reply, so the ids [5] are not listed"]
