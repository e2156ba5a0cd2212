"""Metadata of GGUF files: header, configuration, tokenizer, and errors."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qlora_jax.io.gguf.config_reader import llama3_factors
from qlora_jax.io.gguf.header import parse_header
from qlora_jax.io.open_model import open_model
from tests.io.tiny_models import TOKENS, random_weights, tiny_config, write_gguf

CONFIG = tiny_config()
WEIGHTS = random_weights(CONFIG)


def test_header_equals_the_gguf_package(tiny_gguf: Path) -> None:
    theirs, ours = gguf.GGUFReader(tiny_gguf), parse_header(tiny_gguf)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert fields.keys() == ours.metadata.keys()
    for key, value in fields.items():
        assert ours.metadata[key] == (pytest.approx(value) if isinstance(value, float) else value)
    assert [tensor.name for tensor in theirs.tensors] == [info.name for info in ours.tensors]
    assert [tensor.data_offset for tensor in theirs.tensors] == [info.offset for info in ours.tensors]


def test_every_metadata_type(tmp_path: Path) -> None:
    values = {
        "u8": ("add_uint8", 200),
        "i8": ("add_int8", -100),
        "u16": ("add_uint16", 60000),
        "i16": ("add_int16", -30000),
        "u32": ("add_uint32", 4_000_000_000),
        "i32": ("add_int32", -2_000_000_000),
        "f32": ("add_float32", 1e-6),
        "u64": ("add_uint64", 2**63),
        "i64": ("add_int64", -(2**62)),
        "f64": ("add_float64", 0.1),
        "bool": ("add_bool", True),
        "str": ("add_string", "naïve ☃"),
        "strs": ("add_array", ["", "é", "x"]),
        "ints": ("add_array", [1, -2, 3]),
        "floats": ("add_array", [0.1, 2.5]),
    }
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, (add, value) in values.items():
        getattr(writer, add)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = parse_header(tmp_path / "m.gguf").metadata
    assert metadata == {"general.architecture": "llama"} | {key: value for key, (_, value) in values.items()}


def test_config_is_that_of_hugging_face(tiny_gguf: Path) -> None:
    assert open_model(tiny_gguf).config == CONFIG


def test_tied_head_biases_and_a_long_head(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=32)
    weights = random_weights(config)
    extra = {"llama.attention.key_length": 32, "llama.attention.value_length": 32}
    source = open_model(write_gguf(tmp_path / "tiny.gguf", config, weights, extra=extra))
    assert source.config == config
    assert source.tensors.keys() == weights.keys()
    for name, entry in source.tensors.items():
        np.testing.assert_array_equal(entry.read(), weights[name])


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "type none": ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
    "factor 0": ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0}, None),
    "linear": (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"rope_type": "linear", "factor": 4.0},
    ),
    "old name": ({"llama.rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    "yarn": (
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 64,
            "llama.rope.scaling.finetuned": True,
            "llama.rope.scaling.yarn_beta_fast": 16.0,
        },
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 16.0,
            "beta_slow": 1.0,
        },
    ),
}


@pytest.mark.parametrize("case", SCALINGS)
def test_rope_scaling(tmp_path: Path, case: str) -> None:
    extra, expected = SCALINGS[case]
    assert open_model(write_gguf(tmp_path / "t.gguf", CONFIG, WEIGHTS, extra=extra)).config["rope_scaling"] == expected


def test_llama3_factors_become_parameters(tmp_path: Path) -> None:
    config = tiny_config(head_dim=64, rope_theta=500000.0)
    factors = llama3_factors(64, 500000.0, LLAMA3)
    path = write_gguf(
        tmp_path / "t.gguf", config, random_weights(config), tensors={"rope_freqs.weight": factors},
        extra={"llama.attention.key_length": 64, "llama.attention.value_length": 64},
    )  # fmt: skip
    source = open_model(path)
    assert source.config["rope_scaling"] == LLAMA3
    assert "rope_freqs.weight" not in source.tensors


@pytest.mark.parametrize("factors", [np.linspace(1, 8, 8, dtype=np.float32), np.full(4, 8, np.float32)])
def test_other_rotary_factors_are_refused(tmp_path: Path, factors: np.ndarray) -> None:
    path = write_gguf(tmp_path / "t.gguf", CONFIG, WEIGHTS, tensors={"rope_freqs.weight": factors})
    with pytest.raises(ValueError, match=r"rope_freqs.weight \[\d\] differs from Llama 3.1's scaling"):
        open_model(path)


def test_rotary_factors_of_one_scale_nothing(tmp_path: Path) -> None:
    ones = {"rope_freqs.weight": np.ones(8, np.float32)}
    assert open_model(write_gguf(tmp_path / "t.gguf", CONFIG, WEIGHTS, tensors=ones)).config["rope_scaling"] is None


def test_tokenizer(tmp_path: Path) -> None:
    extra = {
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.ggml.padding_token_id": 2**32 - 1,
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.add_space_prefix": False,
    }
    assert open_model(write_gguf(tmp_path / "t.gguf", CONFIG, WEIGHTS, extra=extra)).tokenizer == {
        "chat_template": "{{ messages }}",
        "template_name": f"{tmp_path / 't.gguf'}: tokenizer.chat_template",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": None,
        "unk_token": "<unk>",
        "add_bos_token": False,
        "stop_token_ids": [2, 5],
        "gguf": {
            "model": "gpt2",
            "pre": "smollm",
            "tokens": TOKENS,
            "token_type": [3, 3, 3] + [1] * 29,
            "merges": ["t 0", "t 1"],
            "scores": [],
            "add_space_prefix": False,
        },
    }


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"llama.expert_count": 8}, "llama.expert_used_count: missing"),
    "experts that are used": ({"llama.expert_used_count": 2}, "llama.expert_used_count: found 2, expected 0"),
    "unknown key": ({"llama.logit_scale": 2.0}, "llama.logit_scale: unknown key"),
    "partial rotary": ({"llama.attention.key_length": 32}, "llama.rope.dimension_count: found 16, expected 32"),
    "value length": ({"llama.attention.value_length": 8}, "llama.attention.value_length: found 8, expected 16"),
    "longrope": (
        {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0},
        "rope.scaling.type: found 'longrope', expected none, linear or yarn",
    ),
    "attention factor": ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor: found 1.5, expected 1.0"),
    "adapter": ({"general.type": "adapter"}, "general.type: found a LoRA adapter"),
    "split": ({"split.count": 3}, "one of 3 parts .* llama-gguf-split --merge"),
    "special id": (
        {"tokenizer.ggml.padding_token_id": 99},
        "ids outside the vocabulary of 32 tokens: .*padding_token_id = 99",
    ),
    "wrong type": ({"tokenizer.chat_template": 3}, "tokenizer.chat_template: found 3, expected text"),
    "fraction of a token": ({"tokenizer.ggml.eot_token_id": 1.5}, "eot_token_id: found 1.5, expected a whole number"),
    "odd alignment": ({"general.alignment": 24}, "general.alignment is 24, expected a power of two"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_metadata(tmp_path: Path, case: str) -> None:
    extra, message = REFUSED[case]
    path = write_gguf(tmp_path / "t.gguf", CONFIG, WEIGHTS, extra=extra)
    with pytest.raises(ValueError, match=message) as error:
        open_model(path)
    assert str(path) in str(error.value)


def test_all_metadata_problems_at_once(tmp_path: Path) -> None:
    extra = {"llama.logit_scale": 2.0, "llama.residual_scale": 1.0, "llama.expert_used_count": 8}
    with pytest.raises(ValueError, match=r"(?s)logit_scale.*residual_scale.*expert_used_count"):
        open_model(write_gguf(tmp_path / "t.gguf", CONFIG, WEIGHTS, extra=extra))


def _bare(tmp_path: Path, architecture: str) -> Path:
    writer = gguf.GGUFWriter(tmp_path / "bare.gguf", architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return tmp_path / "bare.gguf"


def test_other_architecture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"architecture is not supported \(found 'mamba', expected llama"):
        open_model(_bare(tmp_path, "mamba"))


def test_missing_metadata(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)llama.embedding_length: missing.*llama.context_length: missing"):
        open_model(_bare(tmp_path, "llama"))
