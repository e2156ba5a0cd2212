"""Translates a model's features to GGUF metadata, the inverse of config_reader.

Features that GGUF cannot store are found by reading the metadata back: they come back different.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np

from qlora_jax.io.gguf.architectures import DEEPSTACK, LONGROPE_FACTORS, PATTERN, ROPE_FACTORS, SECTIONS, Architecture
from qlora_jax.io.gguf.config_reader import F32, FLOATS, YARN_ATTENTION_FACTOR, llama3_factors, yarn_attention_factor
from qlora_jax.models.config import ExpertsConfig, ModelConfig, config_differences
from qlora_jax.models.families.mrope import sections_of
from qlora_jax.models.families.multimodal import text_config
from qlora_jax.nn.rope import SCALINGS, Rope
from qlora_jax.untrusted_json import JsonObject, check_value

# transformers' default of the layers of Qwen3-VL's vision tower whose features the first layers of the text half add.
DEEPSTACK_LAYERS = (8, 16, 24)
Tables = dict[str, np.ndarray]
GEMMA3_PATTERN = 6  # llama.cpp's default without the key: every sixth layer has no window


class _VisionConfig(TypedDict, total=False):
    deepstack_visual_indexes: list[int]


class _WholeConfig(TypedDict, total=False):
    """The keys of a model of images and text that its text half's file depends on."""

    vision_config: _VisionConfig


def config_metadata(features: ModelConfig, architecture: Architecture) -> tuple[JsonObject, Tables]:
    """Returns (values by key with the architecture's prefix, tensors of rotary factors) of a model.

    Features without a key are skipped; `features_lost` finds them.
    """
    f = features
    scaling, tables = SCALED[f.rope.scaling.kind](f.rope)
    keys = {
        "context_length": f.max_positions,
        "embedding_length": f.embed_dim,
        "block_count": f.num_layers,
        "feed_forward_length": f.mlp_dim,
        "attention.head_count": f.num_heads,
        "attention.head_count_kv": f.num_kv_heads,
        "attention.key_length": f.head_dim,
        "attention.value_length": f.head_dim,
        "rope.dimension_count": f.rope.dim,
        "rope.freq_base": f.rope.theta,
        "vocab_size": f.vocab_size,
        **{key: f.norm_eps for key in architecture.eps},
        **architecture.only,
        **_optional(architecture, f),
        **scaling,
    }
    used = {name: table for name, table in tables.items() if name in architecture.rope_tables}
    typed = {
        key: float(value) if key in FLOATS else value for key, value in keys.items()
    }  # a config.json may contain 50 for 50.0
    return {f"{architecture.name}.{key}": value for key, value in typed.items()}, used


def image_metadata(path: Path, config: JsonObject, architecture: Architecture) -> JsonObject:
    """Returns the keys of a text half that matter only to images; llama.cpp needs them to load the file.

    Args:
      config: the config of the whole model.

    Raises:
      ValueError: the config lacks them, or has values of other types.
    """
    if not architecture.sections:
        return {}
    sections = sections_of(text_config(config))
    if sections is None:
        raise ValueError(
            f"{path}: rope_scaling.mrope_section: missing (expected three numbers, without which llama.cpp cannot load "
            f"{architecture.name}). Export with --format hf"
        )
    keys: JsonObject = {SECTIONS: [*sections, 0]}
    if DEEPSTACK in architecture.ignored:
        vision = check_value(config, _WholeConfig, path).get("vision_config", {})
        keys[DEEPSTACK] = len(vision.get("deepstack_visual_indexes", DEEPSTACK_LAYERS))
    return {f"{architecture.name}.{key}": value for key, value in keys.items()}


def _optional(architecture: Architecture, features: ModelConfig) -> JsonObject:
    """The values of keys that only some architectures have."""
    further = {key: names[0] for key, names in architecture.rope_attributes.items()}
    attributes = {**architecture.required, **architecture.attributes, **architecture.query_scale, **further}
    values: JsonObject = {key: _value(key, name, features) for key, name in attributes.items()}
    if architecture.window_period and features.windows:
        values[PATTERN] = [window is not None for window in features.windows]
    return {key: value for key, value in values.items() if value is not None}


def _value(key: str, attribute: str, features: ModelConfig) -> int | float | bool | None:
    if key in OF_EXPERTS:
        return None if features.experts is None else OF_EXPERTS[key](features.experts)
    return OPTIONAL[attribute](features)


def features_lost(features: ModelConfig, read: ModelConfig) -> list[str]:
    """Describes the differences between a model's features and those that were read back from its metadata."""
    return [f"{name} = {ours}: a file would give {theirs}" for name, ours, theirs in config_differences(features, read)]


def tensors_misplaced(architecture: Architecture, names: Iterable[str]) -> list[str]:
    """Describes tensors that llama.cpp cannot load in an architecture, and required tensors that are missing."""
    parts = {name.split(".", 2)[-1] if name.startswith("blk.") else name for name in names}
    return [
        f"{part}: llama.cpp cannot load it in {architecture.name}" for part in architecture.never if part in parts
    ] + [f"{part}: llama.cpp requires it in {architecture.name}" for part in architecture.always if part not in parts]


def _window(features: ModelConfig) -> int | None:
    return next((window for window in features.windows if window is not None), None)


def _pattern(features: ModelConfig) -> int | None:
    slides = [window is not None for window in features.windows]
    patterns = (GEMMA3_PATTERN, *range(1, len(slides) + 2))
    return next((p for p in patterns if slides == [bool((layer + 1) % p) for layer in range(len(slides))]), None)


def _local_theta(features: ModelConfig) -> float | None:
    ropes = zip(features.ropes, features.windows, strict=False)
    return next((rope.theta for rope, window in ropes if rope is not None and window is not None), None)


def _log_multiplier(features: ModelConfig) -> float | None:
    """Returns Yarn's `mscale_all_dim`, which llama.cpp uses as `mscale` too; None if queries have no scale."""
    return None if features.query_position_scale is None else features.rope.scaling.number("mscale_all_dim", 0.0)


def _beta(features: ModelConfig) -> float | None:
    return None if features.query_position_scale is None else features.query_position_scale.beta


# Values of keys of mixtures.
OF_EXPERTS: Mapping[str, Callable[[ExpertsConfig], int | float | bool | None]] = {
    "expert_count": lambda experts: experts.count,
    "expert_used_count": lambda experts: experts.per_token,
    "expert_feed_forward_length": lambda experts: experts.mlp_dim,
    "expert_shared_feed_forward_length": lambda experts: experts.shared_mlp_dim,
    "expert_shared_count": lambda experts: experts.shared_mlp_dim // experts.mlp_dim,
    "leading_dense_block_count": lambda experts: experts.layers[0],
    "expert_weights_scale": lambda experts: experts.scale,
    "expert_weights_norm": lambda experts: experts.normalize,
    "expert_group_count": lambda experts: experts.groups if experts.groups > 1 else None,
    "expert_group_used_count": lambda experts: experts.groups_per_token if experts.groups > 1 else None,
    "nextn_predict_layers": lambda experts: None,
}
# Values of keys that only some architectures have, by Hugging Face's attribute; None: the key is not written.
OPTIONAL: Mapping[str, Callable[[ModelConfig], int | float | bool | None]] = {
    "sliding_window": _window,
    "sliding_window_pattern": _pattern,
    "rope_local_base_freq": _local_theta,
    "attn_logit_softcapping": lambda features: features.attention_softcap,
    "final_logit_softcapping": lambda features: features.head_softcap,
    "use_parallel_residual": lambda features: features.layout == "parallel",
    "attention_multiplier": lambda features: features.query_scale,
    "embedding_multiplier": lambda features: features.embed_scale,
    "residual_multiplier": lambda features: features.residual_scale,
    "logits_scaling": lambda features: 1 / (features.logit_scale or 1.0),
    "logit_scale": lambda features: features.logit_scale or 1.0,
    "mscale_all_dim": _log_multiplier,
    "llama_4_scaling_beta": _beta,
}


def _linear(rope: Rope) -> tuple[JsonObject, Tables]:
    return {"rope.scaling.type": "linear", "rope.scaling.factor": rope.scaling.get("factor")}, {}


def _yarn(rope: Rope) -> tuple[JsonObject, Tables]:
    numbers = rope.scaling
    given = {name: numbers.get(name) for name in ("beta_fast", "beta_slow")}
    # llama.cpp always applies the usual factor, so a file with another one would give other logits.
    attention_factor, usual = numbers.get("attention_factor"), yarn_attention_factor(numbers.number("factor"))
    is_usual = isinstance(attention_factor, float) and math.isclose(attention_factor, usual, rel_tol=F32)
    keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": numbers.get("factor"),
        **_original(rope),
        **{f"rope.scaling.yarn_{name}": value for name, value in given.items() if value is not None},
        **({YARN_ATTENTION_FACTOR: attention_factor} if is_usual else {}),
    }
    return keys, {}


def _llama3(rope: Rope) -> tuple[JsonObject, Tables]:
    return {}, {ROPE_FACTORS: llama3_factors(rope.dim, rope.theta, dict(rope.scaling.numbers))}


def _longrope(rope: Rope) -> tuple[JsonObject, Tables]:
    _, factor = SCALINGS["longrope"](rope, 1)
    tables = {tensor: np.asarray(rope.scaling.get(name), np.float32) for name, tensor in LONGROPE_FACTORS.items()}
    return {"rope.scaling.attn_factor": factor, **_original(rope)}, tables


def _original(rope: Rope) -> JsonObject:
    original = rope.scaling.number("original_max_position_embeddings", rope.max_positions)
    return {"rope.scaling.original_context_length": int(original)}


def _unscaled(rope: Rope) -> tuple[JsonObject, Tables]:
    return {}, {}


# GGUF has no key for "dynamic", which `features_lost` then reports.
SCALED: Mapping[str, Callable[[Rope], tuple[JsonObject, Tables]]] = {
    "default": _unscaled,
    "dynamic": _unscaled,
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
