"""Runs on bases that are read in special ways resume to the bit: a text half of experts, and experts in MXFP4."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.project import TEMPLATE, byte_tokenizer_json, project
from tests.e2e.tiny_runs import arrays_at, numbers, run, stop_and_resume
from tests.io.gguf_families import FAMILIES, random_tensors
from tests.io.tiny_models import write_folder
from tests.marks import first_slow

TOKENS = dict(vocab_size=258, max_position_embeddings=256, bos_token_id=256, eos_token_id=257)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "chat_template": TEMPLATE}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TOWER = {"model.visual.patch_embed.proj.weight": np.ones((2, 3), np.float32)}
Config = dict[str, Any]
Tensors = dict[str, np.ndarray]


def _wrapped() -> tuple[Config, Tensors]:
    """Returns Qwen3-VL-MoE with its vision tower."""
    text = FAMILIES["qwen3moe"][1] | TOKENS | dict(model_type="qwen3_vl_moe_text")
    config = {"model_type": "qwen3_vl_moe", "text_config": text, "tie_word_embeddings": False}
    return config, random_tensors(config) | TOWER


def mxfp4_gpt_oss() -> tuple[Config, Tensors]:
    """Returns gpt-oss with random codes of experts."""
    config = FAMILIES["gptoss"][1] | TOKENS | {"quantization_config": {"quant_method": "mxfp4"}}
    tensors = random_tensors(config)
    rng, experts = np.random.default_rng(0), config["num_local_experts"]
    found = {name: values for name, values in tensors.items() if ".experts." not in name}
    width, inner = config["hidden_size"], config["intermediate_size"]
    for layer in range(config["num_hidden_layers"]):
        for part, n, k in (("gate_up_proj", 2 * inner, width), ("down_proj", width, inner)):
            stem = f"model.layers.{layer}.mlp.experts.{part}"
            found[f"{stem}_blocks"] = rng.integers(0, 256, (experts, n, k // 32, 16), np.uint8)
            found[f"{stem}_scales"] = rng.integers(119, 123, (experts, n, k // 32), np.uint8)
            found[f"{stem}_bias"] = rng.normal(size=(experts, n)).astype(np.float32)
    return config, found


BASES = {"a wrapped mixture": (_wrapped, {}), "experts in MXFP4": (mxfp4_gpt_oss, {"quant_type": "stored"})}


@pytest.mark.parametrize("name", first_slow(list(BASES)))
def test_four_steps_are_two_and_two(tmp_path: Path, monkeypatch, name: str) -> None:
    make, settings = BASES[name]
    config, tensors = make()
    files = {"tokenizer.json": byte_tokenizer_json(), "tokenizer_config.json": json.dumps(SPECIAL)}
    model = write_folder(tmp_path / "model", config, tensors, **files)
    whole = project(
        tmp_path / "whole",
        model={"path": str(model), **settings},
        lora=dict(dropout=0.0, target_modules=["q_proj"], target_parameters=EXPERTS),
        data=dict(eval_fraction=0.0, buckets=1),
        train=dict(steps=4, accumulation=1, eval_every=0),
    )
    assert run(whole)
    again = dataclasses.replace(whole, output=str(tmp_path / "again"))
    stop_and_resume(again, 2, monkeypatch)
    assert numbers(again) == numbers(whole)
    for resumed, uninterrupted in zip(arrays_at(again, 4), arrays_at(whole, 4), strict=True):
        np.testing.assert_array_equal(resumed, uninterrupted)
