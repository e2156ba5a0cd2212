"""The layers that an adapter's settings target are those to which peft gives an adapter."""

import json
from pathlib import Path

import pytest

from qlora_jax.io.peft.reader import read_adapter
from qlora_jax.io.peft.writer import in_peft_format, write_adapter
from qlora_jax.methods.peft_names import layers_of, targeted_layers
from qlora_jax.models.families import model_config
from tests.io.peft.test_reader import ARGS, MODEL, random_lora
from tests.io.tiny_models import tiny_config

ORACLE = Path(__file__).parent.parent / "oracle/peft_targets.py"
LAYERS = 12  # so that one number begins with another one
PROJECTIONS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
CONFIGS = [
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": ["q_proj", "mlp.down_proj"], "layers_to_transform": [1, 3, 11]},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["1.self_attn.q_proj", "v_proj"], "layers_to_transform": [1, 2]},
    {"target_modules": ["model.layers.2.mlp.down_proj", "q_proj"], "layers_to_transform": [0]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"], "layers_to_transform": [0, 5]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["3.self_attn.q_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": r"model\.layers\.(1|10)\..*", "layers_to_transform": [1, 2, 10]},
    {"target_modules": r".*\.[0-4]\..*(q_proj|down_proj)", "exclude_modules": ["2.mlp.down_proj"]},
]


@pytest.mark.slow
def test_peft_targets_the_same_layers(oracle):
    names = {one: [f"model.layers.{layer}.{one}" for layer in range(LAYERS)] for one in PROJECTIONS}
    flat = [name for of_projection in names.values() for name in of_projection]
    found = json.loads(str(oracle(ORACLE, names=flat, configs=CONFIGS)["found"]))
    for config, theirs in zip(CONFIGS, found, strict=True):
        for of_projection in names.values():
            expected = [layer for layer, name in enumerate(of_projection) if name in theirs]
            if expected:  # a projection without any adapter has no tensors to read
                assert layers_of(config, dict(enumerate(of_projection))) == expected, config
        assert theirs


def test_layers_that_are_excluded_by_name_may_lack_tensors(tmp_path):
    """PEFT applies target_modules, exclude_modules and layers_to_transform together."""
    lora = random_lora()
    config, tensors = in_peft_format(lora, ARGS, MODEL, "a/base")
    tensors = {name: value for name, value in tensors.items() if "layers.1.self_attn" not in name}
    write_adapter(tmp_path, tensors, config | {"exclude_modules": ["1.self_attn.q_proj"]})
    read = read_adapter(tmp_path, MODEL)
    assert read.lora["model.layers.self_attn.q_proj"]["lora_a"].shape == (1, 64, 4)
    assert read.lora["model.layers.mlp.down_proj"]["lora_a"].shape == (2, 128, 2)
    write_adapter(tmp_path, tensors, config)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.lora_A\.weight: missing"):
        read_adapter(tmp_path, MODEL)


def test_tensors_of_a_projection_that_is_excluded_are_unexpected(tmp_path):
    lora = random_lora()
    config, tensors = in_peft_format(lora, ARGS, MODEL, "a/base")
    write_adapter(tmp_path, tensors, config | {"exclude_modules": ["q_proj"]})
    with pytest.raises(ValueError, match="they target no layer of the model"):
        read_adapter(tmp_path, MODEL)


def test_settings_that_cannot_be_read_leave_all_layers():
    model = model_config(tiny_config())
    for target in (3, None, "(a", [["q_proj"]], ["qkv"]):
        assert targeted_layers({"target_modules": target, "exclude_modules": 7}, model) == {}
