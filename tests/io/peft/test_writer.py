"""The PEFT adapter's tensors and settings; tests/parity/test_peft.py has peft itself load them."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.config import LoraArgs
from qlora_jax.io.export.peft import notes_for_readers
from qlora_jax.io.peft.writer import in_peft_format, write_adapter
from qlora_jax.methods.peft_names import target_suffixes
from qlora_jax.models.families import model_config
from tests.io.tiny_models import tiny_config

MODEL = model_config(tiny_config())
LINEARS = [f"model.layers.self_attn.{name}_proj" for name in "qkvo"] + ["model.layers.mlp.up_proj"]


def _lora(ranks: dict[str, int], layers: int = 2) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {
        name: {
            "lora_a": rng.normal(size=(layers, 12, rank)).astype(np.float32),
            "lora_b": rng.normal(size=(layers, rank, 8)).astype(np.float32),
        }
        for name, rank in ranks.items()
    }


def test_tensors_are_transposed_and_named_by_layer() -> None:
    lora = _lora({LINEARS[0]: 3, LINEARS[4]: 2})
    tensors = in_peft_format(lora, LoraArgs(rank=3, rank_pattern={"up_proj": 2}), MODEL, "base")[1]
    assert len(tensors) == 2 * 2 * 2
    for layer in range(2):
        a = tensors[f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight"]
        b = tensors[f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_B.weight"]
        np.testing.assert_array_equal(a, lora[LINEARS[0]]["lora_a"][layer].T, strict=True)
        np.testing.assert_array_equal(b, lora[LINEARS[4]]["lora_b"][layer].T, strict=True)
        assert a.flags.c_contiguous and b.flags.c_contiguous


def test_config() -> None:
    args = LoraArgs(rank=3, alpha=16.0, dropout=0.05, rank_pattern={"up_proj": 2}, alpha_pattern={"k_proj": 2.5})
    config = in_peft_format(_lora({LINEARS[0]: 3, LINEARS[4]: 2}), args, MODEL, "some/base")[0]
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "inference_mode": True,
        "r": 3,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {"k_proj": 2.5},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def test_rslora_is_written_as_an_alpha() -> None:
    args = LoraArgs(rank=4, alpha=6.0, use_rslora=True, rank_pattern={"up_proj": 9}, alpha_pattern={"k_proj": 5.0})
    config = in_peft_format(_lora({LINEARS[0]: 4, LINEARS[1]: 4, LINEARS[4]: 9}), args, MODEL, "some/base")[0]
    assert (config["use_rslora"], config["lora_alpha"]) == (False, 12)  # 6 / sqrt(4) = 12 / 4
    assert config["alpha_pattern"] == {"k_proj": 10, "up_proj": 18}  # 5 / sqrt(4) = 10 / 4, 6 / sqrt(9) = 18 / 9


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        (dict(r=64), ["vLLM requires --max-lora-rank 64"]),
        (dict(r=65), ["vLLM requires --max-lora-rank 128"]),
        (dict(r=600), ["vLLM supports ranks up to 512, and this adapter has 600"]),
        (dict(rank_pattern={"up_proj": 24}), ["vLLM requires --max-lora-rank 32", "vLLM ignores rank_pattern"]),
        (
            dict(modules_to_save=["lm_head"]),
            ["vLLM and llama.cpp cannot read an adapter that trains more than LoRA (lm"],
        ),
        (
            dict(modules_to_save=["score"], task_type="SEQ_CLS"),
            [
                "vLLM and llama.cpp cannot read an adapter that trains more than LoRA (score): merge it into a model "
                "for vLLM: --format hf"
            ],
        ),
        (
            dict(trainable_token_indices={"embed_tokens": [3]}),
            ["vLLM and llama.cpp cannot read an adapter that trains more"],
        ),
        (dict(rank_pattern={"up_proj": 2}), ["vLLM ignores rank_pattern"]),
        (dict(alpha_pattern={"up_proj": 2}), ["vLLM ignores alpha_pattern", "llama.cpp ignores alpha_pattern"]),
        (dict(use_dora=True), ["vLLM and llama.cpp cannot read DoRA"]),
        (dict(peft_type="IA3"), ["vLLM and llama.cpp cannot read (IA)^3"]),
        (dict(peft_type="VERA"), ["vLLM and llama.cpp cannot read VeRA"]),
    ],
)
def test_readers_that_would_get_it_wrong_are_named(changes: dict, told: list[str]) -> None:
    plain = dict(peft_type="LORA", use_dora=False, r=16, rank_pattern={}, alpha_pattern={}, modules_to_save=None)
    notes = notes_for_readers(plain | changes)
    assert len(notes) == len(told) and all(note.startswith(part) for note, part in zip(notes, told, strict=True))


def test_ranks_that_do_not_fit_the_settings() -> None:
    with pytest.raises(ValueError, match=r"model.layers.mlp.up_proj has rank 2, expected 3"):
        in_peft_format(_lora({LINEARS[0]: 3, LINEARS[4]: 2}), LoraArgs(rank=3), MODEL, "base")


def test_suffixes_never_reach_a_module_without_adapter() -> None:
    linears = ["model.layers.attn.dense", "model.layers.mlp.dense", "model.layers.mlp.up"]
    assert target_suffixes(linears, linears) == ["dense", "up"]
    assert target_suffixes([linears[0], linears[2]], linears) == ["attn.dense", "up"]


def test_files(tmp_path: Path) -> None:
    lora = _lora({LINEARS[0]: 3})
    config, tensors = in_peft_format(lora, LoraArgs(rank=3), MODEL, "some/base")
    write_adapter(tmp_path, tensors, config)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
    }
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == config
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == tensors.keys()
    assert "from_pretrained('some/base')" in (tmp_path / "README.md").read_text()


def test_readme_over_a_gguf_file(tmp_path: Path) -> None:
    lora = _lora({LINEARS[0]: 3})
    config, tensors = in_peft_format(lora, LoraArgs(rank=3), MODEL, "a/model.gguf")
    write_adapter(tmp_path, tensors, config)
    text = (tmp_path / "README.md").read_text()
    assert "base model `a/model.gguf`" in text
    assert "from_pretrained('the same model as a Hugging Face folder')" in text
