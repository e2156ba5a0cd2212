"""Tests 4-bit folders of mixtures: modules that stay in 16 bits, and layers that predict further tokens."""

import json
from pathlib import Path

import pytest

from qlora_jax.io.hf.model_writer import write_config
from qlora_jax.io.hf.quantized_folder import write_quantized_folder
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.model_source import ModelSource
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from tests.io.gguf_families import MIXTURES, random_tensors
from tests.io.tiny_models import write_folder

WEIGHTS = WeightFormat(dtype="float32")
# transformers' names of modules of sparse layers that are linear layers there in version 4 and stay in 16 bits.
IN_16_BITS = {
    "mixtral": ("block_sparse_moe.gate", "block_sparse_moe.experts.3.w1", "mlp.gate", "mlp.experts"),
    "qwen2moe": ("mlp.gate", "mlp.experts.3.gate_proj", "mlp.shared_expert_gate"),
    "qwen3moe": ("mlp.gate", "mlp.experts.3.gate_proj"),
    "olmoe": ("mlp.gate", "mlp.experts.3.gate_proj"),
    "glm4moe": ("mlp.gate", "mlp.experts.3.gate_proj"),
}


def _written(folder: Path, source: ModelSource) -> ModelSource:
    folder.mkdir()
    write_quantized_folder(folder, source, WEIGHTS, lambda *_: None)
    return open_model(folder)


def _is_skipped(module: str, skipped: list[str]) -> bool:
    """Returns what transformers 4 and 5 agree on for full names: the module or one that contains it is listed."""
    return any(module == name or module.startswith(f"{name}.") for name in skipped)


@pytest.mark.parametrize("name", IN_16_BITS)
def test_routers_and_experts_are_named(tmp_path: Path, name: str) -> None:
    config = MIXTURES[name][1]
    source = _written(tmp_path / "nf4", open_model(write_folder(tmp_path / "dense", config, random_tensors(config))))
    skipped = source.config["quantization_config"]["llm_int8_skip_modules"]
    last = config["num_hidden_layers"] - 1
    assert all(_is_skipped(f"model.layers.{last}.{module}", skipped) for module in IN_16_BITS[name])
    codes = [key.removesuffix(".weight") for key, entry in source.tensors.items() if entry.read_quantized]
    assert len(codes) >= 8 and not any(_is_skipped(module, skipped) for module in codes)
    # Version 5 also compares ends of names.
    assert not any(module.endswith(entry) for module in codes for entry in skipped)


def test_layers_for_further_tokens_are_not_announced(tmp_path: Path) -> None:
    config = MIXTURES["glm4moe"][1] | {"num_nextn_predict_layers": 1}
    tensors = random_tensors(config | {"num_hidden_layers": 4})
    source = open_model(write_folder(tmp_path / "dense", config, tensors))
    assert source.not_loaded.startswith("model.layers.3 (")
    again = _written(tmp_path / "nf4", source)
    assert again.config["num_nextn_predict_layers"] == 0 and not again.not_loaded
    load_model(again, model_config(again.config), WEIGHTS)
    write_config(tmp_path, source.config, {})
    assert json.loads((tmp_path / "config.json").read_text()) == config | {"num_nextn_predict_layers": 0}
