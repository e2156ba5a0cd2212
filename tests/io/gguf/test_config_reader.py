"""Keys of published GGUF files, read from metadata alone."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_jax.io.gguf.config_reader import architecture_of, config_from_metadata
from qlora_jax.models.families import model_config
from qlora_jax.untrusted_json import JsonObject

SIZES = {
    "block_count": 4,
    "context_length": 512,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "vocab_size": 32,
}
EXPERTS = {"expert_count": 4, "expert_used_count": 2}
QWEN3_MOE = EXPERTS | {"expert_feed_forward_length": 32}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 64}
ATTENTION_FACTORS = "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"
USUAL = 0.1 * math.log(8) + 1  # 1.2079441541679836 in OLMo 3's published configs


def _config(architecture: str, keys: dict[str, Any]) -> JsonObject:
    """Reads the config of a file with SIZES and these keys, which have the architecture's prefix in it."""
    prefixed = {f"{architecture}.{key}": value for key, value in (SIZES | keys).items()}
    metadata = {"general.architecture": architecture, **prefixed}
    found = architecture_of(Path("t.gguf"), metadata)
    return config_from_metadata(Path("t.gguf"), found, metadata, frozenset(), {})


@pytest.mark.parametrize("key", ATTENTION_FACTORS)
def test_yarns_usual_attention_factor_is_read(key: str) -> None:
    """Files have it in f32; the config that they were made from has f64."""
    window = {"attention.sliding_window": 16}
    config = _config("olmo2", YARN | window | {key: float(np.float32(USUAL))})
    scaling = config["rope_parameters"]["full_attention"]
    assert scaling["attention_factor"] == USUAL == 1.2079441541679836
    without, with_one = (_config("olmo2", YARN | window | keys) for keys in ({}, {key: 1.0}))
    assert with_one == without and "attention_factor" not in without["rope_parameters"]["full_attention"]


@pytest.mark.parametrize("key", ATTENTION_FACTORS)
def test_other_attention_factors_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key}: found 1.5, expected 1.0 or 1.207944, yarn's for factor 8.0"):
        _config("olmo2", YARN | {key: 1.5})
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    for unscaled in ({}, linear, YARN | {"rope.scaling.factor": 1.0}):
        with pytest.raises(ValueError, match=rf"{key}: found 1.2\d+, expected 1.0 \(or longrope's factors\)"):
            _config("olmo2", unscaled | {key: USUAL})


# Keys that published files have and that change nothing: {architecture: (keys of its file, the neutral ones)}.
NEUTRAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3moe": (
        QWEN3_MOE,
        {"expert_gating_func": 1, "expert_weights_norm": True, "expert_shared_feed_forward_length": 0},
    ),
    "llama": (EXPERTS, {"expert_feed_forward_length": 96}),
    "olmoe": (EXPERTS, {"expert_feed_forward_length": 96}),
}
OTHERS = {
    "expert_gating_func": 2,
    "expert_weights_norm": False,
    "expert_shared_feed_forward_length": 32,
    "expert_feed_forward_length": 48,
}


@pytest.mark.parametrize("architecture", NEUTRAL)
def test_neutral_keys_are_accepted_with_their_value_alone(architecture: str) -> None:
    required, neutral = NEUTRAL[architecture]
    assert _config(architecture, required | neutral) == _config(architecture, required)
    for key, value in neutral.items():
        with pytest.raises(ValueError, match=rf"{architecture}.{key}: found {OTHERS[key]}, expected {value}"):
            _config(architecture, required | {key: OTHERS[key]})


def test_keys_of_gemma3s_image_tower_are_ignored() -> None:
    tower = {"mm.tokens_per_image": 256, "vision.block_count": 27, "vision.image_size": 896}
    assert _config("gemma3", tower) == _config("gemma3", {})
    with pytest.raises(ValueError, match=r"gemma2.vision.block_count: unknown key"):
        _config("gemma2", tower)


def test_too_many_layers_are_refused_before_lists_are_made() -> None:
    with pytest.raises(ValueError, match=r"olmo2.block_count: found 2147483647, expected at most 4096"):
        _config("olmo2", {"block_count": 2**31 - 1, "attention.sliding_window": 16})


def test_configs_of_these_keys_have_features() -> None:
    for architecture, (required, _) in NEUTRAL.items():
        experts = model_config(_config(architecture, required)).experts
        assert experts is not None and experts.count == 4
