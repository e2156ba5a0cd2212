"""PEFT adapters of text halves: settings that spare the tower, and names of older versions of transformers."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.config import LoraArgs
from qlora_jax.io.peft.reader import read_adapter
from qlora_jax.io.peft.writer import in_peft_format, write_adapter
from qlora_jax.models.families import model_config
from qlora_jax.regex import matches_whole
from tests.io.peft.test_reader import random_lora
from tests.io.tiny_models import tiny_config

MODEL = model_config({"model_type": "llava", "text_config": tiny_config()})
ARGS = LoraArgs(rank=4, alpha=8.0, target_modules=["down_proj", "q_proj"], rank_pattern={"down_proj": 2})
TOWER, TEXT = "model.vision_tower.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lora = {MODEL.hugging_face_name(name): leaves for name, leaves in random_lora().items()}
    config, tensors = in_peft_format(lora, ARGS, MODEL, "a/base")
    write_adapter(tmp_path, tensors, config)
    return tmp_path


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_names_of_both_generations_are_read(folder: Path, prefix: str) -> None:
    path, start = folder / "adapter_model.safetensors", "base_model.model."
    tensors = load_file(path)
    assert all(name.startswith(f"{start}model.language_model.layers.") for name in tensors)
    save_file({name.replace("model.language_model.", prefix, 1): tensor for name, tensor in tensors.items()}, path)
    adapter = read_adapter(folder, MODEL)
    assert adapter.args == ARGS
    for name, leaves in random_lora().items():
        for leaf, values in leaves.items():
            np.testing.assert_array_equal(adapter.lora[name][leaf], values, strict=True)


def test_the_tower_is_no_target() -> None:
    lora = {TEXT.replace(".0", ""): random_lora()["model.layers.self_attn.q_proj"]}
    excluded = in_peft_format(lora, LoraArgs(rank=4, target_modules=["q_proj"]), MODEL, "base")[0]["exclude_modules"]
    assert matches_whole(excluded, TOWER) and not matches_whole(excluded, TEXT)
    norms = {"model.language_model.norm": {"gain": np.ones((1, 64), "f4")}}
    assert "exclude_modules" in in_peft_format(norms, LoraArgs(method="ln_tuning"), MODEL, "base")[0]
    vera = {TEXT.replace(".0", ""): {"lambda_b": np.ones((2, 64), "f4"), "lambda_d": np.ones((2, 4), "f4")}}
    named = in_peft_format(vera, LoraArgs(method="vera", rank=4), MODEL, "base")[0]["target_modules"]
    assert matches_whole(named, TEXT) and not matches_whole(named, TOWER)
